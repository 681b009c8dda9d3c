"""A stand-in for flash-attn on a CPU, written from the description of ``flash_attn_with_kvcache``."""

import torch
from torch import Tensor


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k=None,
    v=None,
    *,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor,
    softmax_scale: float,
    causal: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """(batch, queries, heads, d) attend to the first ``cache_seqlens`` slots of row ``cache_batch_idx`` of the cache.

    k_cache, v_cache: (rows, slots, kv heads, d), the last stride is 1. Grouped heads share keys in order.
    """
    batch, _, heads, size = q.shape
    rows, slots, kv_heads, _ = k_cache.shape
    assert k is None and v is None, "the decoder writes the cache itself"
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1 and q.stride(-1) == 1
    assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
    assert cache_seqlens.shape == cache_batch_idx.shape == (batch,)
    assert not causal and not softcap and heads % kv_heads == 0
    assert 0 < int(cache_seqlens.min()) and int(cache_seqlens.max()) <= slots
    found = torch.empty_like(q)
    for i, (row, end) in enumerate(zip(cache_batch_idx.tolist(), cache_seqlens.tolist(), strict=True)):
        keys, values = (x[row, :end].repeat_interleave(heads // kv_heads, 1) for x in (k_cache, v_cache))
        weight = (torch.einsum("qhd,khd->hqk", q[i], keys) * softmax_scale).softmax(-1)
        found[i] = torch.einsum("hqk,khd->qhd", weight, values)
    return found


def flash_attn_3_with_kvcache(*args, **kwargs):
    """As early releases of flash-attn 3 return it: with the sums of the softmax."""
    return flash_attn_with_kvcache(*args, **kwargs), None

"""How the decoder reads its cache: sdpa without repeated keys and values, or flash-attn without a mask.

sdpa: grouped heads share their keys and values in place. transformers repeats them for each query head if there is a
mask, which copies the whole cache in every layer of every step.

flash-attn: the tokens of a block all see the same slots, the first ones of their lane up to the block's end. So a block
is a query sequence of its own without a mask: ``flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=...,
cache_batch_idx=..., causal=False)``. A forward over [finished block | current block] is two sequences on one row of the
cache. The decoder writes keys and values before, so no slot is written twice. Nothing reads slots after a lane's own
end, and shapes do not change from step to step. A prefill, and a forward at block size 1 (self-verification, energies),
have other masks; they use sdpa.

Source of the interface: flash-attn 2 (arXiv 2307.08691) and 3 (arXiv 2407.08608), ``flash_attn_with_kvcache``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from t3d.blocks.settings import FLASH
from t3d.common.errors import fault
from t3d.decode.model_facts import full_attention, head_dim

Kernel = Callable[..., Any]  # with the interface of flash_attn_with_kvcache


class Flash(NamedTuple):
    """A kernel, and the same as an operator for a compiled step. A plain call is quicker than an operator."""

    plain: Callable[..., Tensor]
    operator: Callable[..., Tensor]


ON_SDPA = "block_cache"  # the name in transformers of `attend` without a kernel
UNUSUAL = ("softcap", "position_bias", "s_aux")  # arguments of some models' attention


@dataclass(frozen=True)
class CacheAttention:
    """The attention of a decoder's forwards.

    Attributes:
        name: the implementation's name in transformers.
        by_ends: forwards over blocks take the blocks' ends (see ``block_ends``) in place of a mask.
    """

    name: str
    by_ends: bool = False

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """The model's forwards use this attention inside, and their own again afterwards."""
        before = model.config._attn_implementation
        if before == self.name:
            yield
            return
        model.config._attn_implementation = self.name
        try:
            yield
        finally:
            model.config._attn_implementation = before


def choose_attention(model: Any, asked: str | Kernel | None) -> CacheAttention:
    """The attention of a model's decoder.

    Args:
        asked: an implementation's name, or a function with the interface of ``flash_attn_with_kvcache``. None:
            flash-attn on a CUDA device where it is installed and the model fits, else the model's own kernel.

    Raises:
        UserError: flash-attn is asked for, and it is not installed or the model does not fit.
    """
    own = model.config._attn_implementation
    if callable(asked):
        return _registered(asked)
    if asked == FLASH or (asked is None and own != "eager"):
        found = flash_kernel(model.device)
        reason = misfit(model, found)
        if found and reason is None:
            return _registered(found)
        if asked:
            raise fault("rollout.attn_implementation", asked, f"{reason}; leave it at null")
    name = asked or own
    return CacheAttention(ON_SDPA if name == "sdpa" and not full_attention(model.config) else str(name))


def flash_kernel(device: torch.device) -> Kernel | None:
    """``flash_attn_with_kvcache`` of flash-attn 3 on Hopper, else of flash-attn 2; None where none is installed."""
    if device.type != "cuda":
        return None
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    try:
        if hopper:
            from flash_attn_interface import flash_attn_with_kvcache

            return flash_attn_with_kvcache
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_with_kvcache

        return flash_attn_with_kvcache
    except ImportError:
        return None


def misfit(model: Any, kernel: Kernel | None) -> str | None:
    """The reason for which flash-attn cannot decode with a model; None = it can."""
    config, width = model.config, head_dim(model.config)
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device)[0] < 8:
        return "needs a CUDA GPU of compute capability 8.0 or newer"
    if kernel is None:
        return "flash-attn is not installed"
    if model.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16 weights, these are {model.dtype}".replace("torch.", "")
    if width % 8 or width > 256 or getattr(config, "v_head_dim", width) != width:
        return "needs heads whose width is a multiple of 8, at most 256, the same for keys and values"
    if full_attention(config) or not type(model)._supports_sdpa:
        return "needs a model with block-causal attention that sdpa can compute"
    return None


def block_ends(position: Tensor, block_size: int) -> Tensor:
    """The end of every block of a block forward, in place of a mask: (lanes, blocks, 1, 1) int32.

    Four dimensions, because transformers' models pass such a mask on unchanged.

    Args:
        position: (lanes, width) absolute positions, whole blocks of ``block_size``.
    """
    return (position[:, ::block_size] + block_size).int()[:, :, None, None]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    kernel: Flash | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The decoder's attention function, with the interface of transformers.

    Args:
        query: (lanes, heads, width, d). key, value: (lanes, kv heads, slots, d).
        attention_mask: added to the scores, or the blocks' ends (int32), for which there is a ``kernel``.

    Returns:
        (lanes, width, heads, d), and no weights.
    """
    if attention_mask.dtype == torch.int32:
        assert kernel is not None
        return _by_ends(query, key, value, attention_mask, kernel, scaling, kwargs), None
    if any(kwargs.get(name) is not None for name in UNUSUAL):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.device.type == "cpu":
        found = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return found.transpose(1, 2).contiguous(), None
    # A GPU's fast kernels have no grouped heads under a mask. The queries of a group go side by side as more rows.
    lanes, heads, width, size = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(lanes, key.shape[1], groups * width, size)
    mask = attention_mask.repeat(1, 1, groups, 1)
    found = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    found = found.unflatten(2, (groups, width)).permute(0, 3, 1, 2, 4)
    return found.reshape(lanes, width, heads, value.shape[-1]), None


def _by_ends(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, kernel: Flash, scaling: float | None, more: dict[str, Any]
) -> Tensor:
    """flash-attn over the cache: each block is a sequence of queries without a mask. See ``attend``."""
    assert more.get("s_aux") is None and more.get("position_bias") is None
    lanes, heads, width, size = query.shape
    blocks = ends.shape[1]
    rows = query.transpose(1, 2).reshape(lanes * blocks, width // blocks, heads, size).to(key.dtype)
    of_lane = torch.arange(lanes, dtype=torch.int32, device=ends.device).repeat_interleave(blocks)
    call = kernel.operator if torch.compiler.is_compiling() else kernel.plain
    scale = size**-0.5 if scaling is None else scaling
    found = call(
        rows, key.transpose(1, 2), value.transpose(1, 2), ends.flatten(), of_lane, scale, more.get("softcap") or 0.0
    )
    return found.view(lanes, width, heads, size)


def _call(
    kernel: Kernel, rows: Tensor, keys: Tensor, values: Tensor, ends: Tensor, lane: Tensor, scale: float, softcap: float
) -> Tensor:
    found = kernel(
        rows,
        keys,
        values,
        cache_seqlens=ends,
        cache_batch_idx=lane,
        softmax_scale=scale,
        causal=False,
        softcap=softcap,
    )
    return found[0] if isinstance(found, tuple) else found  # early releases of flash-attn 3 also return the sums


@cache
def _registered(kernel: Kernel) -> CacheAttention:
    """``attend`` with this kernel, under a name in transformers."""
    name = f"{ON_SDPA}_{kernel.__module__}.{kernel.__qualname__}".replace("flash", "f")  # "flash" has a meaning there
    AttentionInterface.register(name, partial(attend, kernel=Flash(partial(_call, kernel), _operator(kernel))))
    return CacheAttention(name, by_ends=True)


def _operator(kernel: Kernel) -> Callable[..., Tensor]:
    """The kernel as an operator that torch.compile leaves alone."""

    def cache_attention(
        rows: Tensor, keys: Tensor, values: Tensor, ends: Tensor, lane: Tensor, scale: float, softcap: float
    ) -> Tensor:
        return _call(kernel, rows, keys, values, ends, lane, scale, softcap)

    operator = torch.library.custom_op(f"t3d::cache_attention_{id(kernel)}", cache_attention, mutates_args=())
    operator.register_fake(lambda rows, *rest: torch.empty_like(rows))
    return operator


AttentionInterface.register(ON_SDPA, attend)

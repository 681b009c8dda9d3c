"""Block-causal attention: one predicate for training, decoding, dense masks and FlexAttention.

Every token carries three labels. ``segment`` is its packed sequence (-1 is padding), ``block`` its block on the
sequence's grid. ``noisy`` is true in the noisy copy x_t of the training layout.
Source: BD3-LM's vectorised training (arXiv 2503.09573, section 3.3 and appendix B.6), SDAR (arXiv 2510.06303).
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

FLEX_TILE = 128  # tokens in one tile of FlexAttention


class Labels(NamedTuple):
    """Labels of each token, all (batch, length): ``segment`` int, ``block`` int, ``noisy`` bool."""

    segment: Tensor
    block: Tensor
    noisy: Tensor


def visible(q_segment, q_block, q_noisy, k_segment, k_block, k_noisy):
    """May the query see the key? Elementwise on anything that broadcasts.

    A clean query sees clean keys of the same or an earlier block. A noisy query sees clean keys of a strictly earlier
    block, and noisy keys of the same block. Nothing is seen across segments.
    """
    earlier = k_block < q_block
    same = k_block == q_block
    seen_clean = ~k_noisy & (earlier | (~q_noisy & same))
    seen_noisy = k_noisy & q_noisy & same
    return (q_segment == k_segment) & (seen_clean | seen_noisy)


def dense_mask(labels: Labels) -> Tensor:
    """(batch, 1, length, length) bool, True where the query (row) sees the key (column).

    Padding (segment -1) sees padding only, so no row of the softmax is empty.
    """
    q = [label.unsqueeze(-1) for label in labels]
    k = [label.unsqueeze(-2) for label in labels]
    return visible(*q, *k).unsqueeze(1)


def flex_mask(labels: Labels):
    """The same mask as a FlexAttention BlockMask: (batch, any head, length, length)."""
    segment, block, noisy = labels

    def mask_mod(b, h, q, k):
        return visible(segment[b, q], block[b, q], noisy[b, q], segment[b, k], block[b, k], noisy[b, k])

    batch, length = segment.shape
    build = _block_mask_builder(segment.device.type)
    return build(mask_mod, B=batch, H=None, Q_LEN=length, KV_LEN=length, device=segment.device)


@cache
def _block_mask_builder(device: str):
    """create_block_mask for any length; compiled on a GPU, where the plain function first writes the whole mask.

    A mask belongs to its batch; it cannot be kept for the next batch.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if device == "cuda" else create_block_mask


def cache_mask(query_position: Tensor, key_slots: int, block_size: int) -> Tensor:
    """Mask for queries on a key cache whose slot = absolute position: the predicate's case clean -> clean.

    Args:
        query_position: (rows, width) absolute positions.
        key_slots: number of cache slots looked at.

    Returns:
        (rows, 1, width, key_slots) bool.
    """
    query_block = (query_position // block_size).unsqueeze(-1)
    slot_block = torch.arange(key_slots, device=query_position.device) // block_size
    return (slot_block <= query_block).unsqueeze(1)


def for_implementation(mask: Tensor, implementation: str, dtype: torch.dtype):
    """A bool mask (batch, 1, queries, keys) in the form an attention implementation of transformers takes.

    eager, sdpa and the decoder's own take numbers that are added to the scores. From a bool mask sdpa would make them
    anew at every layer and keep each for the backward pass. FlexAttention would add 0 and 1, so it gets a BlockMask.
    """
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        batch, _, queries, keys = mask.shape
        rows = mask[:, 0]  # torch 2.6 maps over an index of tensors alone, without a number in it
        return create_block_mask(
            lambda b, h, q, k: rows[b, q, k], B=batch, H=None, Q_LEN=queries, KV_LEN=keys, device=mask.device
        )
    hidden = torch.finfo(dtype).min if implementation == "eager" else -torch.inf
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), hidden)

"""Facts of a model's configuration that decoding and training need, for any model of transformers."""

import sys
from typing import Any

import torch


def logit_shift(config: Any) -> bool:
    """Whether the hidden state before a position predicts its token, as in an autoregressive model."""
    return bool(getattr(config, "logit_shift", False))


def full_attention(config: Any) -> bool:
    """Does every position see every other, also those of later blocks?"""
    return bool(getattr(config, "full_attention", False))


def position_count(config: Any) -> int:
    """The longest sequence: the model's positions, or its attention window if that is shorter.

    Up to the window's length a windowed layer sees the same tokens as a full layer. Longer sequences would need a
    separate mask for each layer.
    """
    found = [getattr(config, "max_position_embeddings", None), *_windows(config)]
    return min((n for n in found if n), default=sys.maxsize)


def whole_blocks(positions: int, block_size: int) -> int:
    """The positions that whole blocks cover: prompt and answer share them."""
    return positions // block_size * block_size


def _windows(config: Any) -> list[int | None]:
    kinds = getattr(config, "layer_types", None)
    window, part = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if kinds is None:
        return [window, part]
    return [window if "sliding_attention" in kinds else None, part if "chunked_attention" in kinds else None]


def head_dim(config: Any) -> int:
    """The width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def bytes_per_slot(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim(config) * dtype.itemsize

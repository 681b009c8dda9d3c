"""Loads a model for decoding: from a folder or a hub id to the model, its tokenizer, special ids and engine."""

from dataclasses import dataclass
from typing import Any

import torch

from t3d.blocks.settings import FLASH
from t3d.blocks.special_ids import SpecialIds
from t3d.decode.local import LocalEngine
from t3d.decode.model_facts import position_count
from t3d.models.block_diffusion import BlockDiffusionLM
from t3d.models.loading import load_model, load_tokenizer, special_ids


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model in eval mode, ready to decode.

    Attributes:
        ids: the model's special ids.
        engine: decodes requests (t3d.decode.protocol.Engine).
    """

    model: BlockDiffusionLM
    tokenizer: Any
    ids: SpecialIds
    engine: LocalEngine

    @property
    def positions(self) -> int:
        """The model's limit for prompt and answer together, in tokens."""
        return position_count(self.model.config)


def load_decoder(
    source: str,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    key: str = "model.pretrained_model",
    **engine: Any,
) -> Decoder:
    """Load the model ``source`` for decoding. For a model in memory use ``LocalEngine.of``.

    Args:
        source: a folder or a hub id. dtype: see ``load_model``.
        attn_implementation: the kernel; None = the fastest that fits (``t3d.decode.attention.choose_attention``).
        device: None = the GPU if there is one, else the CPU.
        tokenizer: the model's, if it is loaded already.
        key: the setting that named ``source``, for error messages.
        engine: options of LocalEngine: max_active, fused_commit, compile.

    Raises:
        UserError: no such model or tokenizer, or one that lacks a special id.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = None if attn_implementation == FLASH else attn_implementation  # flash-attn reads the decoder's cache alone
    model = load_model(source, dtype=dtype, attn_implementation=loaded, device=device, key=key)
    tokenizer = load_tokenizer(source, key=key) if tokenizer is None else tokenizer
    ids = special_ids(model.config, tokenizer, model.generation_config)
    return Decoder(model, tokenizer, ids, LocalEngine.of(model, ids, attention=attn_implementation, **engine))

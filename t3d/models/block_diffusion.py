"""Any decoder language model of transformers as a block-diffusion model: its own forward under a block-causal mask.

transformers' models use a mask of four dimensions unchanged (``create_causal_mask``). So one mixin, put before a
model's class of transformers, adds the block grid, ``forward(..., head=)`` and block diffusion's ``generate``. SDAR
(arXiv 2510.06303) is Qwen3 under that mixin: the same weights and names, no logit shift.

Importing this module registers ``model_type: sdar`` with AutoConfig, AutoModel and AutoModelForCausalLM. So an SDAR
folder loads without remote code. It also registers a flex_attention that accepts the dtypes of autocast.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPast

from t3d.blocks.attention import Labels, dense_mask, flex_mask, for_implementation
from t3d.decode.cache import CACHE_NAMES
from t3d.decode.model_facts import full_attention
from t3d.models.generation import BlockDiffusionMixin


def under_block_mask(
    model: PreTrainedModel, input_ids: Tensor | None, attention_mask: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a forward of ``model``, with the mask in the form for its attention kernel.

    Args:
        attention_mask: None, or (batch, length) with 0 at padding: the mask is then block-causal on the grid of
            ``config.block_size``, with positions counted from the first real token. With ``config.full_attention`` all
            positions are one block. Or the caller's own mask: (batch, 1, queries, keys) bool, or a FlexAttention
            BlockMask.

    Raises:
        ValueError: a cache without a mask.
    """
    implementation = model.config._attn_implementation
    if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        if any(kwargs.get(name) is not None for name in CACHE_NAMES):
            raise ValueError(
                "block diffusion with a cache needs an explicit 4D attention_mask (t3d.blocks.attention.cache_mask)"
            )
        inputs = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        block_size = inputs.shape[1] if full_attention(model.config) else model.config.block_size
        labels = _grid_labels(inputs, attention_mask, block_size)
        if kwargs.get("position_ids") is None:
            real = labels.segment >= 0
            kwargs = {**kwargs, "position_ids": (real.long().cumsum(-1) - 1).clamp(min=0)}
        attention_mask = flex_mask(labels) if implementation == "flex_attention" else dense_mask(labels)
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:
        device = attention_mask.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        attention_mask = for_implementation(attention_mask, implementation, dtype)
    return {**kwargs, "input_ids": input_ids, "attention_mask": attention_mask}


def _grid_labels(inputs: Tensor, padding_mask: Tensor | None, block_size: int) -> Labels:
    batch, length = inputs.shape[:2]
    if padding_mask is None:
        padding_mask = torch.ones(batch, length, dtype=torch.long, device=inputs.device)
    real = padding_mask > 0
    position = (real.long().cumsum(-1) - 1).clamp(min=0)
    return Labels(real.long() - 1, position // block_size, torch.zeros_like(real))


class BlockDiffusionLM(BlockDiffusionMixin, PreTrainedModel):
    """A language model of transformers under the block grid. It comes before the class whose forward it calls.

    Logits at a position predict the token of that position. With ``config.logit_shift`` they predict the next token, as
    in an autoregressive model. At block size 1 with the shift it *is* the autoregressive model.
    """

    _supports_flash_attn = False  # flash attention has no block-causal mask; transformers refuses it
    family: Any = None  # the t3d.models.family.Family of the folder that it was loaded from

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        *,
        head: Callable[[Tensor, Tensor], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' own forward. ``head`` keeps (tokens x vocabulary) tensors out of memory.

        Args:
            attention_mask: see ``under_block_mask``.
            head: gets the hidden states (batch, length, width) and the head's weight (vocab, width), whose product are
                the logits. Its result replaces the usual output. It runs inside ``forward``, so the hooks of DDP,
                DeepSpeed and FSDP see every use of the parameters.
        """
        arguments = under_block_mask(self, input_ids, attention_mask, kwargs)
        if head is None:
            return super().forward(**arguments)
        hidden = self.get_decoder()(**arguments).last_hidden_state
        if (scale := logit_scale(self.config)) != 1:
            hidden = hidden * scale
        return head(hidden, self.get_output_embeddings().weight)


def logit_scale(config: Any) -> float:
    """The factor of a model's logits (Cohere), or the inverse of their divisor (Granite); 1 for most models."""
    return getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)


@cache
def block_diffusion_class(base: type[PreTrainedModel]) -> type[BlockDiffusionLM]:
    """The block-diffusion model on transformers' class ``base``, under the name that transformers knows it by."""
    if issubclass(base, BlockDiffusionLM):
        return base
    about = {"__module__": base.__module__, "__doc__": f"{base.__name__} under the block grid (t3d)."}
    return type(base.__name__, (BlockDiffusionLM, base), about | {"config_class": base.config_class})


# ---------------------------------------------------------------------------------------------------------------------
# SDAR


class SDARConfig(Qwen3Config):
    """Qwen3's configuration with the block grid.

    Attributes:
        block_size: the block of a plain ``model(input_ids)`` call; decoding and training have their own setting.
        mask_token_id: the id that stands for "not yet decoded".
    """

    model_type = "sdar"
    block_size: int = 4
    mask_token_id: int | None = None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """The configuration of a config.json, where some tools write a dtype as "torch.float32"."""
        dtypes = {name: config_dict.get(name) for name in ("dtype", "torch_dtype")}
        plain = {name: dtype.removeprefix("torch.") for name, dtype in dtypes.items() if isinstance(dtype, str)}
        return super().from_dict({**config_dict, **plain}, **kwargs)


class SDARModel(Qwen3Model):
    """Qwen3's decoder under a block-causal mask."""

    config_class = SDARConfig
    _supports_flash_attn = False

    def forward(self, input_ids=None, attention_mask=None, **kwargs) -> BaseModelOutputWithPast:
        """Run the decoder; ``attention_mask`` as of ``under_block_mask``."""
        return super().forward(**under_block_mask(self, input_ids, attention_mask, kwargs))


class SDARForCausalLM(BlockDiffusionLM, Qwen3ForCausalLM):
    """SDAR with its vocabulary head. Logits at a position predict the token of that same position."""

    config_class = SDARConfig

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        self.model = SDARModel(config)
        self.post_init()


def flex_attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' own, in the dtype of the values, as autocast does for sdpa.

    With fp32 weights Qwen3's norms leave queries and keys in fp32 under autocast. FlexAttention needs one dtype, and
    before torch 2.11 it ignores autocast.
    """
    return flex_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **kwargs)


AttentionInterface.register("flex_attention", flex_attention)
AutoConfig.register(SDARConfig.model_type, SDARConfig)
AutoModel.register(SDARConfig, SDARModel)
AutoModelForCausalLM.register(SDARConfig, SDARForCausalLM)

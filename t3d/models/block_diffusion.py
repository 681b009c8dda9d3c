"""SDAR (arXiv 2510.06303) on transformers' Qwen3: the same weights and names, block-causal attention, no logit shift.

Importing this module registers ``model_type: sdar`` with AutoConfig, AutoModel and AutoModelForCausalLM, so an SDAR
folder loads without remote code, and a flex_attention that takes what autocast makes of Qwen3's queries and keys.
"""

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPast

from t3d.blocks.attention import Labels, dense_mask, flex_mask, for_implementation
from t3d.decode.cache import CACHE_NAMES
from t3d.models.generation import BlockDiffusionMixin


class SDARConfig(Qwen3Config):
    """Qwen3's configuration with the block grid.

    Attributes:
        block_size: the block of a plain ``model(input_ids)`` call; decoding and training state theirs.
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
    _supports_flash_attn = False  # it has no block-causal mask; transformers refuses it

    def forward(self, input_ids=None, attention_mask=None, **kwargs) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            attention_mask: None or (batch, length) of 0/1 for padding: the block-causal mask on the grid of
                ``config.block_size``, with positions counted from the first real token. Or a mask of the caller's own:
                (batch, 1, queries, keys) bool, or a FlexAttention BlockMask.

        Raises:
            ValueError: a cache without a mask.
        """
        implementation = self.config._attn_implementation
        if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
            if any(kwargs.get(name) is not None for name in CACHE_NAMES):
                raise ValueError(
                    "SDAR with a cache needs an explicit 4D attention_mask (t3d.blocks.attention.cache_mask)"
                )
            inputs = input_ids if input_ids is not None else kwargs["inputs_embeds"]
            labels = _grid_labels(inputs, attention_mask, self.config.block_size)
            if kwargs.get("position_ids") is None:
                real = labels.segment >= 0
                kwargs["position_ids"] = (real.long().cumsum(-1) - 1).clamp(min=0)
            attention_mask = flex_mask(labels) if implementation == "flex_attention" else dense_mask(labels)
        if isinstance(attention_mask, Tensor):
            device = attention_mask.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
            attention_mask = for_implementation(attention_mask, implementation, dtype)
        return super().forward(
            input_ids=input_ids, attention_mask={"full_attention": attention_mask}, is_causal=False, **kwargs
        )


def _grid_labels(inputs: Tensor, padding_mask: Tensor | None, block_size: int) -> Labels:
    batch, length = inputs.shape[:2]
    if padding_mask is None:
        padding_mask = torch.ones(batch, length, dtype=torch.long, device=inputs.device)
    real = padding_mask > 0
    position = (real.long().cumsum(-1) - 1).clamp(min=0)
    return Labels(real.long() - 1, position // block_size, torch.zeros_like(real))


class SDARForCausalLM(BlockDiffusionMixin, Qwen3ForCausalLM):
    """SDAR with its vocabulary head. Logits at a position predict the token of that same position."""

    config_class = SDARConfig
    _supports_flash_attn = False

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        self.model = SDARModel(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, *, head=None, **kwargs):
        """As Qwen3's, with one addition that keeps (tokens x vocabulary) tensors out of memory.

        Args:
            head: a callable that receives (hidden states (batch, length, width), the head's weight (vocab, width)) and
                whose result is returned in place of the usual output. It runs inside ``forward``, so the hooks of DDP,
                DeepSpeed and FSDP see every use of the parameters.
        """
        if head is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return head(hidden, self.lm_head.weight)


def flex_attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' own, in the dtype of the values, as autocast does for sdpa.

    With fp32 weights Qwen3's norms leave queries and keys in fp32 under autocast. FlexAttention takes one dtype, and
    before torch 2.11 it knows nothing of autocast.
    """
    return flex_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **kwargs)


AttentionInterface.register("flex_attention", flex_attention)
AutoConfig.register(SDARConfig.model_type, SDARConfig)
AutoModel.register(SDARConfig, SDARModel)
AutoModelForCausalLM.register(SDARConfig, SDARForCausalLM)

"""LLaDA2.0-mini and -flash (arXiv 2512.15745): Glm4-MoE under another name, block-causal in blocks of 32.

Both have grouped heads with norms on queries and keys, half of a head's dimensions rotated, dense first layers, and a
router of sigmoids with a bias that chooses inside groups of experts. LLaDA2 keeps queries, keys and values in one
matrix, which is parted when the weights are loaded and joined by an export.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from t3d.models.block_diffusion import BlockDiffusionLM
from t3d.models.family import Family

AS_GLM4 = {"use_bias": False, "norm_head": False, "score_function": "sigmoid", "hidden_act": "silu"}


class LLaDA2Config(Glm4MoeConfig):
    """Glm4-MoE's configuration under LLaDA2's model type."""

    model_type = "llada2_moe"


class LLaDA2ForCausalLM(BlockDiffusionLM, Glm4MoeForCausalLM):
    """Glm4-MoE under the block grid, with LLaDA2's names in its folders."""

    __module__ = Glm4MoeForCausalLM.__module__  # whose source tells transformers how experts can be computed
    config_class = LLaDA2Config


class PartHeads(ConversionOps):
    """The joint projection's rows (heads + 2 * key-value heads) * head_dim become those of queries, keys and values."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        heads, grouped = kwargs["config"].num_attention_heads, kwargs["config"].num_key_value_heads
        width = len(tensors[0]) // (heads + 2 * grouped)
        parts: tuple[Tensor, ...] = tensors[0].split([width * heads, width * grouped, width * grouped])
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


def _conversions() -> list[Any]:
    """LLaDA2's names of weights -> Glm4-MoE's; that of the experts is Glm4-MoE's own."""
    parts = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    return [
        WeightRenaming(r"model\.word_embeddings\.", r"model.embed_tokens."),
        WeightRenaming(r"\.attention\.dense\.", r".self_attn.o_proj."),
        WeightRenaming(r"\.attention\.query_layernorm\.", r".self_attn.q_norm."),
        WeightRenaming(r"\.attention\.key_layernorm\.", r".self_attn.k_norm."),
        WeightRenaming(r"\.mlp\.gate\.expert_bias", r".mlp.gate.e_score_correction_bias"),
        WeightConverter("attention.query_key_value.weight", parts, operations=[PartHeads()]),
        *get_checkpoint_conversion_mapping("glm4_moe"),
    ]


class Llada2(Family):
    model_types = {"llada2_moe": "llada2_moe"}
    block_size = 32
    mask_id = 156895
    keys = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
    lora = ("q_proj", "k_proj", "v_proj", "o_proj")  # the experts are no linear layers

    def configuration(self, found: Mapping[str, Any], **options: Any) -> PreTrainedConfig:
        for name, value in AS_GLM4.items():
            if found.get(name, value) != value:
                raise ValueError(f"{name}={found[name]} is not Glm4-MoE's; only {value} is supported")
        if found.get("use_qkv_bias"):
            raise ValueError("use_qkv_bias=true: only the weight of the joint projection is parted")
        return super().configuration({"use_qk_norm": True, **found}, **options)


AutoConfig.register(LLaDA2Config.model_type, LLaDA2Config)
AutoModelForCausalLM.register(LLaDA2Config, LLaDA2ForCausalLM)
register_checkpoint_conversion_mapping(LLaDA2Config.model_type, _conversions())

"""LLaDA-8B (arXiv 2502.09992): Llama without grouped heads under full attention, in the names of its own code."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from t3d.models.family import Family

# What its configuration can say beyond Llama, with the value that Llama has.
AS_LLAMA = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "alibi": False,
}


class Llada(Family):
    model_types = {"llada": "llama"}
    block_size = 32
    mask_id = 126336
    full_attention = True
    keys = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "weight_tying": "tie_word_embeddings",
    }
    weights = {
        r"^model\.transformer\.wte\.": r"model.embed_tokens.",
        r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
        r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
        r"^model\.transformer\.blocks\.(\d+)\.q_proj\.": r"model.layers.\1.self_attn.q_proj.",
        r"^model\.transformer\.blocks\.(\d+)\.k_proj\.": r"model.layers.\1.self_attn.k_proj.",
        r"^model\.transformer\.blocks\.(\d+)\.v_proj\.": r"model.layers.\1.self_attn.v_proj.",
        r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
        r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
        r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
        r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
        r"^model\.transformer\.ln_f\.": r"model.norm.",
        r"^model\.transformer\.ff_out\.": r"lm_head.",
    }

    def configuration(self, found: Mapping[str, Any], **options: Any) -> PreTrainedConfig:
        for name, value in AS_LLAMA.items():
            if found.get(name, value) not in (value, None):
                raise ValueError(f"{name}={found[name]} is not Llama's; only {value} is supported")
        rows = found.get("embedding_size") or found["vocab_size"]  # of the table; ids beyond the tokenizer are unused
        return super().configuration({**found, "vocab_size": rows}, **options)

"""SDAR: block-causal attention against a slow loop, its kernels against each other, and Qwen3's weight names."""

import json

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Qwen3Config, Qwen3ForCausalLM

from t3d.blocks.attention import Labels, dense_mask
from t3d.decode.cache import CACHE_NAME, CACHE_NAMES, cache_name
from t3d.models import SDARConfig, SDARForCausalLM
from tests.conftest import PAD, tiny_model

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(60, (batch, length), generator=torch.Generator().manual_seed(1))


def norm(x, weight):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x, position, theta=10000.0):
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def loop_logits(model, ids, block_size):
    """The transformer written out for one sequence, one query at a time, over the keys that the grid lets it see."""
    config, weight = model.config, model.state_dict()
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x = weight["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        w = {k.split(f"layers.{layer}.")[1]: v for k, v in weight.items() if f"layers.{layer}." in k}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = ((h @ w[f"self_attn.{name}_proj.weight"].T).view(len(ids), -1, size) for name in ("q", "k", "v"))
        q, k = norm(q, w["self_attn.q_norm.weight"]), norm(k, w["self_attn.k_norm.weight"])
        attended = torch.zeros(len(ids), heads, size)
        for i in range(len(ids)):
            seen = [j for j in range(len(ids)) if j // block_size <= i // block_size]
            for head in range(heads):
                group = head * groups // heads
                query = rotate(q[i, head], i)
                score = torch.stack([query @ rotate(k[j, group], j) / size**0.5 for j in seen])
                attended[i, head] = score.softmax(0) @ v[seen, group]
        x = x + attended.flatten(1) @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ w["mlp.down_proj.weight"].T
    return norm(x, weight["model.norm.weight"]) @ weight["lm_head.weight"].T


@pytest.mark.parametrize("block_size", [1, 4, 8])
@torch.no_grad()
def test_forward_equals_a_loop_over_the_block_grid(block_size):
    model, ids = tiny_model(block_size=block_size), random_ids(1, 11)
    torch.testing.assert_close(model(ids).logits[0], loop_logits(model, ids[0], block_size), **CLOSE)


@torch.no_grad()
def test_logits_of_a_block_depend_on_it_and_the_past_only(model):
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 60
    differs = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert differs.tolist() == [False] * 4 + [True] * 8  # position 4 sees 5: no causal mask inside a block


@torch.no_grad()
def test_eager_equals_sdpa(model):
    ids, padding = random_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    padding[1, :3] = 0
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    real = padding.bool()
    torch.testing.assert_close(model(ids).logits, eager(ids).logits, **CLOSE)
    torch.testing.assert_close(model(ids, padding).logits[real], eager(ids, padding).logits[real], **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_does_not_change_the_logits_of_real_tokens(implementation, side, model):
    model.set_attn_implementation(implementation)
    lengths, width = [11, 6, 3], 11
    rows = [random_ids(1, length)[0] for length in lengths]
    ids = torch.full((3, width), PAD)
    mask = torch.zeros(3, width, dtype=torch.long)
    spans = [slice(0, n) if side == "right" else slice(width - n, width) for n in lengths]
    for i, span in enumerate(spans):
        ids[i, span], mask[i, span] = rows[i], 1
    logits = model(ids, mask).logits
    assert logits.isfinite().all()
    for i, span in enumerate(spans):
        torch.testing.assert_close(logits[i, span], model(rows[i][None]).logits[0], **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_equals_sdpa(model):
    ids = random_ids(2, 13)
    flex = tiny_model()
    flex.set_attn_implementation("flex_attention")
    try:
        logits = flex(ids).logits
    except Exception as error:
        if "compil" in f"{type(error)} {error}".lower() or "inductor" in f"{type(error)} {error}".lower():
            pytest.skip(f"FlexAttention cannot compile here: {str(error).splitlines()[0]}")
        raise
    torch.testing.assert_close(logits, model(ids).logits, **CLOSE)


def test_flash_attention_is_refused(model):
    """It has no block-causal mask; a released folder's config may ask for it."""
    with pytest.raises(ValueError, match="Flash Attention"):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(ValueError, match="Flash Attention"):
        SDARForCausalLM._from_config(model.config, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_needs_a_mask_under_both_of_its_names(model, name):
    for called in (model, model.model):
        with pytest.raises(ValueError, match="cache_mask"):
            called(random_ids(1, 4), **{name: DynamicCache()})


def test_the_name_of_the_cache_is_the_one_that_forward_has():
    assert cache_name(lambda input_ids, past_key_values=None, **kwargs: None) == "past_key_values"
    assert cache_name(lambda input_ids, cache=None, **kwargs: None) == "cache"


@pytest.mark.filterwarnings("error")  # transformers warns of a name that it will drop
@torch.no_grad()
def test_the_model_fills_a_cache_given_under_that_name(model):
    ids, cache = random_ids(1, 8), DynamicCache()
    position = torch.arange(8)[None]
    mask = dense_mask(Labels(position * 0, position // 4, position < 0))
    for start in (0, 4):
        block = slice(start, start + 4)
        seen = mask[:, :, block, : start + 4]
        logits = model(ids[:, block], seen, position_ids=position[:, block], **{CACHE_NAME: cache}).logits
    assert cache.get_seq_length() == 8
    torch.testing.assert_close(logits, model(ids).logits[:, 4:], **CLOSE)


def test_head_sees_hidden_states_and_its_result_is_returned(model):
    ids = random_ids(2, 8)
    picked = torch.zeros(2, 8, dtype=torch.bool)
    picked[0, 3] = picked[1, 6] = True
    logits = model(ids, head=lambda hidden, weight: hidden[picked] @ weight.T)
    assert logits.shape == (2, model.config.vocab_size)
    torch.testing.assert_close(logits, model(ids).logits[picked], **CLOSE)
    logits.sum().backward()
    assert model.lm_head.weight.grad is not None and model.model.embed_tokens.weight.grad is not None


def test_round_trip_through_the_auto_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(again) is SDARForCausalLM and type(again.config) is SDARConfig
    assert (again.config.block_size, again.config.mask_token_id) == (4, 63)
    ids = random_ids(1, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_weights_are_named_as_in_qwen3(model):
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "block_size")}
    with torch.device("meta"):
        qwen = Qwen3ForCausalLM(Qwen3Config(**settings))
    shapes = {name: weight.shape for name, weight in qwen.state_dict().items()}
    assert shapes == {name: weight.shape for name, weight in model.state_dict().items()}


def test_weights_are_named_as_in_sdar_4b_chat(shared):
    config = AutoConfig.from_pretrained(shared / "sdar-4b-chat", trust_remote_code=False)
    index = json.loads((shared / "sdar-4b-chat" / "model.safetensors.index.json").read_text())
    with torch.device("meta"):
        model = SDARForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    weights = model.state_dict()
    assert len(weights) == 399 and set(weights) == set(index["weight_map"])
    assert sum(weight.numel() * weight.element_size() for weight in weights.values()) == index["metadata"]["total_size"]

"""Every family by its published config and weight names, on shrunk configs with random weights.

A folder is written as its authors publish it: transformers' own class for the weights, the family's model type and keys
in config.json. Of each: loading, decoding against a forward without a cache, training against decoding, steps of SFT
and T3D, export and reloading.
"""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.special_ids import SpecialIds
from t3d.common.options import load
from t3d.decode.local import LocalEngine
from t3d.models.family import Family, families, lora_modules, model_class
from t3d.models.loading import WEIGHTS, export_model, load_config, load_model, load_tokenizer, special_ids
from t3d.objectives.base import Context, find
from t3d.rollout.run import make_engine
from t3d.rollout.settings import SampleConfig
from t3d.states.base import collate
from tests.conftest import MASK, PAD, STOP, raises_key
from tests.decode.test_local import requests
from tests.models.test_loading import word_tokenizer
from tests.test_training_equals_decoding import draw_states, plain_logits, training_logits

CLOSE = {"rtol": 0, "atol": 2e-5}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "eos_token_id": STOP,
    "bos_token_id": STOP,
    "pad_token_id": PAD,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2}
GROUPED |= {"use_qk_norm": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1}
KEYS = {"block_size": 4, "mask_token_id": MASK}
# published model type -> (transformers' model type, its own keys, what config.json says beside them)
FAMILIES = {
    "sdar": ("sdar", {}, KEYS),
    "sdar_moe": ("qwen3_moe", EXPERTS, KEYS),
    "llada2_moe": ("llada2_moe", GROUPED, KEYS | {"num_experts": 8, "num_shared_experts": 1}),
    "a2d-qwen3": ("qwen3", {}, {}),
    "a2d-llama": ("llama", {}, {}),
    "a2d-qwen2": ("qwen2", {}, {}),
    "Fast_dLLM_Qwen": ("qwen2", {}, {"bd_size": 8, "mask_token_id": MASK}),
    "llama": ("llama", {}, KEYS | {"logit_shift": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, KEYS),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, KEYS | {"logit_shift": True}),
    "mistral": ("mistral", {"sliding_window": None}, KEYS),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}, KEYS | {"logit_shift": True}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 64, "query_pre_attn_scalar": 8}, KEYS),
    "olmo2": ("olmo2", {}, KEYS),
}
OURS = {"sdar", "llada2_moe"}  # whose class is block-causal by itself
SHIFTED = {"Fast_dLLM_Qwen", "llama", "qwen3", "smollm3"}
WITHOUT_HEAD_DIM = {"olmo2", "qwen2", "smollm3", "phi3", "granite", "cohere", "gpt_neox", "starcoder2"}


def plain_config(kind: str, own: dict):
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim" or kind not in WITHOUT_HEAD_DIM}
    return AutoConfig.for_model(kind, **shape | own)


def published(folder, kind: str):
    """The folder of a family, and transformers' model with its weights."""
    base, own, said = FAMILIES[kind]
    families()  # registers what transformers does not have
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(plain_config(base, own), attn_implementation="sdpa").eval()
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    GenerationConfig(eos_token_id=[STOP, PAD], pad_token_id=PAD).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": kind, "auto_map": {"AutoModel": "x.Y"}} | said)
    )
    return folder, model


def weight_names(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def greedy(model, ids: SpecialIds, request, settings: DecodeSettings) -> list[int]:
    """Block by block and step by step by forwards without a cache: the most confident tokens of each step."""
    model.config.block_size = size = settings.block_size
    found = list(request.prompt_ids)
    while True:
        start = len(found) // size * size
        block = torch.tensor(found[start:] + [MASK] * (size - len(found) + start))
        for _ in range(settings.denoising_steps_per_block):
            with torch.no_grad():
                logits = model(torch.cat([torch.tensor(found[:start], dtype=torch.long), block])[None]).logits[0]
            if model.config.logit_shift:
                logits = logits.roll(1, 0)
            logits = logits[start:].index_fill(-1, torch.tensor(ids.forbidden_ids), -torch.inf)
            confidence, token = logits.softmax(-1).max(-1)
            confidence[block != MASK] = -1
            best = confidence.argsort(descending=True, stable=True)[: size // settings.denoising_steps_per_block]
            best = best[block[best] == MASK]
            block[best] = token[best]
        found = found[:start] + block.tolist()
        answer = found[len(request.prompt_ids) :][: settings.max_token]
        if len(answer) == settings.max_token or {STOP, PAD} & set(answer):
            return found[len(request.prompt_ids) :]


def rollouts(model, ids: SpecialIds, lengths=(1, 4, 6, 9, 2), **settings):
    settings = DecodeSettings(**{"block_size": 4, "denoising_steps_per_block": 2, "max_token": 14, **settings})
    engine = LocalEngine.of(model, ids, max_active=3)
    return {answer.id: answer for answer in engine.generate(requests(lengths), settings, seed=3)}, settings


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_published_folder_decodes_trains_and_exports(kind, tmp_path):
    folder, theirs = published(tmp_path / "teacher", kind)
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    ids = special_ids(model.config, tokenizer, model.generation_config)
    assert ids.mask_id == MASK and model.config.logit_shift == (kind in SHIFTED)
    assert model.config.block_size == {"Fast_dLLM_Qwen": 8}.get(kind, 32 if kind.startswith("a2d") else 4)

    # the weights are theirs: at block size 1 the mask is the causal one
    model.config.block_size, prompt = 1, torch.tensor([[5, 9, 40, 3, 3, 17, 8, 1]])
    causal = torch.ones(8, 8).tril().bool()[None, None]
    expected = theirs(prompt, attention_mask=causal).logits if kind in OURS else theirs(prompt).logits
    torch.testing.assert_close(model(prompt).logits, expected, **CLOSE)
    product = model(prompt, head=lambda hidden, weight: hidden @ weight.T)
    torch.testing.assert_close(product, expected, **CLOSE)

    # decoding over the cache = forwards without one
    answers, settings = rollouts(model, ids, temperature=0.0)
    for request in requests((1, 4, 6, 9, 2)):
        assert answers[request.id].response_ids == greedy(model, ids, request, settings)

    # training = decoding
    samples = [vars(answer) for answer in answers.values()]
    states = draw_states(samples, 4, random_ratio=0.2)
    for state, logits in zip(states, training_logits(model, states, [2, 3]), strict=True):
        torch.testing.assert_close(logits, plain_logits(model, state, 4).detach(), **CLOSE)

    # steps of SFT and T3D lower the loss
    for name in ("sft", "t3d"):
        assert losses_fall(model, name, samples, ids)

    # export, reload
    student = export_model(model, str(folder), tmp_path / "student", block_size=2)
    assert weight_names(student) == weight_names(folder)
    config, before = (json.loads((f / "config.json").read_text()) for f in (student, folder))
    key = "bd_size" if kind == "Fast_dLLM_Qwen" else "block_size"
    assert config == before | {key: 2}
    again = load_model(str(student))
    assert again.config.block_size == 2
    again.config.block_size = model.config.block_size = 4
    assert torch.equal(again(prompt).logits, model(prompt).logits)
    assert not torch.allclose(again(prompt).logits, load_model(str(folder))(prompt).logits, atol=1e-3)


def losses_fall(model, name: str, samples: list[dict], ids: SpecialIds) -> bool:
    """Two steps of an objective on fixed states; is the loss lower after them?"""
    context = Context(4, ids, head_chunk=7, random_ratio=0.1)
    objective = find(name).build(find(name).Settings(), context)
    model.train()
    states = [objective.noise(sample, torch.Generator().manual_seed(i)) for i, sample in enumerate(samples)]
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), []
    reference = load_reference(model)
    for _ in range(3):
        batch = collate([states[:2], states[2:]], PAD, shift=model.config.logit_shift)
        loss = objective(model, reference, batch).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        found.append(loss.item())
    model.eval()
    return found[-1] < found[0]


def load_reference(model):
    """The model as it is now, frozen."""
    copy = model_class(model.config)._from_config(model.config, attn_implementation="sdpa").eval()
    copy.load_state_dict(model.state_dict())
    return copy.requires_grad_(False)


# -- full attention; tests/test_full_attention.py decodes and trains on it ---------------------------------------------

LLADA_KEYS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
}
LLADA_NAMES = {
    "model.embed_tokens": "wte",
    "model.norm": "ln_f",
    "lm_head": "ff_out",
    "model.layers.": "blocks.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.down_proj": "ff_out",
    "mlp.": "",
}


def as_llada(folder) -> None:
    """Rewrite a Llama's folder in LLaDA's names."""
    config = json.loads((folder / "config.json").read_text())
    config = {LLADA_KEYS.get(name, name): value for name, value in config.items()}
    said = {"embedding_size": 64, "vocab_size": 62, "rope_theta": 10000.0, "block_type": "llama", "rope": True}
    (folder / "config.json").write_text(json.dumps(config | said | {"model_type": "llada"}))
    weights = {}
    for name, weight in load_file(folder / WEIGHTS).items():
        for ours, theirs in LLADA_NAMES.items():
            name = name.replace(ours, theirs)
        weights[f"model.transformer.{name}"] = weight
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["llada", "Dream"])
@torch.no_grad()
def test_a_family_of_full_attention_loads_and_exports(kind, tmp_path):
    FAMILIES[kind] = {"llada": ("llama", {"num_key_value_heads": 4}, KEYS), "Dream": ("qwen2", {}, KEYS)}[kind]
    try:
        folder, theirs = published(tmp_path / "teacher", kind)
    finally:
        del FAMILIES[kind]
    if kind == "llada":
        as_llada(folder)
    model = load_model(str(folder))
    assert model.config.full_attention and model.config.logit_shift == (kind == "Dream")
    prompt = torch.tensor([[5, 9, 40, 3, 3, 17, 8, 1]])
    everything = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    torch.testing.assert_close(model(prompt).logits, theirs(prompt, attention_mask=everything).logits, **CLOSE)

    model.get_decoder().norm.weight.mul_(0.5)
    student = export_model(model, str(folder), tmp_path / "student", block_size=2)
    assert weight_names(student) == weight_names(folder)
    config, before = (json.loads((f / "config.json").read_text()) for f in (student, folder))
    assert config == before | {"block_size": 2}
    assert torch.equal(load_model(str(student))(prompt).logits, model(prompt).logits)


def test_a_llada_that_is_no_llama_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada", "vocab_size": 64, "include_bias": True}))
    with raises_key("model.pretrained_model", "include_bias=True"):
        load_config(str(tmp_path))


# -- other models ------------------------------------------------------------------------------------------------------

TRIED = {
    "phi3": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {},
    "starcoder2": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
}


@pytest.mark.parametrize("kind", TRIED)
def test_other_models_of_transformers_decode_as_they_compute(kind):
    torch.manual_seed(0)
    config = plain_config(kind, TRIED[kind])
    model = model_class(config)._from_config(config, attn_implementation="sdpa").eval()
    for name, value in (KEYS | {"logit_shift": False}).items():
        setattr(model.config, name, value)
    prompt = torch.tensor([[5, 9, 40, 3, 3, 17, 8, 1]])
    product = model(prompt, head=lambda hidden, weight: hidden @ weight.T)
    torch.testing.assert_close(product, model(prompt).logits, **CLOSE)
    ids = SpecialIds(MASK, PAD, (STOP, PAD), (MASK,), torch.arange(60))
    answers, settings = rollouts(model, ids, temperature=0.0)
    for request in requests((1, 4, 6, 9, 2)):
        assert answers[request.id].response_ids == greedy(model, ids, request, settings)


class Toy(Family):
    model_types = {"toy": "llama"}
    block_size, mask_id, logit_shift = 2, MASK, True
    keys = {"layers": "num_hidden_layers"}
    weights = {r"^trunk\.": "model."}


def test_a_family_of_ones_own_is_a_class_that_a_setting_names(tmp_path):
    FAMILIES["toy"] = ("llama", {}, {})
    try:
        folder, theirs = published(tmp_path / "toy", "toy")
    finally:
        del FAMILIES["toy"]
    config = json.loads((folder / "config.json").read_text())
    config["layers"] = config.pop("num_hidden_layers")
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name.replace("model.", "trunk.", 1): weight for name, weight in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with raises_key("model.pretrained_model", "model_type 'toy'"):
        load_model(str(folder))
    try:
        load(SampleConfig, [f"model_base={__name__}:Toy"])
        model = load_model(str(folder))
    finally:
        families().pop("toy", None)
    assert (model.config.block_size, model.config.logit_shift) == (2, True)
    assert torch.equal(model.model.norm.weight, theirs.model.norm.weight)
    for name in ("lada", f"{__name__}:FAMILIES"):
        with raises_key("model_base", f"={name}"):
            load(SampleConfig, [f"model_base={name}"])


def test_sglang_is_refused_for_what_it_does_not_serve(tmp_path):
    folder, _ = published(tmp_path, "llama")
    config = load(SampleConfig, ["rollout.engine=sglang", "rollout.engine_urls=[http://localhost:1]"])
    with raises_key("rollout.engine", "SDAR, SDAR-MoE and LLaDA2"):
        make_engine(config, str(folder), load_tokenizer(str(folder)), rank=0)


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "mamba": ({}, "linear_attention|mamba"),
    "rwkv": ({}, "a state"),
    "qwen3_next": ({}, "linear_attention"),
    "lfm2": ({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "conv"),
    "t5": ({}, "encoder-decoder"),
    "bloom": ({}, "sdpa"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "gemma2": ({}, "softcapping|sdpa"),
    "never_heard_of": ({}, "no model of model_type"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_decode_by_blocks_is_refused_with_the_reason(kind, tmp_path):
    own, reason = REFUSED[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **own, **KEYS}))
    with raises_key("a.b") as caught:
        load_config(str(tmp_path), key="a.b")
    assert re.search(reason, str(caught.value))  # by the version of transformers


def test_a_model_without_sdpa_asks_for_flex_attention(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss", **KEYS}))
    with raises_key("model.pretrained_model", "attn_implementation=flex_attention"):
        load_model(str(tmp_path))


def test_a_sequence_longer_than_a_sliding_window_is_refused(tmp_path):
    FAMILIES["windowed"] = ("mistral", {"sliding_window": 16}, KEYS | {"model_type": "mistral"})
    try:
        folder, _ = published(tmp_path, "windowed")
    finally:
        del FAMILIES["windowed"]
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    ids = special_ids(model.config, tokenizer, model.generation_config)
    with raises_key("rollout.max_token", "16 positions"):
        rollouts(model, ids, lengths=(4,))
    answers, _ = rollouts(model, ids, lengths=(2,), max_token=12)
    assert len(answers) == 1


def test_lora_goes_to_the_familys_layers(tmp_path):
    dense = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert lora_modules(load_model(str(published(tmp_path / "a", "llama")[0]))) == dense
    moe = load_model(str(published(tmp_path / "b", "sdar_moe")[0]))
    assert lora_modules(moe) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in weight_names(tmp_path / "b")
    names = weight_names(published(tmp_path / "c", "llada2_moe")[0])
    assert {"model.word_embeddings.weight", "model.layers.1.mlp.gate.expert_bias"} < names
    assert "model.layers.0.attention.query_key_value.weight" in names

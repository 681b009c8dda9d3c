"""At block size 1 with a logit shift the block-diffusion model is the autoregressive one."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from t3d.blocks.settings import DecodeSettings
from t3d.decode.local import LocalEngine
from t3d.decode.protocol import Request
from t3d.models.loading import load_model, load_tokenizer, special_ids
from tests.conftest import MASK, PAD, STOP, raises_key
from tests.models.test_loading import word_tokenizer

PROMPTS = [torch.randint(60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 4, 9, 9, 2, 6)]


@pytest.fixture
def llama(tmp_path):
    """A Llama as transformers writes it, with an unused row for the mask."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=STOP,
        pad_token_id=PAD,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[STOP, PAD], pad_token_id=PAD).save_pretrained(tmp_path)
    word_tokenizer(pad_token="<pad>", eos_token="<stop>").save_pretrained(tmp_path)
    return tmp_path


def converted(folder, **keys):
    """The folder with the keys of block diffusion in its config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"block_size": 4, "mask_token_id": MASK} | keys))
    return folder


def test_an_autoregressive_folder_is_refused_and_can_be_asked_for(llama):
    with raises_key("a.b", "t3d convert"):
        load_model(str(llama), key="a.b")
    model = load_model(str(llama), autoregressive=True)
    assert (model.config.block_size, model.config.logit_shift) == (1, True)
    ids = torch.tensor([PROMPTS[2]])
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.allclose(model(ids).logits, theirs(ids).logits, atol=1e-5)
    converted(llama)
    assert load_model(str(llama)).config.block_size == 4 and not load_model(str(llama)).config.logit_shift
    assert load_model(str(llama), autoregressive=True).config.logit_shift


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_at_block_size_1_it_writes_what_transformers_generate_writes(llama, fused):
    """Greedy, on the engine, with lanes that are refilled and prompts that are shared."""
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    model, tokenizer = load_model(str(converted(llama, logit_shift=True))), load_tokenizer(str(llama))
    ids = special_ids(model.config, tokenizer, model.generation_config)
    assert ids.mask_id == MASK
    engine = LocalEngine.of(model, ids, max_active=3, fused_commit=fused)
    settings = DecodeSettings(block_size=1, denoising_steps_per_block=1, temperature=0.0, max_token=20)
    requests = [Request(str(i), 0, tuple(prompt)) for i, prompt in enumerate(PROMPTS)]
    ours = {answer.id: answer for answer in engine.generate(requests, settings, seed=0)}
    for request in requests:
        prompt = torch.tensor([request.prompt_ids])
        suppressed = {"suppress_tokens": list(ids.forbidden_ids), "max_new_tokens": 20, "do_sample": False}
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **suppressed)[0, prompt.shape[1] :]
        answer = ours[request.id]
        assert answer.response_ids[: answer.length] == expected.tolist()
        assert answer.steps == len(answer.response_ids)


def test_without_a_prompt_there_is_nothing_to_predict_from(llama):
    model = load_model(str(converted(llama, logit_shift=True)))
    engine = LocalEngine(model, mask_id=MASK, stop_ids=[STOP], forbidden_ids=[])
    with raises_key("prompt", "p/0"):
        list(engine.generate([Request("p", 0, ())], DecodeSettings(), seed=0))

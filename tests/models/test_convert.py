"""`t3d convert`: what it writes loads as a block-diffusion model, and at block size 1 it is the autoregressive one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from t3d.blocks.settings import DecodeSettings
from t3d.cli import dispatch
from t3d.decode.protocol import Request
from t3d.models.convert import MASK, find_mask
from t3d.models.decoder import load_decoder
from t3d.models.loading import load_model, load_tokenizer, provenance, special_ids
from tests.conftest import SHAPE, raises_key
from tests.models.test_loading import word_tokenizer

PROMPTS = [torch.randint(60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 4, 9, 6)]


def write(folder: Path, tokenizer=None, rows: int = 0, tied: bool = False, kind=(LlamaConfig, LlamaForCausalLM)) -> str:
    """An autoregressive folder as transformers writes it, of `rows` embeddings (0: as many as the tokenizer has)."""
    tokenizer = tokenizer or word_tokenizer(pad_token="<pad>", eos_token="<stop>")
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    size = {
        "vocab_size": rows or len(tokenizer),
        "tie_word_embeddings": tied,
        "eos_token_id": stop,
        "pad_token_id": pad,
    }
    kind[1](kind[0](**SHAPE, **size)).save_pretrained(folder)
    GenerationConfig(eos_token_id=stop, pad_token_id=pad).save_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    return str(folder)


def convert(source, output, *keys: str) -> Path:
    dispatch(["convert", f"model.pretrained_model={source}", f"convert.output={output}", *keys])
    return Path(output)


@pytest.mark.parametrize(
    "kind", [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)], ids=["llama", "qwen2"]
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_at_block_size_1_it_is_the_autoregressive_model(tmp_path, kind, tied):
    """The same logits, and greedily the same text as transformers' own `generate`."""
    theirs = AutoModelForCausalLM.from_pretrained(write(tmp_path / "ar", tied=tied, kind=kind))
    folder = convert(tmp_path / "ar", tmp_path / "bd", "convert.block_size=1")
    model = load_model(str(folder))
    ids = torch.tensor([PROMPTS[2]])
    assert torch.allclose(model(ids).logits[..., :63], theirs(ids).logits, atol=1e-5)

    decoder = load_decoder(str(folder), device="cpu")
    settings = DecodeSettings(block_size=1, denoising_steps_per_block=1, temperature=0.0, max_token=16)
    requests = {request.id: request for request in (Request(str(i), 0, tuple(p)) for i, p in enumerate(PROMPTS))}
    for answer in decoder.engine.generate([*requests.values()], settings, seed=0):
        prompt = torch.tensor([requests[answer.id].prompt_ids])
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=16)
        assert answer.response_ids[: answer.length] == expected[0, prompt.shape[1] :].tolist()


def test_the_folder_says_how_it_decodes_and_keeps_the_rest(tmp_path, capsys):
    folder = convert(write(tmp_path / "ar"), tmp_path / "bd", "convert.block_size=8", "convert.logit_shift=false")
    before, after = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "ar", folder))
    added = {"block_size": 8, "mask_token_id": 63, "logit_shift": False, "vocab_size": 64}
    assert after == before | added
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.mask_token, tokenizer.chat_template) == (
        MASK,
        AutoTokenizer.from_pretrained(tmp_path / "ar").chat_template,
    )
    assert (folder / "generation_config.json").read_text() == (tmp_path / "ar/generation_config.json").read_text()
    assert provenance(folder)["objective"] == "converted"
    model = load_model(str(folder))
    ids = special_ids(model.config, tokenizer, model.generation_config)
    assert (ids.mask_id, ids.stop_ids, ids.pad_id) == (63, (61,), 62)
    assert f"{MASK} = 63, a new row" in capsys.readouterr().out


def test_the_masks_row_is_the_mean_of_the_others(tmp_path):
    old = AutoModelForCausalLM.from_pretrained(write(tmp_path / "ar"))
    new = load_model(str(convert(tmp_path / "ar", tmp_path / "bd")))
    for before, after in ((old.model.embed_tokens, new.model.embed_tokens), (old.lm_head, new.lm_head)):
        assert torch.equal(after.weight[:63], before.weight)
        assert torch.allclose(after.weight[63], before.weight.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("special", "rows", "asked", "expected"),
    [
        ({"mask_token": "<mask>"}, 80, None, ("<mask>", "the tokenizer's mask token")),
        ({}, 80, None, (MASK, "a row that no token used")),
        (
            {"additional_special_tokens": ["<tool>", "<reserved_7>"]},
            0,
            None,
            ("<reserved_7>", "an unused special token"),
        ),
        ({"additional_special_tokens": ["<tool>"]}, 0, None, (MASK, "a new row")),
        ({"additional_special_tokens": ["<tool>"]}, 0, "<tool>", ("<tool>", "a special token")),
        ({}, 0, "<blank>", ("<blank>", "a new row")),
    ],
)
def test_where_the_mask_comes_from(special, rows, asked, expected):
    tokenizer = word_tokenizer(pad_token="<pad>", eos_token="<stop>", **special)
    rows = rows or len(tokenizer)
    mask = find_mask(tokenizer, rows, asked)
    assert (mask.token, mask.origin) == expected
    assert mask.id == tokenizer.mask_token_id == tokenizer.convert_tokens_to_ids(mask.token)
    assert (mask.id >= rows) == (mask.origin == "a new row")


def test_a_model_without_a_pad_token_pads_with_its_stop(tmp_path, capsys):
    write(tmp_path / "ar", word_tokenizer(eos_token="<stop>"))
    (tmp_path / "ar/generation_config.json").write_text('{"eos_token_id": 61}')
    tokenizer = load_tokenizer(str(convert(tmp_path / "ar", tmp_path / "bd")))
    assert tokenizer.pad_token == "<stop>" and "has none of its own" in capsys.readouterr().out


def test_what_cannot_be_converted_is_one_line(tmp_path):
    source = write(tmp_path / "ar")
    done = convert(source, tmp_path / "bd")
    for arguments, key in (
        ([f"model.pretrained_model={source}"], "convert.output"),
        ([f"convert.output={tmp_path}/x"], "model.pretrained_model"),
        ([f"model.pretrained_model={source}", f"convert.output={done}"], "convert.output"),
        ([f"model.pretrained_model={done}", f"convert.output={tmp_path}/x"], "model.pretrained_model"),
        (
            [f"model.pretrained_model={source}", f"convert.output={tmp_path}/x", "convert.mask_token=w3"],
            "convert.mask_token",
        ),
        ([f"model.pretrained_model={tmp_path}/no.gguf", f"convert.output={tmp_path}/x"], "model.pretrained_model"),
    ):
        with raises_key(key):
            dispatch(["convert", *arguments])
    assert not (tmp_path / "x").exists()


def test_a_model_of_block_size_1_is_autoregressive_and_gets_larger_blocks(tmp_path):
    """Trained by `sft` at block size 1, where the loss is the next token's (tests/objectives/test_sft.py)."""
    first = convert(write(tmp_path / "ar"), tmp_path / "one", "convert.block_size=1")
    model = load_model(str(convert(first, tmp_path / "four")))
    assert (model.config.block_size, model.config.mask_token_id) == (4, 63)


def test_a_gguf_file(tmp_path):
    """Written by the gguf package in llama.cpp's layout; a damaged one is one line."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    source = AutoModelForCausalLM.from_pretrained(write(tmp_path / "ar"))
    file = llama_gguf(gguf, source, load_tokenizer(str(tmp_path / "ar")), tmp_path / "tiny.gguf")
    model = load_model(str(convert(file, tmp_path / "bd", "convert.block_size=1")))
    ids = torch.tensor([PROMPTS[2]])
    assert torch.allclose(model(ids).logits[..., :63], source(ids).logits, atol=1e-4)
    assert not list(tmp_path.glob(".*"))
    file.write_bytes(file.read_bytes()[:500])
    with raises_key("model.pretrained_model"):
        convert(file, tmp_path / "other")


def llama_gguf(gguf, model: LlamaForCausalLM, tokenizer, file: Path) -> Path:
    """The model as a GGUF file of fp32 weights, with a byte-level tokenizer of as many words."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = ["a", "b", "ab", "ba", *tokenizer.convert_ids_to_tokens(range(4, config.vocab_size))]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges(["a b", "b a"])  # two: those before 5.20 read a list of one as a plain value
    writer.add_bos_token_id(tokenizer.eos_token_id)  # transformers before 5.20 cannot read a file without it
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the halves that rotate together
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("shift", "block", "label"), [("true", 1, "autoregressive"), ("true", 4, "converted"), ("false", 1, "converted")]
)
def test_evaluation_calls_it_autoregressive_where_it_is(tmp_path, shift, block, label):
    """In tables the autoregressive model has a row of its own: one token per forward, at block size 1."""
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"question": f"w{i} w{i + 1}", "ground_truth_answer": "1"} for i in range(3)]))
    folder = convert(write(tmp_path / "ar"), tmp_path / "bd", f"convert.logit_shift={shift}")
    keys = ["rollout.temperature=0", "rollout.max_token=8", f"rollout.block_size={block}"]
    output = tmp_path / "results.json"
    dispatch(
        ["eval", f"evaluation.checkpoint_path={folder}", f"evaluation.eval_dataset={questions}", *keys]
        + [f"rollout.denoising_steps_per_block={block}", f"evaluation.output={output}", "execute.num_chunk=1"]
    )
    (row,) = json.loads(output.read_text())
    assert row["method"] == label
    if block == 1:
        assert row["tokens_per_step"] == 1 and row["tokens_per_forward"] <= 1

"""Loading, special ids and export: on tiny folders of the embedded kind, and on the real SDAR configuration."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from t3d.common.errors import UserError
from t3d.common.paths import ROOT
from t3d.models import SDARConfig, SDARForCausalLM
from t3d.models import loading as loading_module
from t3d.models.loading import export_model, load_generation_config, load_model, load_tokenizer, special_ids
from tests.conftest import raises_key, tiny_model

AUTO_MAP = {
    "AutoConfig": "configuration_sdar.SDARConfig",
    "AutoModel": "modeling_sdar.SDARModel",
    "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
}


def word_tokenizer(**special):
    words = {f"w{i}": i for i in range(60)} | {"[UNK]": 60}
    special = special or {"pad_token": "<pad>", "eos_token": "<stop>", "mask_token": "<mask>"}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **special)


def sdar_folder(folder, model=None):
    """A folder as SDAR's authors release them: remote code, flex_attention, keys of old loaders, bf16 weights."""
    (model or tiny_model()).to(torch.bfloat16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    config |= {"rope_theta": 10000.0, "auto_map": AUTO_MAP, "attn_implementation": "flex_attention", "fuse": True}
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    GenerationConfig(eos_token_id=[62, 61], pad_token_id=61).save_pretrained(folder)
    for name in ("configuration_sdar.py", "modeling_sdar.py"):
        (folder / name).write_text("raise SystemExit('remote code must not run')\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("the teacher's card")
    return folder


@pytest.fixture
def teacher(tmp_path):
    return sdar_folder(tmp_path / "teacher")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -- load_model -------------------------------------------------------------------------------------------------------


def test_a_released_folder_loads_without_its_code(teacher, capfd):
    model = load_model(str(teacher))
    assert type(model) is SDARForCausalLM and not model.training
    assert model.config._attn_implementation == "sdpa" and model.dtype == torch.bfloat16
    assert load_model(str(teacher), dtype="float32", attn_implementation="eager").dtype == torch.float32
    told = capfd.readouterr()
    assert "remote" not in (told.out + told.err).lower() and "custom code" not in told.out + told.err


def test_the_real_configuration_loads_without_its_code(shared, tmp_path, capfd):
    for file in (shared / "sdar-4b-chat").iterdir():
        if "safetensors" not in file.name:
            shutil.copyfile(file, tmp_path / file.name)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    small = SDARForCausalLM(SDARConfig.from_pretrained(tmp_path)).to(torch.bfloat16)
    save_file(small.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = load_model(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert model.config._attn_implementation == "sdpa"
    assert (model.config.block_size, model.config.rope_parameters["rope_theta"]) == (4, 1000000)
    ids = special_ids(model.config, tokenizer, model.generation_config)
    assert (ids.mask_id, ids.pad_id, ids.stop_ids) == (151669, 151643, (151645, 151643))
    assert ids.forbidden_ids == tuple(range(151669, 151936))
    ordinary = set(ids.ordinary_ids.tolist())
    assert ordinary == set(range(151643)) | set(range(151657, 151669))  # <think>, <tool_call>... are not special
    told = capfd.readouterr()
    assert "custom code" not in told.out + told.err


def test_what_is_not_a_model_is_one_clear_line(teacher, tmp_path):
    with raises_key("a.b", "=nowhere"):
        load_model("nowhere", key="a.b")
    with raises_key("a.b", "=someone/nothing", "HF_HUB_OFFLINE is set"):
        load_model("someone/nothing", key="a.b")
    with raises_key("model.pretrained_model", "HF_HUB_OFFLINE is set"):
        load_tokenizer("someone/nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with raises_key("model.pretrained_model", empty, "config.json"):
        load_model(str(empty))
    other = tmp_path / "other"
    settings = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    Qwen3ForCausalLM(Qwen3Config(**settings, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(other)
    with raises_key("model.pretrained_model", "'qwen3'", "t3d convert"):
        load_model(str(other))


def test_damaged_configurations_are_told(teacher):
    file = teacher / "generation_config.json"
    for text in ('{"eos_token_id": [62', "[]"):
        file.write_text(text)
        for load in (load_model, load_generation_config):
            with raises_key("a.b", "generation_config.json"):
                load(str(teacher), key="a.b")
    file.unlink()
    assert load_generation_config(str(teacher)) is None
    assert load_model(str(teacher)).generation_config._from_model_config
    file = teacher / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": "abc"}))
    with raises_key("model.pretrained_model", teacher, "hidden_size"):
        load_model(str(teacher))


def test_damaged_weights_are_named(teacher):
    file = teacher / "model.safetensors"
    whole = load_file(file)

    def broken(weights):
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(UserError) as caught:
            load_model(str(teacher))
        return str(caught.value)

    assert "lack model.norm.weight;" in broken({k: v for k, v in whole.items() if k != "model.norm.weight"})
    assert "do not belong to it: stray.weight" in broken(whole | {"stray.weight": torch.zeros(2)})
    assert "misfit: model.norm.weight" in broken(whole | {"model.norm.weight": torch.zeros(2)})
    file.write_bytes(file.read_bytes()[:100])
    with raises_key("model.pretrained_model", teacher):
        load_model(str(teacher))


# -- special_ids ------------------------------------------------------------------------------------------------------


def test_special_ids():
    config = SDARConfig(vocab_size=70, mask_token_id=None)
    tokenizer = word_tokenizer()  # 61 words, then <stop>, <pad>, <mask> in some order
    stop, pad, mask = tokenizer.convert_tokens_to_ids(["<stop>", "<pad>", "<mask>"])
    ids = special_ids(config, tokenizer)
    assert (ids.mask_id, ids.pad_id, ids.stop_ids) == (mask, pad, (stop,))
    assert ids.forbidden_ids == tuple(sorted({mask, *range(64, 70)}))
    assert ids.ordinary_ids.tolist() == list(range(60)) and ids.ordinary_ids.dtype == torch.int64
    both = special_ids(config, tokenizer, GenerationConfig(eos_token_id=[stop, pad]))
    assert both.stop_ids == (stop, pad)
    stated = special_ids(SDARConfig(vocab_size=70, mask_token_id=5), tokenizer)
    assert stated.mask_id == 5 and 5 not in stated.ordinary_ids.tolist()


def test_missing_special_ids_are_told():
    with raises_key("mask_token_id"):
        special_ids(SDARConfig(vocab_size=70), word_tokenizer(eos_token="<stop>", pad_token="<pad>"))
    with raises_key("pad_token"):
        special_ids(SDARConfig(vocab_size=70), word_tokenizer(eos_token="<stop>", mask_token="<mask>"))
    with raises_key("eos_token_id"):
        special_ids(SDARConfig(vocab_size=70), word_tokenizer(pad_token="<pad>", mask_token="<mask>"))
    with raises_key("mask_token_id", "=99", "0..69"):
        special_ids(SDARConfig(vocab_size=70, mask_token_id=99), word_tokenizer())


# -- export_model -----------------------------------------------------------------------------------------------------


def test_an_export_is_the_teachers_folder_with_other_weights(teacher, tmp_path):
    student = load_model(str(teacher), dtype="float32")
    with torch.no_grad():
        student.model.norm.weight.add_(1.0)
    (teacher / "pytorch_model.bin").write_text("older weights")
    (teacher / ".git").mkdir()
    folder = export_model(student, str(teacher), tmp_path / "runs" / "student")
    before, after = files(teacher), files(folder)
    assert set(before) - set(after) == {"pytorch_model.bin", "README.md"} and set(after) < set(before)
    assert not (folder / ".git").exists()
    assert [name for name in after if after[name] != before[name]] == ["model.safetensors"]
    old, new = load_file(teacher / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in old.items()} == {k: (v.shape, v.dtype) for k, v in new.items()}
    assert torch.equal(new["model.norm.weight"], student.model.norm.weight.to(torch.bfloat16))
    assert [path.name for path in folder.parent.iterdir()] == ["student"]

    again = load_model(str(folder))
    assert torch.equal(again.lm_head.weight, student.lm_head.weight.to(torch.bfloat16))
    assert len(load_tokenizer(str(folder))) == 64


def test_a_students_block_size_is_the_only_change_in_its_config(teacher, tmp_path):
    student = load_model(str(teacher))
    before = json.loads((teacher / "config.json").read_text())
    folder = export_model(student, str(teacher), tmp_path / "student", block_size=8)
    after = json.loads((folder / "config.json").read_text())
    assert list(after.items()) == [(k, 8 if k == "block_size" else v) for k, v in before.items()]
    folder = export_model(student, str(teacher), tmp_path / "student", block_size=4)
    assert (folder / "config.json").read_bytes() == (teacher / "config.json").read_bytes()


def test_large_models_are_sharded_and_gathered_weights_are_taken(teacher, tmp_path, monkeypatch):
    whole_save = loading_module.save_torch_state_dict
    monkeypatch.setattr(
        loading_module, "save_torch_state_dict", lambda *a, **k: whole_save(*a, **k | {"max_shard_size": "20KB"})
    )
    student = load_model(str(teacher))
    gathered = {
        name: torch.full_like(weight, 0.5, dtype=torch.float32) for name, weight in student.state_dict().items()
    }
    folder = export_model(student, str(teacher), tmp_path / "student", state_dict=gathered)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(gathered) and len(set(index["weight_map"].values())) > 1
    assert load_model(str(folder)).model.norm.weight.eq(0.5).all()
    # A student of a sharded teacher, too, has the names of the index.
    twice = export_model(student, str(folder), tmp_path / "twice")
    assert load_model(str(twice)).dtype == torch.bfloat16


@pytest.mark.parametrize("stores_both", [False, True])
def test_tied_weights_are_stored_as_the_teacher_stores_them(tmp_path, stores_both):
    config = tiny_model().config
    config.tie_word_embeddings = True
    teacher = sdar_folder(tmp_path / "teacher", SDARForCausalLM(config))
    file = teacher / "model.safetensors"
    names = set(load_file(file))
    if stores_both:
        weights = load_file(file)
        save_file(
            weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"}
        )
        names.add("lm_head.weight")
    student = load_model(str(teacher), dtype="float32")
    folder = export_model(student, str(teacher), tmp_path / "student")
    assert set(load_file(folder / "model.safetensors")) == names
    load_model(str(folder))


def test_gathered_weights_may_be_views_of_one_padded_buffer(teacher, tmp_path):
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))  # then nothing else copies them
    student = load_model(str(teacher), dtype="float32")
    weights = student.state_dict()
    buffer, gathered, at = torch.zeros(sum(weight.numel() for weight in weights.values()) + 3), {}, 0
    for name, weight in weights.items():
        gathered[name] = buffer[at : at + weight.numel()].view_as(weight).copy_(weight)
        at += weight.numel()
    folder = export_model(student, str(teacher), tmp_path / "student", state_dict=gathered)
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items())


def test_an_older_export_stays_until_the_new_one_is_complete(teacher, tmp_path, monkeypatch):
    student = load_model(str(teacher))
    folder = export_model(student, str(teacher), tmp_path / "student")
    (folder / "mine.txt").write_text("an older export's file")
    before = files(folder)
    with monkeypatch.context() as patched:
        patched.setattr(loading_module.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            export_model(student, str(teacher), folder)
    assert files(folder) == before
    export_model(student, str(teacher), folder)
    assert set(files(folder)) == set(before) - {"mine.txt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_the_teacher_is_never_overwritten(teacher):
    with raises_key(teacher):
        export_model(load_model(str(teacher)), str(teacher), teacher)


def test_a_hub_teacher_is_completed_from_the_revision_that_was_loaded(teacher, tmp_path, monkeypatch):
    student, asked = load_model(str(teacher)), {}

    def snapshot(source, **options):
        asked.update(options, source=source)
        return str(teacher)

    monkeypatch.setattr(loading_module, "snapshot_download", snapshot)
    monkeypatch.setattr(loading_module, "try_to_load_from_cache", lambda *_: "/cache/snapshots/abc/config.json")
    folder = export_model(student, "someone/SDAR", tmp_path / "student")
    assert (asked["source"], asked["revision"]) == ("someone/SDAR", "abc")
    assert "*.safetensors" in asked["ignore_patterns"]
    assert (folder / "modeling_sdar.py").exists() and load_model(str(folder))


def test_a_cached_hub_model_loads_and_exports_offline(tmp_path):
    revision = "a" * 40
    repository = tmp_path / "hub" / "models--someone--SDAR"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    sdar_folder(repository / "snapshots" / revision)
    script = (
        "import sys; from pathlib import Path; from t3d.models.loading import export_model, load_model\n"
        "export_model(load_model('someone/SDAR'), 'someone/SDAR', Path(sys.argv[1]))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "student")], env=environment, check=True)
    assert set(files(tmp_path / "student")) == set(files(repository / "snapshots" / revision)) - {"README.md"}

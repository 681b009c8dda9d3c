"""Folders and hub ids that are no model, and what the one line about them names."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from t3d.common.errors import UserError, disk_faults_as_user_errors
from t3d.common.jsonfiles import atomic_folder
from t3d.models.fingerprint import weights_fingerprint
from t3d.models.loading import export_model, load_model, load_tokenizer, located, provenance
from tests.conftest import ROOT, largest_file, raises_key, tiny_model


@pytest.fixture
def model_folder(tmp_path):
    def make(path):
        tiny_model().save_pretrained(tmp_path / path)
        return tmp_path / path

    return make


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        load_tokenizer(str(folder), key="evaluation.checkpoint_path")
    with pytest.raises(UserError) as same:
        load_model(str(folder), key="evaluation.checkpoint_path")
    assert error.value.key == "evaluation.checkpoint_path" and str(error.value) == str(same.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def adapter(story_teacher, tmp_path, monkeypatch):
    """Makes a LoRA adapter's folder as PEFT saves it, far from zero; with the weights that it should give."""
    monkeypatch.setenv("T3D_CACHE_ROOT", str(tmp_path / "cache"))

    def make(base=story_teacher, targets=("q_proj", "down_proj")):
        model = load_model(str(story_teacher))
        torch.manual_seed(3)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))
        folder = tmp_path / "my-adapter"
        adapted.save_pretrained(folder)
        named = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
        (folder / "adapter_config.json").write_text(json.dumps(named))
        return folder, adapted.merge_and_unload().state_dict()

    return make


def test_an_adapter_is_merged_into_its_base(adapter, story_teacher):
    folder, expected = adapter()
    before = weights_fingerprint(str(folder))
    for name, weight in load_model(str(folder)).state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(story_teacher)).get_vocab()
    assert provenance(folder) == {"objective": "adapter", "teacher": str(story_teacher)}
    merged = Path(located(str(folder)))
    assert merged.name == "my-adapter" and located(str(folder)) == str(merged), "made once"
    assert provenance(merged) == provenance(folder)
    assert weights_fingerprint(str(folder)) == before
    config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert weights_fingerprint(str(folder)) != before and Path(located(str(folder))) != merged


def test_an_adapter_of_another_model_is_refused(adapter):
    folder, _ = adapter(base=ROOT / "models/embedded-teacher")
    with raises_key("evaluation.checkpoint_path"):
        load_model(str(folder), key="evaluation.checkpoint_path")


def test_an_adapter_with_weights_of_other_layers_is_refused(adapter):
    folder, _ = adapter()
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with raises_key("model.pretrained_model", folder):
        load_model(str(folder))


def test_an_adapter_without_its_base_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("T3D_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "JetLM/SDAR-4B-Chat"}))
    assert "an adapter of JetLM/SDAR-4B-Chat" in refusal(tmp_path)


def test_the_hubs_cache_names_the_id_and_the_snapshot(model_folder):
    snapshot = model_folder("models--JetLM--SDAR-4B-Chat/snapshots/abc")
    assert f"give JetLM/SDAR-4B-Chat, or {snapshot}" in refusal(snapshot.parents[1])
    assert load_model(str(snapshot))


def test_a_runs_folders_name_the_trained_model(model_folder):
    student = model_folder("run/ckpt/optimized")
    run = student.parents[1]
    (run / "log.jsonl").write_text("")
    (run / "checkpoints" / "checkpoint-00000002").mkdir(parents=True)
    for folder in (run, run / "ckpt", run / "checkpoints", run / "checkpoints" / "checkpoint-00000002"):
        said = refusal(folder)
        assert f"training run {run}" in said and f"give {student}" in said
    assert load_model(str(student))


def test_a_folder_of_models_names_them(model_folder):
    first, second = model_folder("all/first"), model_folder("all/second")
    assert refusal(first.parent).endswith(f"give {first} or {second}")


def test_a_folder_without_a_config_is_named_for_it(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert "no config.json" in refusal(tmp_path)


def test_a_full_disk_leaves_the_export_before_and_no_parts(model_folder, tmp_path):
    source = model_folder("teacher")
    student = export_model(load_model(str(source)), str(source), tmp_path / "out" / "student")
    before = (student / "model.safetensors").read_bytes()
    with raises_key(student), disk_faults_as_user_errors(student), largest_file(5000):
        export_model(load_model(str(source)), str(source), student)
    assert (student / "model.safetensors").read_bytes() == before and list((tmp_path / "out").iterdir()) == [student]


def test_an_error_between_the_renames_keeps_the_folder_before(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    with pytest.raises(OSError), atomic_folder(tmp_path / "model") as fresh:
        shutil.rmtree(fresh)  # so that its rename fails
    assert [file.read_text() for file in tmp_path.glob(".old-model/*")] == ["old"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_with_its_module_loads_and_exports(model_folder, tmp_path, key):
    folder = model_folder("teacher")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config | {key: "torch.bfloat16"}))
    model = load_model(str(folder))
    assert str(model.dtype) == "torch.bfloat16"
    assert str(load_model(str(export_model(model, str(folder), tmp_path / "student"))).dtype) == "torch.bfloat16"


# -- hub ids ----------------------------------------------------------------------------------------------------------


class EmptyHub(http.server.BaseHTTPRequestHandler):
    """A hub without models."""

    def do_HEAD(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def from_hub(tmp_path, port: int) -> str:
    """What loading a hub's model says, in a process of its own, which must not take long."""
    script = """
import time
from t3d.common.errors import UserError, disk_faults_as_user_errors
from t3d.models.loading import load_config, load_tokenizer
began = time.monotonic()
for load in (load_tokenizer, load_config):
    try:
        load("someone/SDAR", key="evaluation.checkpoint_path")
    except UserError as error:
        print(error)
assert time.monotonic() - began < 10
"""
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    removed = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}
    environment = {name: value for name, value in os.environ.items() if name not in removed} | hub
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == second and first.startswith("evaluation.checkpoint_path=someone/SDAR: ")
    return first


def test_without_a_connection_a_hub_id_is_refused_within_seconds(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        closed = server.server_port
    assert "the hub cannot be reached (127.0.0.1: Connection refused)" in from_hub(tmp_path, closed)


def test_a_model_that_the_hub_does_not_have_is_named(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert "the hub has no such model" in from_hub(tmp_path, server.server_port)
        server.shutdown()

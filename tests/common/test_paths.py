import os
from pathlib import Path

from t3d.common import paths
from t3d.common.paths import ROOT
from tests.conftest import raises_key


def test_root_is_the_repository():
    assert (ROOT / "t3d" / "common" / "paths.py").is_file()


def test_resolve_from_root_and_from_a_subfolder(monkeypatch):
    expected = ROOT / "configs" / "eval.yaml"
    monkeypatch.chdir(ROOT)
    assert paths.resolve("configs/eval.yaml") == expected
    monkeypatch.chdir(ROOT / "configs" / "demo")
    assert paths.resolve("configs/eval.yaml") == expected
    assert paths.resolve("../eval.yaml") == expected
    assert paths.resolve(expected) == expected


def test_resolve_prefers_the_current_folder(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "eval.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert paths.resolve("configs/eval.yaml") == tmp_path / "configs" / "eval.yaml"


def test_relative_paths_belong_to_the_checkout_inside_it_and_to_the_current_folder_elsewhere(monkeypatch, tmp_path):
    for folder, home in ((ROOT, ROOT), (ROOT / "sample", ROOT), (tmp_path, tmp_path)):
        monkeypatch.chdir(folder)
        assert paths.workspace() == home
        assert paths.output("p/results") == home / "p" / "results"
        assert paths.rollout_stem("demo", "m", "d").parent == home / "demo" / "temp_data"
        assert paths.run_root("runs", "m", "math", "p") == home / "runs" / "m" / "math" / "p"
        assert paths.data_file("MATH_train") == home / "data" / "MATH_train.json"
        assert paths.resolve("nowhere/x.json") == home / "nowhere" / "x.json"
    assert paths.output("/absolute") == Path("/absolute")


def test_the_shipped_configurations_are_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/eval.yaml", "accelerate_configs/cpu.yaml"):
        assert paths.resolve(name) == ROOT / name
    installed = tmp_path / "site-packages" / "t3d"
    (installed / "configs").mkdir(parents=True)
    (installed / "configs" / "eval.yaml").write_text("")
    monkeypatch.setattr(paths, "PACKAGE", installed)
    monkeypatch.setattr(paths, "ROOT", installed.parent)
    assert paths.resolve("configs/eval.yaml") == installed / "configs" / "eval.yaml"
    assert paths.resolve("t3d") == tmp_path / "t3d"  # nothing else of the installation is an input


def test_data_file(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT / "train")
    assert paths.data_file("MATH_train") == ROOT / "data" / "MATH_train.json"
    assert paths.data_file("SDAR-1.7B-Chat-GSM8K_renamed") == ROOT / "data" / "SDAR-1.7B-Chat-GSM8K_renamed.json"
    assert paths.data_file("mine.jsonl") == ROOT / "mine.jsonl"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    assert paths.data_file("./shards") == tmp_path / "shards"
    assert paths.data_file(tmp_path / "x.json") == tmp_path / "x.json"


def test_rollout_files_keep_dots_in_names(monkeypatch):
    monkeypatch.chdir(ROOT)
    stem = paths.rollout_stem("demo", "JetLM/SDAR-1.7B-Chat", "MATH_train")
    assert stem == ROOT / "demo" / "temp_data" / "outputs-eval-SDAR-1.7B-Chat-MATH_train"
    assert paths.json_file(stem).name == "outputs-eval-SDAR-1.7B-Chat-MATH_train.json"
    stem = paths.rollout_stem("/elsewhere", "/models/SDAR-4B-Chat/", "data/MATH_train.json", num_node=2, node_index=1)
    assert stem == Path("/elsewhere/temp_data/outputs-1-eval-SDAR-4B-Chat-MATH_train")


def test_names_of_data_sets_keep_their_dots():
    for given in ("Story.v1", "sets/Story.v1", "sets/Story.v1.json", "Story.v1.jsonl", "/x/Story.v1.parquet"):
        assert paths.data_name(given) == "Story.v1"


def test_run_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert paths.run_root("experiments", "JetLM/SDAR-4B-Chat", "math", "p") == ROOT / "experiments/SDAR-4B-Chat/math/p"


def test_model_source(tmp_path):
    assert paths.model_source(str(tmp_path)) == str(tmp_path)
    assert paths.model_source("JetLM/SDAR-4B-Chat") == "JetLM/SDAR-4B-Chat"
    for wrong in ("nothing-here", "/no/such/folder", "configs/no-model", "a/b/c", "./x"):
        with raises_key("model.pretrained_model", wrong):
            paths.model_source(wrong, "model.pretrained_model")


def test_setup_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("T3D_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/kept")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert paths.setup_cache() == tmp_path
    assert os.environ["TRITON_CACHE_DIR"] == "/kept"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")
    monkeypatch.delenv("T3D_CACHE_ROOT")
    assert paths.setup_cache() == Path.home() / ".cache" / "t3d"

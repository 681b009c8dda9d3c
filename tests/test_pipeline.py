"""The five commands one after another, with the shipped configurations, on a tiny model: from questions to a score."""

import json
import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT, launch_line


@pytest.fixture
def start(monkeypatch, cache_aside):
    def call(folder: str, *line: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(line, cwd=ROOT / folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return call


def test_the_five_commands(tmp_path, start, story_teacher, story_questions):
    python, data = sys.executable, tmp_path / "data" / "Story.json"
    said = start(
        *("data", python, "download_data.py", "--dataset", "GSM8K", "--from", str(story_questions)),
        *("--output", str(data)),
    )
    assert "rows: 24" in said and data.read_bytes() == story_questions.read_bytes()

    start(
        *("sample", python, "sdar_sample.py", "config=configs/sdar_sample.yaml", f"experiment.project={tmp_path}"),
        *(f"evaluation.checkpoint_path={story_teacher}", f"evaluation.eval_dataset={data}", "evaluation.limit=20"),
        *("evaluation.data_type=math", "rollout.block_size=4", "rollout.denoising_steps_per_block=4"),
        *("rollout.max_token=20", "rollout.temperature=0.1", "rollout.top_p=1.0", "rollout.top_k=0"),
        "rollout.remasking_strategy=low_confidence_static",
    )
    assert (tmp_path / "temp_data" / "outputs-eval-tiny-teacher-Story.json").is_file()

    renamed = tmp_path / "data" / "tiny-teacher-Story_renamed.json"
    said = start(
        *(".", python, "data/rename_key.py", "--model_name", "tiny-teacher", "--dataset", "Story"),
        *("--project", str(tmp_path), "--output", str(renamed)),
    )
    assert "kept: 20 responses in 20 rows" in said and "left out: 0 invalid" in said
    assert len(json.loads(renamed.read_text())) == 20

    train = launch_line("cpu.yaml", "self_ddo_sdar_full.py", "config=configs/ddo_sdar_full_self.yaml")
    said = start(
        *("train", *train, f"model.pretrained_model={story_teacher}", f"dataset.optimization_data={renamed}"),
        *(f"experiment.output_root={tmp_path / 'experiments'}", "training.gradient_accumulation_steps=4"),
        *("training.max_steps=3", "optimizer.params.learning_rate=1e-3"),
    )
    (run,) = (tmp_path / "experiments" / "tiny-teacher" / "math" / "ddo_sdar_full_self").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)
    student = run / "ckpt" / "optimized"
    assert f"trained model: {student}" in said
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    before, after = (load_file(folder / "model.safetensors") for folder in (story_teacher, student))
    assert (before["lm_head.weight"] != after["lm_head.weight"]).any()

    for method, checkpoint in (("original", story_teacher), ("t3d", student)):
        said = start(
            *(".", python, "eval.py", "config=configs/eval.yaml", f"evaluation.checkpoint_path={checkpoint}"),
            *(f"evaluation.eval_dataset={data}", "evaluation.data_type=math", "rollout.block_size=4"),
            *("rollout.denoising_steps_per_block=1", "rollout.temperature=0.1", "rollout.max_token=20"),
            *(f"experiment.project={tmp_path}", f"evaluation.method={method}"),
        )
        (output,) = (tmp_path / "results").glob(f"{method}-*.json")
        (row,) = json.loads(output.read_text())
        assert row["method"] == method and row["n"] == 24 and row["tokens_per_step"] == 4
        assert 0 <= row["ci_low"] <= row["accuracy"] <= row["ci_high"] <= 1
        assert str(output) in said and "Tokens/step" in said

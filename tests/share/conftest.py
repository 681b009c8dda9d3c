"""A student as a training leaves it: its run's configuration and log, its model folder, and results."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from t3d.common import options
from t3d.models.loading import export_model, load_model
from t3d.training.settings import TrainConfig


class Trained(NamedTuple):
    teacher: Path
    run: Path
    student: Path
    results: Path


LOG = [  # 3 steps, 12 sequences, 600 tokens in 6 seconds
    {"step": 1, "epoch": 0, "loss": 2.0, "sequences": 4, "skipped": 0, "tokens": 100.0, "tokens_per_second": 50.0},
    {"step": 2, "epoch": 0, "loss": 1.5, "sequences": 3, "skipped": 1, "tokens": 200.0, "tokens_per_second": 100.0},
    {"step": 3, "epoch": 1, "loss": 1.0, "sequences": 5, "skipped": 0, "tokens": 300.0, "tokens_per_second": 150.0},
]
CARD = (
    "---\nlicense: other\nlicense_name: own-terms\nlicense_link: https://example.org/terms\n---\n\nthe teacher's card\n"
)


def row(model: Path, method: str, steps: int, accuracy: float, **more) -> dict:
    return {
        "method": method, "model": str(model), "dataset": "MATH500", "strategy": "low_confidence_static",
        "block_size": 4, "denoising_steps_per_block": steps, "tokens_per_step": 4 / steps, "accuracy": accuracy,
        "ci_low": accuracy - 0.1, "ci_high": accuracy + 0.05, "tokens_per_forward": 3.25, "tokens_per_second": 812.0,
        "seconds": 20.5, "seed": 1, "n": 100, "questions": 100, **more,
    }  # fmt: skip


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, story_teacher, story_trajectories) -> Path:
    home = tmp_path_factory.mktemp("share")
    teacher = home / "teacher"
    shutil.copytree(story_teacher, teacher)
    (teacher / "README.md").write_text(CARD)
    run = home / "experiments" / "teacher" / "math" / "mine" / "first"
    model = load_model(str(teacher))
    made_by = {"objective": "t3d", "project": "mine", "run": "first", "step": 3, "teacher": str(teacher)}
    export_model(model, str(teacher), run / "ckpt" / "optimized", made_by=made_by)
    line = [
        f"model.pretrained_model={teacher}",
        f"dataset.optimization_data={story_trajectories}",
        "experiment.project=mine",
        "training.block_size=4",
        "training.beta=0.07",
    ]
    options.save(options.load(TrainConfig, line), run / "config.yaml")
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in LOG))
    student = run / "ckpt" / "optimized"
    rows = [row(student, "t3d", 4, 0.8), row(student, "t3d", 1, 0.7), row(teacher, "original", 1, 0.25)]
    rows.append(row(home / "stranger", "sft", 1, 0.99))
    (home / "results.json").write_text(json.dumps(rows))
    return home


@pytest.fixture
def trained(trained_once, tmp_path) -> Trained:
    """Files of one's own: the student, in its run's folder."""
    old, run = trained_once / "experiments", tmp_path / "experiments" / "teacher" / "math" / "mine" / "first"
    shutil.copytree(old, tmp_path / "experiments")
    return Trained(trained_once / "teacher", run, run / "ckpt" / "optimized", trained_once / "results.json")

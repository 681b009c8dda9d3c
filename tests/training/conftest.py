"""A small training run in this process, and ways to look at what it left."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from t3d.common.options import load
from t3d.states.base import State
from t3d.training.loop import Trainer, train
from t3d.training.settings import TrainConfig
from t3d.training.tracking import Tracker
from tests.conftest import ROOT, launch_line, reset_accelerator

VOLATILE = {"tokens_per_second"}


@pytest.fixture
def overrides(tmp_path, story_teacher, story_trajectories):
    """The command line of a small training run of a given name."""

    def line(name: str, *more: str) -> list[str]:
        t3d = not any(item.startswith("training.objective=") for item in more)
        return [
            f"experiment.output_root={tmp_path}",
            "experiment.project=p",
            f"experiment.run_name={name}",
            f"model.pretrained_model={story_teacher}",
            f"dataset.optimization_data={story_trajectories}",
            "training.batch_size_lm=4",
            "training.gradient_accumulation_steps=1",
            "training.gradient_checkpointing_enable=false",
            "training.mixed_precision=no",
            "training.max_steps=6",
            *(["training.round_interval=2"] if t3d else []),  # an error where nothing reads it
            "optimizer.params.learning_rate=2e-3",
            "lr_scheduler.params.warmup_steps=2",
            *more,
        ]

    return line


@pytest.fixture
def run(overrides):
    """Train in this process; the run's folder."""

    def call(name: str, *more: str) -> Path:
        reset_accelerator()
        return train(load(TrainConfig, overrides(name, *more)))

    return call


def log_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a step is missing or there twice"
    return rows


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in log_of(run)]


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in VOLATILE} for row in rows]


def weights(run: Path, name: str = "optimized") -> dict[str, torch.Tensor]:
    return load_file(run / "ckpt" / name / "model.safetensors")


def assert_close(mine: Path, other: Path, rel: float, weight_atol: float, but: set[str] = frozenset()) -> None:
    """The same log to a relative tolerance, and the same weights."""
    for a, b in zip(log_of(mine), log_of(other), strict=True):
        for name in a.keys() - VOLATILE - but:
            assert a[name] == pytest.approx(b[name], rel=rel, abs=rel), f"{name} of step {a['step']}"
    first, second = weights(mine), weights(other)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=weight_atol)


class Stopped(Exception):
    pass


@pytest.fixture
def after_step(monkeypatch):
    """``after_step(number, act)``: act once, right after the step of this number was logged."""
    acts: dict[int, Callable[[], None]] = {}
    original = Tracker.log

    def log(tracker, metrics, number):
        original(tracker, metrics, number)
        acts.pop(number, lambda: None)()

    monkeypatch.setattr(Tracker, "log", log)
    return acts.__setitem__


@pytest.fixture
def stop_after(after_step):
    """Let training fail right after a step was logged, as a full disk or a lost node would."""

    def stop() -> None:
        raise Stopped

    return lambda number: after_step(number, stop)


@pytest.fixture
def resumes_to_the_bit(run, stop_after):
    """Run, and run again with a stop after a step: the same log, and the same weights in all that is exported."""

    def check(stop: int, *more: str) -> None:
        whole = run("whole", *more)
        stop_after(stop)
        with pytest.raises(Stopped):
            run("stopped", *more, "experiment.resume=auto")
        resumed = run("stopped", *more, "experiment.resume=auto")
        assert without_times(log_of(resumed)) == without_times(log_of(whole))
        for path in (whole / "ckpt").iterdir():
            for name, weight in weights(whole, path.name).items():
                assert torch.equal(weight, weights(resumed, path.name)[name]), f"{path.name}: {name}"

    return check


class Drawn(NamedTuple):
    """What an optimizer step trains on: (epoch, sample) pairs, the samples as the objective gets them, their states."""

    step: int
    indices: list[tuple[int, int]]
    samples: list[dict]
    states: list[State]


@pytest.fixture
def drawn(monkeypatch) -> list[Drawn]:
    """All that training in this process draws, step by step."""
    steps: list[Drawn] = []
    original = Trainer.draw_states

    def draw_states(trainer, step):
        indices = trainer.local_indices(step)
        samples = [trainer.samples[index] for _, index in indices]
        steps.append(Drawn(step, indices, samples, original(trainer, step)))
        return steps[-1].states

    monkeypatch.setattr(Trainer, "draw_states", draw_states)
    return steps


def launch(config: str | Path, *line: str) -> None:
    command = launch_line(config, "train/self_ddo_sdar_full.py", *line)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

"""The tables: every run's command lines as the schemas take them, and what is run (the page: tests/scores/study)."""

import argparse
import json
from pathlib import Path

import pytest

import tables
from t3d.config import EvalConfig, TrainConfig, load
from t3d.errors import UserError

from .study.figures import run


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("name", [*tables.METHODS, *tables.ABLATIONS])
def test_every_run_is_a_valid_command(name, block, tmp_path):
    args = argparse.Namespace(rollouts=100, steps=7, problems=9, output=tmp_path, processes=2)
    if tables.METHODS.get(name, (True,))[0]:
        line = tables.train_line(name, Path("x.json"), "models/embedded-teacher", block, 5, args, tmp_path)
        config = load(TrainConfig, line)
        assert (config.training.block_size, config.training.max_steps, config.training.seed) == (block, 7, 5)
        assert config.dataset.limit == 100 and config.optimizer.params.learning_rate == 5e-4
        assert config.training.batch_size_lm * config.training.gradient_accumulation_steps == 16
    settings = [load(EvalConfig, line) for line in tables.evaluation_lines(name, "x", tmp_path, block, 5, args)]
    static = [config.rollout.denoising_steps_per_block for config in settings[:-1]]
    assert static == [4, 2, 1] * 2 if block == 4 else static == [8, 4, 2, 1] * 2
    assert settings[-1].rollout.remasking_strategy == "low_confidence_dynamic"
    assert {config.rollout.block_size for config in settings} == {block}


def test_every_run_has_a_file_of_its_own():
    names = [*tables.METHODS, *tables.ABLATIONS]
    files = {tables.figures_file(name, block, seed) for name in names for block in (4, 8) for seed in (1, 2)}
    assert len(files) == 4 * len(names)


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    """And what is new is run, then the page written from both."""
    monkeypatch.setattr(tables, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(tables, "command", lambda *line: None)
    done: list[tuple] = []

    def run_one(name, block, seed, args):
        done.append((name, block, seed))
        tables.figures_file(name, block, seed).write_text(json.dumps(run(name, seed, (0.5, 0.5, 0.5))))

    monkeypatch.setattr(tables, "run_one", run_one)
    (tmp_path / "figures").mkdir()
    tables.figures_file("original", 4, 1).write_text(json.dumps(run("original", 1, (0.9, 0.6, 0.2))))
    line = ["tables.py", "--methods", "original;t3d", "--seeds", "1,2", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", line)
    tables.main()
    assert done == [("t3d", 4, 1), ("original", 4, 2), ("t3d", 4, 2)]
    tables.main()
    assert len(done) == 3 and "| t3d | 50.0 ± 0.0 |" in (tmp_path / "RESULTS.md").read_text()
    monkeypatch.setattr("sys.argv", [*line, "--methods", "t4d"])
    with pytest.raises(UserError, match="--methods t4d: not known"):
        tables.main()

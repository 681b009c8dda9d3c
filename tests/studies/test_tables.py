"""The tables: every run's command lines as the schemas take them, and what is run (the page: tests/scores/study)."""

import argparse
import json
from pathlib import Path

import pytest

from studies.domains import DOMAINS
from studies.storymath import tables
from t3d.common.options import load
from t3d.evaluation.settings import EvalConfig
from t3d.training.settings import TrainConfig
from tests.conftest import raises_key
from tests.studies.figures import run

MATH = DOMAINS["StoryMath"]


@pytest.mark.parametrize("domain, block", [("StoryMath", 4), ("StoryMath", 8), ("StoryCode", 16)])
@pytest.mark.parametrize("name", [name for name in tables.ROWS if name != tables.AUTOREGRESSIVE])
def test_every_run_is_a_valid_command(name, domain, block, tmp_path):
    kind = DOMAINS[domain].data_type
    args = argparse.Namespace(
        rollouts=100, steps=7, problems=9, output=tmp_path, processes=2, docs=tmp_path, domain=DOMAINS[domain]
    )
    if tables.ROWS[name].config:
        line = tables.train_line(name, Path("x.json"), "models/embedded-teacher", block, 5, args, tmp_path)
        config = load(TrainConfig, line)
        longer = name.endswith((", again", ", longer"))
        steps, questions = (1200 if "opdlm" in name else 2400, 20000) if longer else (7, 100)
        assert (config.training.block_size, config.training.max_steps, config.training.seed) == (block, steps, 5)
        # the published rates of adapters and of all weights, scaled alike; rewards are noisier than answers
        rate = {"dparallel": 1e-3, "best, then trace_rl": 1e-4, "best, then trace_rl, graded": 1e-4}.get(name, 5e-4)
        if name.startswith("converted") and not name.endswith("t3d"):
            rate = 2e-3  # further from their goal
        assert config.dataset.data_type == kind
        assert config.dataset.limit == questions and config.optimizer.params.learning_rate == rate
        assert config.training.batch_size_lm * config.training.gradient_accumulation_steps == 16
    settings = [load(EvalConfig, line) for line in tables.evaluation_lines(name, "x", tmp_path, block, 5, args)]
    static = [config.rollout.denoising_steps_per_block for config in settings[:-1]]
    assert static == [block >> k for k in range(block.bit_length())] * 2
    assert {config.evaluation.data_type for config in settings} == {kind}
    assert settings[-1].rollout.remasking_strategy == "low_confidence_dynamic"
    assert {config.rollout.block_size for config in settings} == {block}


def test_every_run_has_a_file_of_its_own():
    names = list(tables.ROWS)
    both = [argparse.Namespace(docs=Path(), domain=domain) for domain in DOMAINS.values()]
    runs = [(block, seed, args) for block in (4, 8) for seed in (1, 2) for args in both]
    assert len({tables.figures_file(name, *run) for name in names for run in runs}) == 8 * len(names)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """tables.main with arguments, its runs and commands noted in place of done: () -> what was run since."""
    (tmp_path / "results" / "tables").mkdir(parents=True)
    done: list[tuple] = []
    monkeypatch.setattr(tables, "command", lambda *line: done.append(line))

    def run_one(name, block, seed, args):
        done.append((name, block, seed))
        leave_figures(name, block, seed, args)

    monkeypatch.setattr(tables, "run_one", run_one)

    def main(*line: str) -> list[tuple]:
        done.clear()
        monkeypatch.setattr("sys.argv", ["tables.py", *line, "--output", str(tmp_path), "--docs", str(tmp_path)])
        tables.main()
        return [one for one in done if "studies.storymath" not in one]

    return main


def leave_figures(name, block, seed, args):
    speeds = [0.5] * block.bit_length()
    figures = run(name, seed, speeds, block=block) | tables.made_with(name, args)
    tables.figures_file(name, block, seed, args).write_text(json.dumps(figures))


def test_the_row_after_another_starts_from_its_student(tmp_path, monkeypatch):
    """ReDi: the student of stage 0 is decoded for the couplings, and is what training starts from."""
    done: list[tuple] = []

    def command(*line):
        done.append(line)
        given = dict(part.split("=", 1) for part in line if "=" in part)
        if "experiment.output_root" in given:
            source = Path(given["model.pretrained_model"]).name
            run = Path(given["experiment.output_root"]) / source / "math" / "run" / "run"
            run.mkdir(parents=True)
            (run / "log.jsonl").write_text(json.dumps({"tokens": 3.0}) + "\n")

    monkeypatch.setattr(tables, "command", command)
    args = argparse.Namespace(
        output=tmp_path, steps=7, rollouts=9, problems=None, processes=1, docs=tmp_path, domain=MATH
    )
    student, budget = tables.train("redi", 4, 1, args)
    first = tables.model_folder("redi, stage 0", 4, 1, args) / "embedded-teacher/math/run/run/ckpt/optimized"
    rollouts, names, stage_0, couplings, more_names, rectified = done
    assert "evaluation.checkpoint_path=models/embedded-teacher" in rollouts
    assert "rollout.random_init_ratio=0.7" not in rollouts and "training.random_start_ratio=0.7" in stage_0
    assert {f"evaluation.checkpoint_path={first}", "rollout.random_init_ratio=0.7"} <= set(couplings)
    assert f"model.pretrained_model={first}" in rectified and not any("random_start" in part for part in rectified)
    assert Path(student) == tables.model_folder("redi", 4, 1, args) / "optimized/math/run/run/ckpt/optimized"
    assert budget == {"learning_rate": 5e-4, "tokens": 3.0}
    assert tables.made_with("redi", args)["after"] == tables.made_with("redi, stage 0", args)


def test_finished_runs_are_not_run_again(in_folder, tmp_path):
    """And what is new is run, then the page written from both."""
    line = ["--methods", "original;t3d", "--seeds"]
    assert in_folder(*line, "1") == [("original", 4, 1), ("t3d", 4, 1)]
    assert in_folder(*line, "1,2") == [("original", 4, 2), ("t3d", 4, 2)]
    assert in_folder(*line, "1,2") == []
    assert "| t3d | 50.0 ± 0.0 |" in (tmp_path / "RESULTS.md").read_text()


def test_figures_of_another_budget_are_told(in_folder, monkeypatch):
    """What nothing was trained for has no steps. An override that was changed since is another run too."""
    line = ["--methods", "original;t3d", "--seeds", "1"]
    in_folder(*line)
    for key, more in {"steps": "300", "rollouts": "80", "problems": "7"}.items():
        told = {"rollouts": "questions"}.get(key, key)
        with raises_key(told, more, "json was made with"):
            in_folder(*line, f"--{key}", more)
    assert in_folder("--methods", "original", "--seeds", "1", "--steps", "300") == []
    monkeypatch.setitem(tables.ROWS, "t3d", tables.ROWS["t3d"]._replace(training=("training.alpha=9",)))
    with raises_key("training", "t3d-block4-seed1.json"):
        in_folder(*line)


def test_what_another_process_has_in_hand_is_left_to_it(in_folder, tmp_path, capsys):
    args = argparse.Namespace(output=tmp_path, steps=600, rollouts=4000, docs=tmp_path, domain=MATH)
    in_folder("--methods", "original", "--seeds", "1")
    with tables.claimed(tables.model_folder("t3d", 4, 1, args)) as ours:
        assert ours
        assert in_folder("--methods", "t3d", "--seeds", "1") == []
        assert "another process works on it" in capsys.readouterr().out
    assert in_folder("--methods", "t3d", "--seeds", "1") == [("t3d", 4, 1)]


def test_an_analysis_without_its_student_is_told_and_nothing_is_trained_for_it(in_folder, capsys):
    in_folder("--methods", "original", "--seeds", "1")
    assert in_folder("--analysis", "--blocks", "8", "--seeds", "1") == []
    assert "best, block 8, seed 1: no student below" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, told",
    [
        (["--seeds", "abc"], "abc: give a whole number of at least 1"),
        (["--seeds", "1,,2"], ": give a whole number of at least 1"),
        (["--seeds", "1,1"], "1,1: give each once"),
        (["--domain", "StoryPoem"], "StoryPoem: give one of StoryMath, StoryCode"),
        (["--blocks", "3"], "3: blocks of 2, 4, 8"),
        (["--blocks", "1"], "1: blocks of 2, 4, 8"),
        (["--steps", "0"], "0: give a whole number of at least 1"),
        (["--problems", "-3"], "-3: give a whole number of at least 1"),
    ],
)
def test_a_number_that_cannot_be_is_told(in_folder, capsys, line, told):
    with pytest.raises(SystemExit) as stopped:
        in_folder(*line)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_a_domain_without_its_teacher_says_how_to_make_it(in_folder, monkeypatch, capsys):
    monkeypatch.setitem(DOMAINS, "StoryCode", DOMAINS["StoryCode"]._replace(teacher="models/none"))
    with pytest.raises(SystemExit):
        in_folder("--domain", "StoryCode", "--methods", "original")
    assert "make teacher OF=storycode" in capsys.readouterr().err


def test_a_domain_without_an_autoregressive_model(in_folder, monkeypatch):
    monkeypatch.setitem(DOMAINS, "StoryCode", DOMAINS["StoryCode"]._replace(teacher="models/embedded-teacher"))
    with raises_key("--methods", "StoryCode"):
        in_folder("--domain", "StoryCode", "--methods", "converted")


@pytest.mark.parametrize("also", [[], ["--page"], ["--analysis"]])
def test_a_method_that_is_none_is_told(in_folder, also):
    with raises_key("--methods", "t4d"):
        in_folder("--methods", "t3d;t4d", *also)

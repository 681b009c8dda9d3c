"""On-policy refresh: the student's own trajectories, by the decoder of stage 1, in place of the teacher's."""

import errno
import os
import shutil
import signal

import pytest
import torch
from datasets import Dataset

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.special_ids import SpecialIds
from t3d.common.errors import Interrupted
from t3d.common.options import load
from t3d.data.shards import ShardWriter, read_shards
from t3d.data.trajectory import Trajectory
from t3d.decode.local import LocalEngine
from t3d.decode.protocol import Request
from t3d.models.loading import load_model, load_tokenizer, special_ids
from t3d.training import onpolicy
from t3d.training.loop import make_objective
from t3d.training.settings import TrainConfig
from tests.conftest import raises_key
from tests.training.conftest import (
    Drawn,
    assert_close,
    launch,
    log_of,
    without_times,
)

pytestmark = pytest.mark.usefixtures("cache_aside")

REFRESH = ("training.refresh_rollouts=2", "training.max_gen_length=24", "training.refresh_temperature=0.7")


def rounds(folder) -> list[int]:
    return sorted(int(path.name) for path in (folder / "rollouts").iterdir())


def by_step(drawn: list[Drawn]) -> dict[int, dict[str, dict]]:
    """Every step's samples, by their ids."""
    return {step.step: {sample["id"]: sample for sample in step.samples} for step in drawn}


def test_the_students_own_decoding_takes_the_teachers_place(run, drawn):
    """After steps 2 and 4, exactly what the checkpoint of that step decodes, for the questions that the steps see."""
    folder = run("fresh", *REFRESH, "experiment.save_every_steps=2")
    seen = by_step(drawn)
    assert rounds(folder) == [2, 4] and len(log_of(folder)) == 6
    for step in (2, 4):
        student = folder / "ckpt" / f"optimized-0-{step}"
        tokenizer, model = load_tokenizer(str(student)), load_model(str(student)).eval()
        ids = special_ids(model.config, tokenizer, model.generation_config)
        engine = LocalEngine(model, mask_id=ids.mask_id, stop_ids=ids.stop_ids, forbidden_ids=ids.forbidden_ids)
        samples = seen[step + 1] | seen[step + 2]
        requests = [
            Request(name.rsplit("/", 1)[0], int(name.rsplit("/", 1)[1]), tuple(sample["prompt_ids"]))
            for name, sample in samples.items()
        ]
        again = engine.generate(requests, DecodeSettings(temperature=0.7, max_token=24), seed=10086 + step)
        again = {trajectory.id: trajectory for trajectory in again}
        written = {trajectory.id: trajectory for trajectory in read_shards(folder / "rollouts" / f"{step:08d}")}
        assert written.keys() == again.keys() == samples.keys() and len(samples) == 8
        for name, trajectory in written.items():
            for field in ("prompt_ids", "response_ids", "unmask_step", "length"):
                assert getattr(trajectory, field) == getattr(again[name], field) == samples[name][field]


def test_in_mixed_precision(run):
    """The student decodes as it is trained, under autocast."""
    folder = run("bf16", *REFRESH, "training.mixed_precision=bf16", "training.max_steps=3")
    written = list(read_shards(folder / "rollouts" / "00000002"))
    assert len(written) == 4 and len({token for t in written for token in t.response_ids}) > 10


@pytest.mark.parametrize(
    "objective",
    ["naive_td", "block_likelihood", "dparallel", "redi", "sft", "opdlm", "consistency", "trajectory_aware"],
)
def test_any_objective_may_be_refreshed(run, story_questions, objective):
    data = (f"dataset.optimization_data={story_questions}",) if objective == "sft" else ()
    data += ("training.teacher_reading=block",) if objective == "opdlm" else ()
    folder = run(objective, *REFRESH, *data, f"training.objective={objective}", "training.max_steps=4")
    assert rounds(folder) == [2] and all(row["sequences"] == 4 for row in log_of(folder))


def test_sft_learns_no_end_where_an_answer_was_cut(tmp_path):
    """It fills up with pads behind the end; of an answer cut at 6 tokens the block that was cut goes, as at loading."""
    step = list(range(1, 8))
    with ShardWriter(tmp_path / "round", 0) as writer:
        for row, reason in enumerate(("stop", "length")):
            writer.write(Trajectory(f"x/{row}/0", [1] * 5, step, step, 6, 4, reason))
    rows = {"id": ["x/0/0", "x/1/0"], "prompt_ids": [[1] * 5] * 2, "response_ids": [[2]] * 2, "length": [1] * 2}
    kept = {"given": [step[:6], step[:3]], "trajectories": [step, step]}
    for name, more in {"given": {}, "trajectories": {"unmask_step": [[1]] * 2}}.items():
        samples = onpolicy.RefreshedSamples(Dataset.from_dict(rows | more))
        samples.read(tmp_path / "round")
        assert [sample["response_ids"] for sample in samples] == kept[name]
        assert [sample["length"] for sample in samples] == [min(6, len(ids)) for ids in kept[name]]


def test_rounds_that_cannot_be_are_told_at_the_start(run):
    with raises_key("training.max_gen_length", "=250", "256 positions"):
        run("long", *REFRESH, "training.max_gen_length=250")
    config = load(TrainConfig, [*REFRESH, "training.objective=redi", "training.block_size=4"])
    ids = SpecialIds(mask_id=1, pad_id=0, stop_ids=(2,), forbidden_ids=(1,), ordinary_ids=torch.arange(3, 9))
    for name, initial, key in (
        ("x/0/0", [5, 6], "training.refresh_random_init_ratio"),
        ("x/first", [], "dataset.optimization_data"),
    ):
        samples = Dataset.from_dict({"id": [name], "prompt_ids": [[1, 2]], "initial_ids": [initial]})
        with raises_key(key):
            onpolicy.refuse_impossible(config, make_objective(config, ids), samples, 256)


def test_fewer_steps_per_block_are_the_students_few_step_states(run):
    folder = run("few", *REFRESH, "training.refresh_steps_per_block=1", "training.max_steps=3")
    for trajectory in read_shards(folder / "rollouts" / "00000002"):
        assert trajectory.steps == trajectory.decode["denoising_steps_per_block"] * len(
            {(len(trajectory.prompt_ids) + i) // 4 for i in range(len(trajectory.response_ids))}
        )


def test_iterated_rectification(run, drawn):
    """With ReDi a refresh is the next coupling: the student's decode of an x_T with random tokens, and that x_T."""
    more = ("training.objective=redi", "training.refresh_random_init_ratio=0.5", "training.max_steps=4")
    folder = run("redi", *REFRESH, *more)
    seen = by_step(drawn)
    written = {trajectory.id: trajectory for trajectory in read_shards(folder / "rollouts" / "00000002")}
    for name, sample in (seen[3] | seen[4]).items():
        assert sample["initial_ids"] == written[name].initial_ids and len(set(sample["initial_ids"])) > 1
    assert not any(sample["initial_ids"] for sample in (seen[1] | seen[2]).values())


@pytest.mark.parametrize("stop", [3, 4, 5], ids=["inside a round", "at a refresh", "before the next"])
def test_resumed_equals_uninterrupted_to_the_bit(resumes_to_the_bit, stop):
    more = (*REFRESH, "experiment.save_every_steps=3", "training.max_steps=7")
    resumes_to_the_bit(stop, *more)


def test_a_round_that_is_gone_is_told(run):
    folder = run("gone", *REFRESH, "training.max_steps=3")
    shutil.rmtree(folder / "rollouts")
    again = ("experiment.resume=auto", "training.refresh_max_active=3")  # which changes no answer
    run("gone", *REFRESH, "training.max_steps=3", *again)  # no step needs it
    with raises_key("training.refresh_rollouts", "00000002", "step 3"):
        run("gone", *REFRESH, "training.max_steps=4", "experiment.resume=auto")


def test_a_disk_that_fills_up_in_a_round_is_one_line(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", full)
        with raises_key(tmp_path / "tiny-teacher/math/p/full/rollouts/00000002", "No space left"):
            run("full", *REFRESH, "training.max_steps=4")
    assert len(log_of(run("full", *REFRESH, "training.max_steps=4", "experiment.resume=auto"))) == 4


def test_answers_that_cannot_be_seen_stop_the_run(run, monkeypatch):
    monkeypatch.setattr(ShardWriter, "write", lambda *args: None)
    with pytest.raises(AssertionError, match="00000002: .* answers cannot be seen"):
        run("unseen", *REFRESH, "training.max_steps=4")


@pytest.mark.parametrize("end", [3, 4], ids=["inside a round", "where one would begin"])
def test_a_finished_run_may_go_on(run, drawn, end):
    more = (*REFRESH, "lr_scheduler.scheduler=constant", "experiment.resume=auto")
    whole = run("whole", *more, "training.max_steps=6")
    run("done", *more, f"training.max_steps={end}")
    done = run("done", *more, f"training.max_steps={end}")  # nothing is left to do
    assert len(log_of(done)) == end and rounds(done) == list(range(2, end, 2))
    drawn.clear()
    run("done", *more, "training.max_steps=6")
    assert_from_rounds(done, by_step(drawn))
    if end == 4:
        assert without_times(log_of(done)) == without_times(log_of(whole))


def assert_from_rounds(folder, seen: dict[int, dict[str, dict]]) -> None:
    """What the steps saw are answers of the round in force there, none the teacher's."""
    for step, samples in seen.items():
        written = {t.id: t for t in read_shards(folder / "rollouts" / f"{(step - 1) // 2 * 2:08d}")}
        for name, sample in samples.items():
            assert written[name].unmask_step == sample["unmask_step"], f"{name} in step {step}"
            assert written[name].response_ids == sample["response_ids"], f"{name} in step {step}"


def test_with_another_batch_size_the_round_gets_the_questions_it_lacks(run, drawn, caplog):
    more = (*REFRESH, "lr_scheduler.scheduler=constant", "experiment.resume=auto")
    folder = run("batch", *more, "training.max_steps=3")
    drawn.clear()
    run("batch", *more, "training.max_steps=6", "training.batch_size_lm=3", "training.gradient_accumulation_steps=2")
    seen = by_step(drawn)
    assert sorted(seen) == [4, 5, 6] and all(len(samples) == 6 for samples in seen.values())
    assert_from_rounds(folder, seen)
    assert "lacks 6 of the 6 questions" in caplog.text


def test_a_signal_at_a_refresh_saves_first(run, after_step):
    whole = run("whole", *REFRESH)
    after_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="after step 4 of 6"):
        run("stopped", *REFRESH)
    stopped = whole.with_name("stopped")
    assert rounds(stopped) == [2]
    (stopped / "rollouts" / "00000004").mkdir()  # as a kill inside of a refresh leaves it
    run("stopped", *REFRESH, "experiment.resume=auto")
    assert rounds(stopped) == [2, 4] and without_times(log_of(stopped)) == without_times(log_of(whole))


def test_the_releases_grid_cannot_be_refreshed():
    for needed in ("training.preset=release", "training.block_grid=response", "training.instruction=false"):
        with raises_key("training.refresh_rollouts"):
            load(TrainConfig, [needed, "training.refresh_rollouts=5"])


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(RuntimeError), onpolicy.decoding(model):
        assert not model.training and model.config._attn_implementation == "sdpa"
        raise RuntimeError
    assert model.training and model.config._attn_implementation == "flex_attention"


@pytest.mark.slow
def test_two_processes_equal_one(run, overrides, tmp_path):
    alone = run("one", *REFRESH, "training.max_steps=4")
    launch("2_cpu_processes.yaml", *overrides("two", *REFRESH, "training.max_steps=4", "training.batch_size_lm=2"))
    assert_close(tmp_path / "tiny-teacher" / "math" / "p" / "two", alone, rel=1e-5, weight_atol=2e-5)

"""From an autoregressive folder to a block-diffusion student, without labels: opdlm in a small training run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from studies.storymath.tokenizer import build_tokenizer
from t3d.common.options import load
from t3d.data.shards import read_shards
from t3d.training import loop as training
from t3d.training import onpolicy
from t3d.training.settings import TrainConfig
from tests.conftest import SHAPE, raises_key
from tests.training.conftest import Stopped, log_of, losses, weights, without_times
from tests.training.test_onpolicy import assert_from_rounds, by_step, rounds

pytestmark = pytest.mark.usefixtures("cache_aside")

# The paper's rounds: from the first step on, temperature 1, all above .9 at once.
ROUNDS = (
    "training.refresh_rollouts=2",
    "training.refresh_at_start=true",
    "training.refresh_temperature=1",
    "training.refresh_remasking_strategy=low_confidence_dynamic",
    "training.max_gen_length=24",
)


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory) -> Path:
    """A tiny untrained Llama with the embedded tokenizer, as transformers writes it."""
    tokenizer = build_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **SHAPE,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(autoregressive) -> Path:
    """The same weights, decoded by blocks of 4 with the logit shift."""
    folder = autoregressive.with_name("tiny-blocks")
    shutil.copytree(autoregressive, folder)
    config = json.loads((folder / "config.json").read_text())
    keys = {"block_size": 4, "mask_token_id": build_tokenizer().mask_token_id, "logit_shift": True}
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


@pytest.fixture
def opdlm(run, converted):
    """Train the converted model on its own answers to the questions of another model's trajectories."""

    def call(name: str, *more: str) -> Path:
        student = (f"model.pretrained_model={converted}", "dataset.allow_other_model=true")
        return run(name, "training.objective=opdlm", *student, *ROUNDS, "training.max_steps=3", *more)

    return call


def test_it_learns_from_the_first_step_on_its_own_answers(opdlm, drawn):
    folder = opdlm("own")
    assert rounds(folder) == [0, 2]
    assert_from_rounds(folder, by_step(drawn))
    written = [t for step in (0, 2) for t in read_shards(folder / "rollouts" / f"{step:08d}")]
    assert {t.decode["remasking_strategy"] for t in written} == {"low_confidence_dynamic"}
    assert {t.decode["temperature"] for t in written} == {1.0}
    for row in log_of(folder):
        assert row["loss"] == row["divergence"] > 0 and row["grad_norm"] > 0 and "round" not in row


def test_a_block_diffusion_model_is_not_its_own_autoregressive_teacher(opdlm, converted, tmp_path):
    trained = shutil.copytree(converted, tmp_path / "trained")
    (trained / "t3d.json").write_text(json.dumps({"objective": "opdlm"}))
    unshifted = shutil.copytree(converted, tmp_path / "unshifted")
    config = json.loads((unshifted / "config.json").read_text())
    (unshifted / "config.json").write_text(json.dumps(config | {"logit_shift": False}))
    for folder in (trained, unshifted):
        with raises_key("training.teacher", "teacher_reading=block"):
            opdlm("refused", f"model.pretrained_model={folder}")
    (unshifted / "t3d.json").write_text(json.dumps({"objective": "converted"}))
    opdlm("converted", f"model.pretrained_model={unshifted}")


def test_the_divergence_falls(opdlm):
    found = losses(opdlm("learns", "training.max_steps=30", "training.refresh_rollouts=10"))
    assert sum(found[-10:]) < 0.9 * sum(found[:10])


def test_the_teacher_is_the_autoregressive_folder_or_the_model_at_the_start(opdlm, autoregressive):
    """Before the first step their weights are the same: so is what they teach, to the end."""
    start = opdlm("start")
    folder = opdlm("folder", f"training.teacher={autoregressive}")
    assert without_times(log_of(start)) == without_times(log_of(folder))
    for name, weight in weights(start).items():
        assert torch.equal(weight, weights(folder)[name]), name


def test_the_teacher_stays_as_it_was(opdlm, monkeypatch):
    """It is frozen, and no checkpoint has it."""
    held, original = [], training.FrozenModel
    monkeypatch.setattr(training, "FrozenModel", lambda *args: held.append(original(*args)) or held[-1])
    folder = opdlm("frozen")
    first = load_first(held[0].model, folder)
    assert first and not list((folder / "checkpoints").rglob("custom_checkpoint*"))


def load_first(model, folder: Path) -> bool:
    """Has the model the weights that training began with, and the student others?"""
    config = load(TrainConfig, [f"config={folder / 'config.yaml'}"])
    fresh = training.load_model(config.model.pretrained_model)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    student = training.load_model(str(folder / "ckpt" / "optimized"))
    return same and not all(torch.equal(a, b) for a, b in zip(student.parameters(), fresh.parameters(), strict=True))


def test_lora_shares_the_base_with_its_teacher(opdlm, autoregressive, models_loaded):
    """At the first step adapters change nothing: loss as of the whole model's. Another folder is a second model."""
    lora = ("training.lora.rank=4", "training.max_steps=2", "optimizer.params.learning_rate=2e-2")
    whole, folder = opdlm("whole", "training.max_steps=2"), opdlm("two", *lora, f"training.teacher={autoregressive}")
    models_loaded.clear()
    shared = opdlm("lora", *lora)
    assert len(models_loaded) == 1
    assert losses(shared)[0] == pytest.approx(losses(whole)[0], rel=1e-5)
    assert losses(shared) == pytest.approx(losses(folder), rel=1e-5)


def test_a_block_diffusion_student_and_teacher(run, story_teacher):
    """SDAR without a shift, and its own first weights at full steps as the teacher of few."""
    few = ("training.refresh_steps_per_block=1", "training.teacher_reading=block")
    few += ("training.objective=opdlm", "training.max_steps=2")
    rows = log_of(run("block", *ROUNDS, *few))
    other = run("block-2", *ROUNDS, *few, f"training.teacher={story_teacher}")
    assert all(row["divergence"] > 0.01 for row in rows)
    assert without_times(rows) == without_times(log_of(other))


def test_a_teacher_with_other_tokens_is_refused(opdlm, autoregressive, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(autoregressive, other)
    file = other / "tokenizer.json"
    words = json.loads(file.read_text())
    vocab = words["model"]["vocab"]
    first, second = list(vocab)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(words))
    with raises_key("training.teacher"):
        opdlm("other", f"training.teacher={other}")


def test_a_teacher_that_is_not_there_is_told(opdlm):
    with raises_key("training.teacher"):
        opdlm("none", "training.teacher=/no/such/folder")


def test_answers_grow_and_the_datas_share_falls(opdlm, run, drawn):
    """Rounds 0, 1, 2 of 4: of the questions all, half and none keep the data's answers; lengths 4, 4 + 20 (1 - cos 22.5
    degrees), ..."""
    share = ("training.refresh_data_share=1", "training.refresh_data_rounds=2", "training.batch_size_lm=12")
    share += ("training.max_steps=6",)
    growth = ("training.refresh_first_length=4", "training.refresh_length_rounds=4")
    folder = opdlm("grows", *share, *growth)
    written = {step: {t.id: t for t in read_shards(folder / "rollouts" / f"{step:08d}")} for step in (0, 2, 4)}
    assert [len(found) for found in written.values()][0] == 0 and len(written[4]) == 24
    assert 4 < len(written[2]) < 20
    grown = by_step(drawn)
    drawn.clear()
    run(
        "data",
        "training.max_steps=2",
        "training.objective=naive_td",
        "training.max_gen_length=24",
        "training.batch_size_lm=12",
    )
    given = by_step(drawn)[1] | by_step(drawn)[2]
    assert len(given) == 24
    for step, samples in grown.items():
        of_round = written[(step - 1) // 2 * 2]
        for name, sample in samples.items():
            expected = of_round[name].response_ids if name in of_round else given[name]["response_ids"]
            assert sample["response_ids"] == expected
    assert {t.decode["max_token"] for t in written[2].values()} == {6}  # 4 + 20 x .076
    assert {t.decode["max_token"] for t in written[4].values()} == {10}  # 4 + 20 x .293
    assert all(t.length <= t.decode["max_token"] for found in written.values() for t in found.values())


@pytest.mark.parametrize("stop", [1, 2], ids=["inside the first round", "at a refresh"])
def test_resumed_equals_uninterrupted_to_the_bit(opdlm, stop_after, stop):
    more = ("training.refresh_data_share=0.5", "training.refresh_data_rounds=3", "training.refresh_first_length=8")
    more = (*more, "experiment.save_every_steps=1", "training.max_steps=4")
    whole = opdlm("whole", *more)
    stop_after(stop)
    with pytest.raises(Stopped):
        opdlm("stopped", *more, "experiment.resume=auto")
    resumed = opdlm("stopped", *more, "experiment.resume=auto")
    assert without_times(log_of(resumed)) == without_times(log_of(whole))
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_the_course_of_consistency_goes_on_where_it_was(run, stop_after):
    """lambda is a function of the step."""
    more = ("training.objective=consistency", "experiment.save_every_steps=2", "training.max_steps=5")
    whole = run("whole", *more)
    assert [row["kl_weight"] for row in log_of(whole)] == pytest.approx([0.9, 0.888, 0.8, 0.652, 0.5407], abs=0.05)
    stop_after(3)
    with pytest.raises(Stopped):
        run("stopped", *more, "experiment.resume=auto")
    resumed = run("stopped", *more, "experiment.resume=auto")
    assert without_times(log_of(resumed)) == without_times(log_of(whole))


@pytest.mark.parametrize(
    "line, key",
    [
        (["training.refresh_first_length=30", "training.max_gen_length=24"], "training.refresh_first_length"),
        (["training.refresh_length_rounds=7"], "training.refresh_length_rounds"),
        (["training.refresh_data_rounds=7"], "training.refresh_data_rounds"),
        (["training.refresh_remasking_strategy=cleverly"], "training.refresh_remasking_strategy"),
        (["training.refresh_data_share=1.5"], "training.refresh_data_share"),
        (["training.jsd_beta=0.5", "training.reverse_kl_weight=0.5"], "training.jsd_beta"),
        (["training.jsd_beta=1"], "training.jsd_beta"),
        (["training.teacher_reading=upwards"], "training.teacher_reading"),
        (["training.teacher_top_k=0"], "training.teacher_top_k"),
        (["training.objective=consistency", "training.teacher=a/b"], "training.teacher"),
        (["training.objective=consistency", "training.teacher_masks=[0.7,0.3]"], "training.teacher_masks"),
        (["training.objective=naive_td", "training.reference_offload=true"], "training.reference_offload"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(line, key):
    objective = [] if any("objective" in item for item in line) else ["training.objective=opdlm"]
    with raises_key(key):
        load(TrainConfig, [*objective, "training.refresh_rollouts=2", *line])


def test_a_strategy_of_ones_own_that_is_not_there_is_told_at_the_start(opdlm):
    with raises_key("training.refresh_remasking_strategy"):
        opdlm("strategy", "training.refresh_remasking_strategy=no_module:Strategy")


def test_which_questions_keep_the_datas_answers_depends_on_nothing_else():
    found = [onpolicy.uniform(1, 2, f"x/{row}/0") for row in range(500)]
    assert found == [onpolicy.uniform(1, 2, f"x/{row}/0") for row in range(500)]
    assert found != [onpolicy.uniform(1, 4, f"x/{row}/0") for row in range(500)]
    assert 0.45 < sum(found) / 500 < 0.55 and 0 <= min(found) and max(found) < 1

"""Rewarded rounds in small training runs: groups, rewards, advantages, log-probabilities, resume."""

import json
from pathlib import Path

import pytest
import torch

from t3d.blocks.decoding import stream_key
from t3d.common.errors import UserError
from t3d.data.shards import read_shards
from t3d.data.trajectory import Trajectory
from t3d.models.loading import load_model, load_tokenizer, special_ids
from t3d.objectives.trace_rl import TraceRL, TraceRLSettings
from t3d.states.base import collate
from t3d.states.trace import TraceStates
from t3d.tasks import Answer, find_task
from t3d.training.advantages import advantages, of_round, z_scores
from t3d.training.rewards import Rewards, graded_by
from tests.conftest import raises_key
from tests.decode.test_sglang import serving
from tests.training import toy_rewards
from tests.training.conftest import assert_close, launch, log_of, losses, weights
from tests.training.test_loop import cpu_config, needs_compiler

pytestmark = pytest.mark.usefixtures("cache_aside")

TOY = "tests.training.toy_rewards:"
ROUNDS = (
    "training.objective=trace_rl",
    "training.refresh_rollouts=2",
    "training.refresh_at_start=true",
    "training.refresh_temperature=1",
    "training.refresh_steps_per_block=1",
    "training.max_gen_length=16",
    "training.samples_per_question=4",
    "training.cut_is_wrong=false",
    f"training.reward={TOY}letters",
    "training.batch_size_lm=8",
)


@pytest.fixture
def rl(run, story_questions):
    """A training by rewards of the tiny teacher's own answers."""

    def call(name: str, *more: str) -> Path:
        return run(name, *ROUNDS, f"training.reward_data={story_questions}", "training.max_steps=4", *more)

    return call


def answers_of(folder: Path, step: int) -> dict[str, Trajectory]:
    return {t.id: t for t in read_shards(folder / "rollouts" / f"{step:08d}")}


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def test_z_scores_by_hand():
    assert z_scores([1, 0, 0, 1]) == [1, -1, -1, 1]
    assert z_scores([3, 0, 0]) == pytest.approx([2**0.5, -(0.5**0.5), -(0.5**0.5)])
    assert z_scores([0.1 + 0.2, 0.3]) == z_scores([0.3] * 3)[:2] == [0, 0] and z_scores([]) == []


def test_advantages_by_hand():
    """Speed counts among right answers alone; equal rewards at equal speeds teach nothing."""
    assert advantages([1, 0, 0, 1], [9, 1, 5, 3], 0) == [1, -1, -1, 1]
    assert advantages([1, 0, 0, 1], [3, 1, 5, 1], 0.5) == [1.5, -1, -1, 0.5]
    assert advantages([1, 1], [3, 1], 0.5) == [0.5, -0.5]
    assert advantages([1, 1], [3, 1], 0) is None
    assert advantages([0, 0], [3, 1], 0.5) is None
    assert advantages([1, 1], [2, 2], 0.5) is None


def test_a_rounds_groups_are_its_questions():
    def answer(name: str, reward: float) -> Trajectory:
        return Trajectory(name, [1], [2, 3, 4], [1, 1, 1], 3, 4, "stop", reward=reward, forwards=2)

    rewards = {"x/0/0": 1.0, "x/1/0": 0.5, "x/0/1": 0.0, "x/1/1": 0.5}
    found = of_round([answer(*pair) for pair in rewards.items()], 0.0)
    assert found == {"x/0/0": 1, "x/0/1": -1, "x/1/0": None, "x/1/1": None}


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def trajectory(name: str, text: str, reason: str = "stop") -> Trajectory:
    """An answer whose text is its question's (tests below decode by table)."""
    return Trajectory(name, [1], [2, 3, 4], [1, 1, 1], 3, 4, reason, text=text)


def test_the_tasks_grader_rewards_while_answers_come():
    """Right 1, wrong 0, cut 0 or as graded; the order stays, whatever the groups."""
    texts = {"x/0/0": r"\boxed{4}", "x/0/1": r"\boxed{5}", "x/1/0": r"\boxed{1/2}", "x/1/1": "none"}
    truth = {"x/0": "4", "x/1": "0.5"}
    answers = [trajectory(name, text) for name, text in texts.items()]
    answers.append(trajectory("x/0/2", texts["x/0/0"], "length"))
    given = iter([answer.text for answer in answers] * 2)
    grade = graded_by(find_task("math"), False, 1)

    def row(prompt, ids):
        return {"question": "?", "ground_truth_answer": truth[prompt]}

    for cut_is_wrong, last in ((False, 1.0), (True, 0.0)):
        rewards = Rewards(grade, row, lambda ids: next(given), cut_is_wrong)
        found = list(rewards.while_decoding(iter(answers)))
        assert [(t.id, t.reward) for t in found] == [
            *zip(texts, [1.0, 0.0, 1.0, 0.0], strict=True),
            ("x/0/2", last),
        ]


def test_programs_run_in_the_sandbox(run):
    """The code task's own grader, by the rows' tests."""
    row = {"question": "?", "test_method": "function", "test_list": ["assert f(2) == 4"], "test_time_limit": 5}
    try:
        grade = graded_by(find_task("code"), False, 1)
    except UserError as error:
        pytest.skip(str(error))
    programs = ["```python\ndef f(x):\n    return x * 2\n```", "```python\ndef f(x):\n    return x\n```"]
    assert grade([Answer(program, row) for program in programs]) == [1.0, 0.0]


def test_own_rewards_reach_the_round(rl, story_questions, story_teacher):
    folder = rl("own")
    rows, tokenizer = json.loads(story_questions.read_text()), load_tokenizer(str(story_teacher))
    written = answers_of(folder, 0)
    assert len(written) == 16 and {name.rsplit("/", 1)[1] for name in written} == set("0123")
    for name, t in written.items():
        text = tokenizer.decode(t.response_ids[: t.length], skip_special_tokens=True)
        assert t.reward == toy_rewards.letters(Answer(text, rows[int(name.split("/")[1])]))
    assert len({t.reward for t in written.values()}) > 4


def test_agreement_takes_the_datas_answer_for_the_truth(rl, story_trajectories, monkeypatch):
    """The tiny teacher never writes a box, so no answer agrees; one that always does agrees with all."""
    folder = rl("none", "training.reward=agreement", "training.max_steps=2")
    assert {t.reward for t in answers_of(folder, 0).values()} == {0.0}
    assert log_of(folder)[0]["dropped_groups"] == 1.0 and log_of(folder)[0]["sequences"] == 0
    monkeypatch.setattr(type(find_task("math")), "extract", lambda task, text, row: "7")
    graded = []
    monkeypatch.setattr(
        type(find_task("math")),
        "grade",
        lambda task, answers, how: graded.extend(answers) or task_verdicts(answers),
    )
    folder = rl("all", "training.reward=agreement", "training.max_steps=2")
    assert {t.reward for t in answers_of(folder, 0).values()} == {1.0}
    assert {answer.truth for answer in graded} == {"7"}


def task_verdicts(answers):
    from t3d.grading import Verdict

    return [Verdict(True, None, "correct") for _ in answers]


@pytest.mark.parametrize(
    "more, key",
    [
        ([f"training.reward={TOY}no_such"], "training.reward"),
        ([f"training.reward={TOY}no_function"], "training.reward"),
        ([f"training.reward={TOY}broken"], "training.reward"),
        (["training.reward=agreement", "dataset.data_type=text"], "training.reward"),
        (["training.reward=agreement", "dataset.data_type=code"], "training.reward"),
        (["training.reward_data=no_such_set"], "training.reward_data"),
        (["training.samples_per_question=3"], "training.samples_per_question"),
    ],
)
def test_rewards_that_cannot_be(rl, more, key):
    with raises_key(key):
        rl("wrong", *more)


def test_other_questions_than_the_prompts_are_refused(rl, story_questions, tmp_path):
    other = tmp_path / "Other.json"
    other.write_text(json.dumps(json.loads(story_questions.read_text())[::-1]))
    with raises_key("training.reward_data"):
        rl("other", f"training.reward_data={other}")


# ---------------------------------------------------------------------------------------------------------------------
# Rounds


def test_a_step_sees_whole_questions_with_their_round(rl, drawn):
    folder = rl("groups")
    rewards = {}
    for step in drawn:
        begun = (step.step - 1) // 2 * 2
        written = answers_of(folder, begun)
        expected = of_round(written.values(), 0.0)
        questions = [sample["id"].rsplit("/", 1)[0] for sample in step.samples]
        assert questions == sorted(questions, key=questions.index) and len(set(questions)) == 2
        for sample, state in zip(step.samples, step.states, strict=True):
            t = written[sample["id"]]
            assert (sample["response_ids"], sample["old_log_prob"]) == (t.response_ids, t.log_probs)
            assert sample["advantage"] == expected[t.id]
            assert state.advantage.tolist() == pytest.approx([expected[t.id] or 0.0] * len(state.position))
            rewards[begun, t.id] = t.reward
    assert len(rewards) == 32
    rows = log_of(folder)
    assert [row["stale_steps"] for row in rows] == [0, 1, 0, 1]
    for row, begun in ((rows[0], 0), (rows[2], 2)):
        of_this = [reward for (when, _), reward in rewards.items() if when == begun]
        assert row["reward"] == pytest.approx(sum(of_this) / 16) and 0 < row["drawn_entropy"] < 6
    assert "reward" not in rows[1] and all(row["kl"] < 1e-9 and not row["clip_share"] for row in rows[::2])


@pytest.mark.parametrize("steps", [1, 4])
def test_the_recorded_log_probabilities_are_those_of_the_weights_that_drew(rl, story_teacher, steps):
    """To fp32 rounding, whatever was batched with an answer."""
    folder = rl("old", f"training.refresh_steps_per_block={steps}", "training.max_steps=1")
    tokenizer, model = load_tokenizer(str(story_teacher)), load_model(str(story_teacher)).eval()
    ids = special_ids(model.config, tokenizer, model.generation_config)
    rl = TraceRL(TraceStates(4, ids.mask_id), torch.tensor(ids.forbidden_ids), TraceRLSettings())
    for t in answers_of(folder, 0).values():
        state = rl.whole(vars(t))
        with torch.no_grad():
            found, entropy = rl.policy(model, collate([[state]], ids.pad_id))
        recorded = torch.tensor(t.log_probs)[state.position - len(t.prompt_ids)]
        torch.testing.assert_close(recorded, found, rtol=0, atol=1e-5)
        assert t.entropy == pytest.approx(float(entropy.mean()), abs=1e-5)


def test_equal_answers_are_dropped_and_counted(rl, story_teacher):
    folder = rl("constant", f"training.reward={TOY}constant", "optimizer.params.weight_decay=0")
    for row in log_of(folder):
        assert row["sequences"] == 0 and row["skipped"] == 8 and row["loss"] == 0 and row["grad_norm"] == 0
    assert log_of(folder)[0]["dropped_groups"] == 1
    before = load_model(str(story_teacher)).state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(folder).items())


def test_a_rewarded_beginning_is_learnt(rl):
    """A bandit in every question: 1 for a digit in the first place. From below .2 the reward rises to above .9."""
    more = ("training.max_gen_length=4", "training.max_steps=60", "dataset.limit=6")
    learns = ("optimizer.params.learning_rate=1e-2", f"training.reward={TOY}begins_with_number")
    rows = [row for row in log_of(rl("bandit", *more, *learns)) if "reward" in row]
    assert sum(row["reward"] for row in rows[:3]) < 0.6
    assert sum(row["reward"] for row in rows[-5:]) > 4.5


def test_heldout_questions_are_measured(rl, story_questions):
    more = (f"training.heldout_data={story_questions}", "training.heldout_every=2", "training.max_steps=6")
    rows = log_of(rl("heldout", *more, "training.heldout_limit=5"))
    assert [row["step"] for row in rows if "heldout_accuracy" in row] == [1, 5]


def test_heldout_prompts_without_room_are_left_out_and_counted(rl, story_questions, tmp_path, caplog):
    """The model has 256 positions, and 16 are the answer's."""
    short = json.loads(Path(story_questions).read_text())[0]
    long = short | {"question": short["question"] * 30}
    for name, rows in {"some": [short, long, long], "none": [long]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    rows = log_of(rl("some", f"training.heldout_data={tmp_path / 'some.json'}", "training.max_steps=1"))
    assert "2 prompts are longer than 240 tokens" in caplog.text and "heldout_accuracy" in rows[0]
    with raises_key("training.heldout_data", "max_prompt_len"):
        rl("none", f"training.heldout_data={tmp_path / 'none.json'}", "training.max_steps=1")


def test_a_collapse_is_told_once(rl, caplog, monkeypatch):
    monkeypatch.setattr("t3d.training.reinforcement.COLLAPSE", {"drawn_entropy": 10.0, "length": 0.0})
    rl("collapse")
    assert caplog.text.count("drawn_entropy has fallen") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Resume, LoRA, accumulation, processes


@pytest.mark.parametrize("stop", [3, 4, 5], ids=["inside a round", "at a refresh", "before the next"])
@pytest.mark.parametrize("more", [(), ("training.kl_to=reference", "training.kl_weight=0.1")], ids=["old", "reference"])
def test_resumed_equals_uninterrupted_to_the_bit(resumes_to_the_bit, story_questions, stop, more):
    line = (*ROUNDS, f"training.reward_data={story_questions}", f"training.heldout_data={story_questions}", *more)
    resumes_to_the_bit(stop, *line, "experiment.save_every_steps=3", "training.max_steps=7")


def test_micro_batches_change_nothing(rl):
    whole = rl("whole")
    parts = rl("parts", "training.batch_size_lm=2", "training.gradient_accumulation_steps=4")
    assert_close(parts, whole, rel=1e-4, weight_atol=2e-5)


@pytest.mark.parametrize("more", [(), ("training.kl_to=reference", "training.kl_weight=0.1")], ids=["old", "reference"])
def test_with_adapters(rl, more):
    rows = log_of(rl("lora", "training.lora.rank=4", "optimizer.params.learning_rate=1e-2", *more))
    assert all(row["grad_norm"] > 0 for row in rows) and rows[0]["kl"] < 1e-9 < rows[1]["kl"]


def test_one_drawn_step_a_block_and_merged_steps(rl):
    for name, more in {
        "one": ("training.trace_states=one",),
        "shrunk": ("training.shrink=2",),
        "fast": ("training.speed_weight=0.5", "training.refresh_remasking_strategy=low_confidence_dynamic"),
    }.items():
        found = losses(rl(name, "training.refresh_steps_per_block=4", *more))
        assert len(found) == 4 and any(found)


def test_rounds_on_servers_equal_those_of_this_process(rl):
    """Servers that know the answers: every round's student is pushed, and training has the same numbers."""
    local = rl("local")
    known = {
        stream_key(10086 + step, name.rpartition("/")[0], int(name.rpartition("/")[2])): t
        for step in (0, 2)
        for name, t in answers_of(local, step).items()
    }
    with serving(known, None, model="models/teacher") as (server,):
        served = rl("served", f"training.refresh_engine_urls=[{server.url}]")
        folder = served / "rollouts" / "student"
        assert [push["model_path"] for push in server.pushed] == [str(folder)] * 2
        assert len({push["weight_version"] for push in server.pushed}) == 2 and len(server.asked) == len(known) == 32
    assert losses(served) == losses(local)
    assert all(torch.equal(weight, weights(local)[name]) for name, weight in weights(served).items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=needs_compiler), pytest.param(2, marks=needs_compiler)])
def test_two_processes_equal_one(rl, overrides, tmp_path, story_questions, stage):
    """Data-parallel, ZeRO-1 and ZeRO-2."""
    alone = rl("one")
    more = (*ROUNDS, f"training.reward_data={story_questions}", "training.max_steps=4", "training.batch_size_lm=4")
    config = cpu_config(tmp_path, f"deepspeed_zero{stage}.yaml") if stage else "2_cpu_processes.yaml"
    launch(config, *overrides("two", *more))
    assert_close(tmp_path / "tiny-teacher" / "math" / "p" / "two", alone, rel=1e-3, weight_atol=5e-5)

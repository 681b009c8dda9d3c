"""Evaluation: every number of a result is recomputed here from the records and the shards."""

import json
import math
import re

import pytest
import torch
from transformers import AutoTokenizer

from t3d.common.errors import UserError
from t3d.common.options import load
from t3d.data.shards import ShardWriter, read_shards, shard_files
from t3d.data.trajectory import Trajectory
from t3d.evaluation.run import dataset_names, evaluate, results_file, units_of
from t3d.evaluation.settings import EvalConfig
from t3d.grading import math as math_grading
from t3d.grading import sandbox
from t3d.models.loading import export_model, load_model, provenance
from t3d.rollout import run as rollout
from t3d.rollout.settings import SampleConfig
from t3d.tasks import TASKS, prompt_ids
from tests.conftest import raises_key


@pytest.fixture
def config(tmp_path, story_teacher, story_questions):
    def make(*more: str) -> EvalConfig:
        overrides = (
            f"experiment.project={tmp_path}",
            f"evaluation.checkpoint_path={story_teacher}",
            f"evaluation.eval_dataset={story_questions}",
            "rollout.max_token=16",
            "rollout.denoising_steps_per_block=2",
            "rollout.temperature=0.5",
        )
        return load(EvalConfig, [*overrides, *more])

    return make


def test_weights_that_are_no_numbers_get_no_result(config, broken_teacher, tmp_path):
    with raises_key("model", "tiny-broken: step 1 "):
        evaluate(config(f"evaluation.checkpoint_path={broken_teacher}"))
    assert not list(tmp_path.rglob("results/*.json"))


def records_of(output) -> list[dict]:
    return [json.loads(line) for line in (output.with_suffix("") / "records.jsonl").read_text().splitlines()]


@pytest.fixture
def some_right(monkeypatch):
    """An untrained model is never right: let the true answer stand in a third of the texts. Gives the ids of those."""
    make_engine, right = rollout.make_engine, set()

    class Prompter:
        def __init__(self, config, source, tokenizer, rank):
            self.engine, self.tokenizer = make_engine(config, source, tokenizer, rank), tokenizer
            rows = json.loads(open(config.evaluation.eval_dataset).read())
            self.answers = {f"Story/{i}/0": row["ground_truth_answer"] for i, row in enumerate(rows)}

        def generate(self, requests, settings, seed):
            for trajectory in self.engine.generate(requests, settings, seed):
                said = self.tokenizer(f" \\boxed{{{self.answers[trajectory.id]}}}", add_special_tokens=False)
                ids = said["input_ids"]
                if int(trajectory.id.split("/")[1]) % 3 == 0 and len(ids) <= trajectory.length:
                    end = self.tokenizer.convert_tokens_to_ids(".")
                    trajectory.response_ids[: trajectory.length] = ids + [end] * (trajectory.length - len(ids))
                    right.add(trajectory.id)
                yield trajectory

    monkeypatch.setattr(rollout, "make_engine", Prompter)
    return right


def wilson(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The two shares p0 with |p - p0| = z sqrt(p0 (1 - p0) / n), which is the interval's definition, by bisection."""

    def solve(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            if abs(p - middle) <= z * math.sqrt(middle * (1 - middle) / n):
                inside = middle
            else:
                outside = middle
        return inside

    return solve(p, 0.0), solve(p, 1.0)


def test_every_number_follows_from_the_records(config, some_right, capsys):
    settings = config("evaluation.method=t3d", "rollout.max_token=22")
    output = evaluate(settings)
    printed = capsys.readouterr().out
    (row,) = json.loads(output.read_text())
    records = records_of(output)
    answers = {answer.id: answer for answer in read_shards(output.with_suffix(""))}

    assert [record["id"] for record in records] == [f"Story/{i}/0" for i in range(24)]
    assert {record["id"] for record in records if record["correct"]} == some_right and len(some_right) > 3
    for record in records:
        answer = answers[record["id"]]
        for key in ("question", "ground_truth", "text", "length", "steps", "forwards", "seconds", "finish_reason"):
            assert record[key] == getattr(answer, key)
        assert record["steps"] == max(answer.unmask_step) and record["forwards"] > record["steps"]

    n = len(records)
    tokens, steps, forwards = (sum(record[key] for record in records) for key in ("length", "steps", "forwards"))
    expected = {
        "method": "t3d",
        "model": settings.evaluation.checkpoint_path,
        "dataset": "Story",
        "block_size": 4,
        "denoising_steps_per_block": 2,
        "tokens_per_step": 2.0,
        "strategy": "low_confidence_static",
        "temperature": 0.5,
        "seed": 10086,
        "n": 24,
        "accuracy": len(some_right) / 24,
        "measured_tokens_per_step": tokens / steps,
        "tokens_per_forward": tokens / forwards,
        "steps_per_answer": steps / n,
        "forwards_per_answer": forwards / n,
        "mean_length": tokens / n,
        "latency_mean": sum(record["seconds"] for record in records) / n,
        "latency_median": sum(sorted(record["seconds"] for record in records)[n // 2 - 1 : n // 2 + 1]) / 2,
        "finish_reasons": {
            reason: sum(record["finish_reason"] == reason for record in records) for reason in row["finish_reasons"]
        },
        "verdicts": {reason: sum(record["reason"] == reason for record in records) for reason in row["verdicts"]},
    }
    for name, value in expected.items():
        assert row[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert set(row["finish_reasons"]) <= {"stop", "length"} and sum(row["finish_reasons"].values()) == 24
    assert sum(row["verdicts"].values()) == 24
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(wilson(len(some_right) / 24, 24), abs=1e-6)
    assert row["decode"]["max_token"] == 22 and row["decode"]["denoising_steps_per_block"] == 2
    (session,) = [json.loads(line) for line in (output.with_suffix("") / "sessions.jsonl").read_text().splitlines()]
    assert row["seconds"] == session["seconds"] and session["tokens"] == tokens
    assert row["tokens_per_second"] == pytest.approx(tokens / session["seconds"])

    title, rule, line, costs, path = printed.strip().splitlines()[-5:]
    assert title.split()[:2] == ["Method", "Data"] and set(rule) == {"-", " "}
    assert line.split()[:6] == ["T3D", "Story", "2", f"{100 * row['accuracy']:.1f}", "%", f"{100 * row['ci_low']:.1f}"]
    assert costs.startswith(f"{row['mean_length']:.1f} tokens, {row['steps_per_answer']:.1f} steps")
    assert path == str(output)


def test_tokens_per_step_is_measured_where_the_strategy_does_not_fix_it(config):
    dynamic = ("rollout.remasking_strategy=low_confidence_dynamic", "rollout.dynamic_threshold=0.1")
    (row,) = json.loads(evaluate(config(*dynamic, "evaluation.limit=6")).read_text())
    assert row["tokens_per_step"] == row["measured_tokens_per_step"] > 0
    assert row["tokens_per_step"] != 2.0


def test_a_half_done_evaluation_goes_on(tmp_path, config):
    whole = evaluate(config(f"evaluation.output={tmp_path / 'whole.json'}"))
    half = evaluate(config(f"evaluation.output={tmp_path / 'half.json'}"))
    (shard,) = shard_files(half.with_suffix(""))
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(lines[:9]) + lines[9][:50])
    half.unlink()
    (half.with_suffix("") / "records.jsonl").unlink()
    again = evaluate(config(f"evaluation.output={tmp_path / 'half.json'}"))
    assert again == half

    timing = ("seconds", "tokens_per_second", "latency_mean", "latency_median")
    (a,), (b,) = (json.loads(path.read_text()) for path in (whole, half))
    assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}
    assert shard.read_bytes().startswith(b"".join(lines[:9]))
    without = [{k: v for k, v in record.items() if k != "seconds"} for record in records_of(half)]
    assert without == [{k: v for k, v in record.items() if k != "seconds"} for record in records_of(whole)]


def test_a_mended_answer_key_counts_without_decoding_again(config, story_questions, tmp_path):
    file = tmp_path / "Keys.json"
    rows = json.loads(story_questions.read_text())[:2]
    file.write_text(json.dumps(rows))
    settings = config(f"evaluation.eval_dataset={file}")
    folder = evaluate(settings).with_suffix("")
    (shard,) = shard_files(folder)
    lines = [json.loads(line) | {"text": "\\boxed{17}"} for line in shard.read_text().splitlines()]
    shard.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows[1]["ground_truth_answer"] = "17"
    file.write_text(json.dumps(rows))
    records = records_of(evaluate(settings))
    assert [record["correct"] for record in records] == [False, True]
    assert records[1]["ground_truth"] == "17"


def test_a_smaller_request_after_a_larger_one_counts_what_is_asked_for(config):
    more = ("rollout.num_response_per_task=2", "rollout.temperature=1")
    (row,) = json.loads(evaluate(config(*more, "evaluation.limit=5")).read_text())
    assert row["n"] == 10
    (row,) = json.loads(evaluate(config(*more, "evaluation.limit=3")).read_text())
    assert row["n"] == 6
    (row,) = json.loads(evaluate(config("rollout.temperature=1", "evaluation.limit=3")).read_text())
    assert row["n"] == 3


def test_nodes_score_their_shares(config):
    rows = []
    for index in (0, 1):
        output = evaluate(config("evaluation.num_node=2", f"evaluation.node_index={index}", "evaluation.limit=5"))
        rows += json.loads(output.read_text())
    assert [row["n"] for row in rows] == [2, 3]
    with raises_key("evaluation.num_node", "=9"):
        evaluate(config("evaluation.num_node=9", "evaluation.node_index=0", "evaluation.limit=5"))


def test_results_are_told_apart_by_name(config, tmp_path):
    names = {
        results_file(config(*more)).name
        for more in (
            (),
            ("evaluation.method=t3d",),
            ("rollout.denoising_steps_per_block=4",),
            ("rollout.block_size=8",),
            ("rollout.temperature=0",),
            ("rollout.seed=1",),
            ("rollout.remasking_strategy=random",),
            ("evaluation.num_node=2", "evaluation.node_index=1"),
        )
    }
    assert len(names) == 8 and all(name.endswith(".json") for name in names)
    assert results_file(config()).parent == tmp_path / "results"


@pytest.mark.parametrize(
    "given, name",
    [("x.json", "x.json"), ("SDAR-1.7B-t0.1", "SDAR-1.7B-t0.1.json"), ("SDAR-1.7B.json", "SDAR-1.7B.json")],
)
def test_an_output_of_ones_own_keeps_its_dots(config, tmp_path, given, name):
    assert results_file(config(f"evaluation.output={tmp_path / given}")) == tmp_path / name


def test_nodes_never_share_an_output(config, tmp_path):
    output = f"evaluation.output={tmp_path / 'x.json'}"
    names = {results_file(config(output, "evaluation.num_node=2", f"evaluation.node_index={k}")) for k in (0, 1)}
    assert len(names) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Programs, several answers per question


ADD = {
    "question": "Add two numbers.",
    "prefix": "Here is the completed code:\n```python\ndef add(a, b):\n",
    "test_list": ["assert add(1, 2) == 3\nassert add(-1, 1) == 0"],
    "test_method": "function",
    "test_time_limit": 5,
}
DOUBLE = {
    "question": "Read a number and print its double.",
    "test_input": ["1\n", "21\n"],
    "test_output": ["2\n", "42\n"],
    "test_method": "stdio",
    "test_time_limit": 5,
}


def answered(unit_folder, problems: dict[str, str], texts: dict[str, str]) -> None:
    """Put answers of these texts where evaluation keeps what it has decoded."""
    with ShardWriter(unit_folder, 0) as writer:
        for id, text in texts.items():
            writer.write(
                Trajectory(
                    id=id,
                    prompt_ids=[1, 2, 3, 4],
                    response_ids=[5, 6, 7, 8],
                    unmask_step=[1, 1, 2, 2],
                    length=4,
                    block_size=4,
                    finish_reason="stop",
                    forwards=3,
                    question=problems[id.rpartition("/")[0]],
                    text=text,
                )
            )


def test_programs_are_run_against_their_tests(config, tmp_path, models_loaded, capsys):
    data = tmp_path / "Code.json"
    data.write_text(json.dumps([ADD, DOUBLE]))
    settings = config(
        f"evaluation.eval_dataset={data}",
        "evaluation.data_type=code",
        "rollout.num_response_per_task=2",
        "execute.allow_unsandboxed=true",
    )
    (unit,) = units_of(settings)
    texts = {
        "Code/0/0": "    return a + b\n```\n",
        "Code/0/1": "    return a - b\n```\n",
        "Code/1/0": "```python\nprint(2 * int(input()))\n```",
        "Code/1/1": "no program",
    }
    answered(unit.job.folder, {"Code/0": ADD["question"], "Code/1": DOUBLE["question"]}, texts)
    (row,) = json.loads(evaluate(settings).read_text())
    verdicts = {record["id"]: (record["correct"], record["reason"]) for record in records_of(unit.output)}
    assert verdicts == {
        "Code/0/0": (True, "correct"),
        "Code/0/1": (False, "wrong"),
        "Code/1/0": (True, "correct"),
        "Code/1/1": (False, "no_code"),
    }
    assert row["accuracy"] == 0.5 and row["isolation"] == sandbox.isolation(True)
    assert f"isolated by {row['isolation']}" in capsys.readouterr().out


def test_code_prompts_are_the_releases(config, tmp_path, story_teacher):
    """In rollouts as in evaluation: instruction by the row's test_method, the prefix as the answer's beginning."""
    data = tmp_path / "Code.json"
    data.write_text(json.dumps([ADD, DOUBLE | {"prefix": "not for scripts"}]))
    code = (f"evaluation.eval_dataset={data}", "evaluation.data_type=code", "rollout.max_token=8")
    settings = config(*code, "execute.allow_unsandboxed=true")
    evaluate(settings)
    project = (f"experiment.project={tmp_path}", f"evaluation.checkpoint_path={story_teacher}")
    released = rollout.roll_out(load(SampleConfig, [*code, *project]))
    tokenizer = AutoTokenizer.from_pretrained(story_teacher)
    function, stdio = (prompt_ids(TASKS["code"], row, tokenizer) for row in (ADD, DOUBLE))
    for folder in (units_of(settings)[0].job.folder, released.with_suffix("")):
        assert [answer.prompt_ids for answer in read_shards(folder, ordered=True)] == [function, stdio]
    assert [row["extracted_output"] for row in json.loads(released.read_text())] == [[""], [""]]


def test_options_are_letters(config, tmp_path, models_loaded):
    data = tmp_path / "Choice.json"
    rows = [{"question": f"Which, {i}?", "ground_truth_answer": "B"} for i in range(3)]
    data.write_text(json.dumps(rows))
    settings = config(f"evaluation.eval_dataset={data}", "evaluation.data_type=option")
    (unit,) = units_of(settings)
    texts = {"Choice/0/0": "so \\boxed{B. Rome}", "Choice/1/0": "so \\boxed{C}", "Choice/2/0": "so B"}
    answered(unit.job.folder, {f"Choice/{i}": row["question"] for i, row in enumerate(rows)}, texts)
    (row,) = json.loads(evaluate(settings).read_text())
    assert row["verdicts"] == {"correct": 1, "wrong": 1, "no_answer": 1} and not models_loaded


def test_questions_that_are_too_long_are_counted(config, tmp_path, story_questions):
    rows = json.loads(story_questions.read_text())[:3]
    rows[1]["question"] = "Tom has 3 apples. " * 100
    data = tmp_path / "Long.json"
    data.write_text(json.dumps(rows))
    (row,) = json.loads(evaluate(config(f"evaluation.eval_dataset={data}", "rollout.long_prompts=skip")).read_text())
    assert (row["n"], row["left_out"]) == (2, 1)


def test_without_a_sandbox_nothing_is_decoded(config, tmp_path, monkeypatch):
    data = tmp_path / "Code.json"
    data.write_text(json.dumps([DOUBLE]))

    def refuse(allow_unsandboxed=False):
        raise UserError("no sandbox here", "execute.allow_unsandboxed")

    monkeypatch.setattr(sandbox, "isolation", refuse)
    with raises_key("execute.allow_unsandboxed"):
        evaluate(config(f"evaluation.eval_dataset={data}", "evaluation.data_type=auto"))
    assert not (tmp_path / "results").exists()


def test_several_answers_per_question_give_pass_at_k(config, story_questions, models_loaded):
    questions = json.loads(story_questions.read_text())
    settings = config("rollout.num_response_per_task=3", "evaluation.limit=4")
    (unit,) = units_of(settings)
    right = {0: 3, 1: 1, 2: 0, 3: 1}  # of three answers each
    texts = {
        f"Story/{i}/{k}": f"\\boxed{{{questions[i]['ground_truth_answer'] if k < n else 'none'}}}"
        for i, n in right.items()
        for k in range(3)
    }
    problems = {f"Story/{i}": questions[i]["question"] for i in right}
    answered(unit.job.folder, problems, texts)
    (row,) = json.loads(evaluate(settings).read_text())
    assert row["n"] == 12 and row["questions"] == 4 and row["accuracy"] == pytest.approx(5 / 12) and not models_loaded
    assert [at["k"] for at in row["pass_at_k"]] == [1, 2, 3]
    # by hand: a question with one right of three has 1/3, 2/3, 1
    assert [at["estimate"] for at in row["pass_at_k"]] == pytest.approx([5 / 12, (1 + 2 / 3 + 2 / 3) / 4, 3 / 4])
    assert (row["ci_low"], row["ci_high"]) == (row["pass_at_k"][0]["ci_low"], row["pass_at_k"][0]["ci_high"])
    assert row["ci_low"] < row["accuracy"] < row["ci_high"]


# ---------------------------------------------------------------------------------------------------------------------
# Several units in one command


def test_a_protocol_over_data_sets_and_seeds_loads_the_model_once(
    config, tmp_path, story_questions, models_loaded, capsys
):
    second = tmp_path / "More.json"
    second.write_text(json.dumps(json.loads(story_questions.read_text())[8:]))
    more = (
        f"evaluation.eval_dataset=[{story_questions},{second}]",
        "evaluation.protocol=paper",
        "evaluation.protocol_blocks=[4]",
        "evaluation.seeds=[1,2]",
        "evaluation.limit=3",
    )
    output = evaluate(config(*more))
    said = capsys.readouterr().out
    assert len(models_loaded) == 1
    rows = json.loads(output.read_text())
    found = [(r["dataset"], r["denoising_steps_per_block"], r["strategy"].rpartition("_")[2], r["seed"]) for r in rows]
    settings = [(2, "static"), (1, "static"), (4, "static"), (4, "dynamic")]
    names = ("Story", "More")
    assert found[:16] == [(name, *setting, seed) for setting in settings for name in names for seed in (1, 2)]
    assert sorted(found[16:]) == sorted(("average", *setting, seed) for setting in settings for seed in (1, 2))
    for average in rows[16:]:
        key = ("denoising_steps_per_block", "strategy", "seed")
        parts = [row for row in rows[:16] if all(row[k] == average[k] for k in key)]
        assert average["accuracy"] == pytest.approx(sum(part["accuracy"] for part in parts) / 2)
        assert average["datasets"] == ["Story", "More"] and average["n"] == 6
    assert load(EvalConfig, [f"config={output.with_suffix('.yaml')}"]) == config(*more)
    assert len(list(tmp_path.rglob("config.yaml"))) == len(list(tmp_path.rglob("settings.json"))) == 16
    for table in ("Table 1: few-step", "Table 2: full-step", "Table 3: dynamic"):
        assert table in said and table in output.with_suffix(".html").read_text()

    # One seed and one data set of it later: nothing is decoded, and no model loaded.
    monday = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*")}
    smaller = evaluate(config(more[0].replace("[", "").replace("]", ""), *more[1:3], "rollout.seed=2", more[4]))
    assert len(models_loaded) == 1 and monday == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*")}
    again = [row for row in rows if row["seed"] == 2 and row["dataset"] != "average"]
    assert [row for row in json.loads(smaller.read_text()) if row["dataset"] != "average"] == again


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs these processes would share the cards")
def test_several_processes_share_every_unit(config, tmp_path):
    more = ("evaluation.seeds=[1,2]", "evaluation.limit=5")
    alone = json.loads(evaluate(config(*more, f"evaluation.output={tmp_path}/alone")).read_text())
    shared = evaluate(config(*more, f"evaluation.output={tmp_path}/shared", "rollout.num_processes=2"))
    timing = ("seconds", "tokens_per_second", "latency_mean", "latency_median")
    for one, two in zip(alone, json.loads(shared.read_text()), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in two.items() if k not in timing}
    for folder in (tmp_path / "shared").glob("*seed[12]"):
        assert [len(path.read_text().splitlines()) for path in shard_files(folder)] == [3, 2]


def test_a_protocol_sets_other_methods_beside_it(config, some_right, capsys):
    protocol = ("evaluation.protocol=full_step", "evaluation.limit=2", "evaluation.protocol_blocks=[4,8]")
    evaluate(config(*protocol))
    capsys.readouterr()
    evaluate(config(*protocol, "evaluation.method=t3d"))
    table = capsys.readouterr().out.partition("Table 2")[2].splitlines()
    assert table[1].split() == ["Block", "Tokens/step", "Method", "Story", "Gain,", "%"]
    assert [line.split()[:3] for line in table[3:7]] == [
        ["4", "1", "Original"],
        ["4", "1", "T3D"],
        ["8", "1", "Original"],
        ["8", "1", "T3D"],
    ]
    assert table[4].split()[-1] == table[6].split()[-1] == "+0.0"


def test_a_sweep_by_one_command(config, some_right, capsys):
    more = ("evaluation.protocol=sweep", "evaluation.protocol_blocks=[4]", "evaluation.thresholds=[0.2,0.9]")
    rows = json.loads(evaluate(config(*more, "evaluation.limit=4")).read_text())
    assert [row["decode"]["dynamic_threshold"] for row in rows] == [0.2, 0.9]
    assert "AUP: accuracy under parallelism" in capsys.readouterr().out


def test_students_are_labelled_by_their_training_and_stand_side_by_side(config, story_teacher, tmp_path, capsys):
    """Two runs of one project, whose folders have one name; the teacher, which no run made, stays the original."""
    protocol = ("evaluation.protocol=full_step", "evaluation.limit=2", "evaluation.protocol_blocks=[4,8]")
    model = load_model(str(story_teacher))
    evaluate(config(*protocol))
    for run, objective in (("first", "t3d"), ("second", "t3d"), ("third", "sft")):
        made_by = {"objective": objective, "project": "p", "run": run, "step": 1, "teacher": "x"}
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        folder = export_model(model, str(story_teacher), tmp_path / run / "ckpt" / "optimized", made_by=made_by)
        output = evaluate(config(*protocol, f"evaluation.checkpoint_path={folder}"))
        assert output.name.startswith(f"{objective}-p-{run}-optimized-")
    table = capsys.readouterr().out.rpartition("Table 2")[2]
    assert re.findall(r"^ *4 +1 +(\S+(?: \(\S+\))?)", table, re.MULTILINE) == [
        "Original", "sft", "t3d (first)", "t3d (second)"
    ]  # fmt: skip
    assert provenance(story_teacher) == {} and provenance(folder)["run"] == "third"
    assert "t3d.json" not in {path.name for path in export_model(model, str(folder), tmp_path / "again").iterdir()}


def test_an_output_of_ones_own_holds_all_units(config, tmp_path):
    output = evaluate(config("evaluation.seeds=[1,2]", "evaluation.limit=2", f"evaluation.output={tmp_path}/mine"))
    assert output == tmp_path / "mine.json" and len(json.loads(output.read_text())) == 2
    assert len(list((tmp_path / "mine").glob("original-*-seed?.json"))) == 2


def test_an_interrupted_set_of_units_goes_on(config, tmp_path, models_loaded, monkeypatch):
    more = ("evaluation.seeds=[1,2,3]", "evaluation.limit=3")
    grade_all = math_grading.grade_all

    def stop_at_the_second(*given):
        if len(list((tmp_path / "results").glob("*.json"))) == 1:
            raise KeyboardInterrupt
        return grade_all(*given)

    with monkeypatch.context() as patch:
        patch.setattr(math_grading, "grade_all", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(*more))
    assert len(list(tmp_path.rglob("shard-*"))) == 2
    rows = json.loads(evaluate(config(*more)).read_text())
    assert [row["seed"] for row in rows] == [1, 2, 3] and len(models_loaded) == 2
    for row, unit in zip(rows, units_of(config(*more)), strict=True):
        assert [row] == json.loads(unit.output.read_text())


def test_data_sets_that_differ_behind_a_dot_stand_apart(config, tmp_path, story_questions):
    names = [tmp_path / f"Story.v{i}.json" for i in (1, 2)]
    for name in names:
        name.write_text(story_questions.read_text())
    one, two = units_of(config(f"evaluation.eval_dataset=[{names[0]},{names[1]}]"))
    assert one.output != two.output and "-Story.v1-" in one.output.name
    assert dataset_names("Story.v1,Story.v2") == ["Story.v1", "Story.v2"]
    named = [config(f"evaluation.eval_dataset=Story.v{i}") for i in (1, 2)]
    assert results_file(named[0]) != results_file(named[1])


@pytest.mark.parametrize("more", ["rollout.self_verify=true", "rollout.energy_candidates=3"])
def test_a_protocols_settings_are_checked_too(config, more):
    name = more.partition("=")[0]
    protocol = ("evaluation.protocol=full_step", "evaluation.protocol_blocks=[1]")
    with raises_key(name):
        units_of(config(*protocol, more))
    assert len(units_of(config(protocol[0], "evaluation.protocol_blocks=[2]", more))) == 1


def test_units_of_a_protocol_need_fitting_blocks(config):
    with raises_key("evaluation.protocol_blocks", "=6", "a multiple of 4"):
        config("evaluation.protocol=paper", "evaluation.protocol_blocks=[4,6]")
    units = units_of(config("evaluation.protocol=dynamic", "evaluation.protocol_blocks=[6]"))
    assert [(unit.config.rollout.block_size, unit.config.rollout.denoising_steps_per_block) for unit in units] == [
        (6, 6)
    ]

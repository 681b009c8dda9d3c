"""Rollouts: the same trajectories whatever the processes, nothing lost or doubled by a kill, nothing mixed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from t3d.common.errors import UserError
from t3d.common.options import load
from t3d.data.release import read_release_json
from t3d.data.shards import read_shards, shard_files
from t3d.models.fingerprint import weights_fingerprint
from t3d.rollout.run import node_share, roll_out, throughput
from t3d.rollout.settings import SampleConfig
from t3d.tasks import TASKS, prompt_ids
from t3d.tasks.problems import load_problems
from tests.conftest import ROOT, launch_line, raises_key


@pytest.fixture
def rolled(tmp_path, rollout_line):
    """Roll out in this process; the folder of shards."""

    def run(name: str, *more: str):
        return roll_out(load(SampleConfig, rollout_line(tmp_path / name, *more))).with_suffix("")

    return run


def by_id(folder) -> dict[str, dict]:
    """All that the tokens depend on, and the forwards; not the time it took. Every id must be there once."""
    lines = [json.loads(line) for path in shard_files(folder) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: {key: value for key, value in line.items() if key != "seconds"} for line in lines}


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_that_are_no_numbers_end_with_the_model_named(rolled, broken_teacher, processes):
    with raises_key("model", "tiny-broken: step 1 "):
        rolled("broken", f"evaluation.checkpoint_path={broken_teacher}", f"rollout.num_processes={processes}")


def test_processes_and_batches_change_nothing(rolled, story_teacher):
    alone = rolled("one")
    expected = by_id(alone)
    assert sorted(expected) == sorted(f"Story/{row}/0" for row in range(24))
    assert len({tuple(record["response_ids"]) for record in expected.values()}) > 12, "the model says one thing only"

    two = rolled("two", "rollout.num_processes=2")
    assert [len(path.read_text().splitlines()) for path in shard_files(two)] == [12, 12]
    assert by_id(two) == expected
    assert by_id(rolled("few", "rollout.max_active=3")) == expected
    assert by_id(rolled("batches", "rollout.batch_size=1")) == expected

    tokenizer = AutoTokenizer.from_pretrained(story_teacher)
    for record in read_shards(alone):
        record.validate(tokenizer.mask_token_id)
        assert max(record.response_ids) < len(tokenizer), "an id beyond the tokenizer was drawn"
        assert record.length <= 24
        assert record.text == tokenizer.decode(record.response_ids[: record.length], skip_special_tokens=True)
        assert record.model == str(story_teacher)


def test_another_seed_gives_other_answers(rolled):
    first, second = (by_id(rolled(f"seed{seed}", f"rollout.seed={seed}", "rollout.temperature=1")) for seed in (1, 2))
    different = [key for key in first if first[key]["response_ids"] != second[key]["response_ids"]]
    assert len(different) > 12


def kill_in_the_middle(line: list[str], shard: Path, answers: int) -> None:
    """Start a rollout as a shell starts a job in the background, and kill -9 it once a shard has so many answers."""
    script = [sys.executable, "sample/sdar_sample.py", *line, "rollout.max_active=1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    process = subprocess.Popen(script, cwd=ROOT, **quiet, **ignoring)
    deadline = time.monotonic() + 120
    while not (shard.exists() and shard.read_bytes().count(b"\n") >= answers):
        assert process.poll() is None and time.monotonic() < deadline, "the rollout never got going"
        time.sleep(0.002)
    helpers = psutil.Process(process.pid).children()
    working = [helper for helper in helpers if "resource_tracker" not in " ".join(helper.cmdline())]
    process.kill()
    process.wait()
    assert not psutil.wait_procs(working, timeout=30)[1], "a process went on without its parent"


def test_kill_9_loses_and_doubles_nothing(tmp_path, rollout_line, rolled):
    whole = by_id(rolled("whole"))
    stem = tmp_path / "killed" / "temp_data" / "outputs-eval-tiny-teacher-Story"
    shard = stem / "shard-00000.jsonl"
    kill_in_the_middle(rollout_line(tmp_path / "killed"), shard, 4)
    before = shard.read_bytes()
    done = before.count(b"\n")
    assert 4 <= done < 24 and not stem.with_suffix(".json").exists()
    shard.write_bytes(before + b'{"id": "Story/23/0", "prompt_i')  # what a kill inside a write leaves

    resumed = rolled("killed")
    assert shard.read_bytes().startswith(before), "finished answers were touched"
    assert by_id(resumed) == whole
    sessions = [json.loads(line) for line in (stem / "sessions.jsonl").read_text().splitlines()]
    assert [session["answers"] for session in sessions] == [24 - done]

    written = shard.stat().st_mtime_ns
    rolled("killed")  # nothing is left to do
    assert shard.stat().st_mtime_ns == written


def test_kill_9_ends_all_processes_and_any_number_goes_on(tmp_path, rollout_line, rolled, story_questions):
    many = tmp_path / "Story.json"  # so many that the second process has not ended when the first is killed
    many.write_text(json.dumps(json.loads(story_questions.read_text()) * 20))
    more = (f"evaluation.eval_dataset={many}", "rollout.max_token=12")
    stem = tmp_path / "killed" / "temp_data" / "outputs-eval-tiny-teacher-Story"
    line = rollout_line(tmp_path / "killed", *more, "rollout.num_processes=2")
    kill_in_the_middle(line, stem / "shard-00000.jsonl", 10)
    done = sum(path.read_bytes().count(b"\n") for path in shard_files(stem))
    time.sleep(0.3)
    assert sum(path.read_bytes().count(b"\n") for path in shard_files(stem)) == done < 480
    assert by_id(rolled("killed", *more)) == by_id(rolled("whole", *more))


@pytest.mark.parametrize(
    "changed, key",
    [
        ("rollout.temperature=0.4", "temperature"),
        ("rollout.seed=3", "seed"),
        ("rollout.start_with_think=true", "start_with_think"),
        ("rollout.denoising_steps_per_block=2", "denoising_steps_per_block"),
        ("rollout.dtype=bfloat16", "dtype"),
        ("rollout.engine=sglang", "engine"),
    ],
)
def test_other_settings_do_not_mix(rolled, changed, key):
    rolled("project", "evaluation.limit=2")
    with raises_key(key, f"{key}=", "choose another experiment.project or delete the folder"):
        rolled("project", "evaluation.limit=2", changed)


def test_other_weights_do_not_mix(tmp_path, rolled, story_teacher):
    model = shutil.copytree(story_teacher, tmp_path / "tiny-teacher")
    rolled("project", "evaluation.limit=2", f"evaluation.checkpoint_path={model}")
    before, weights = weights_fingerprint(str(model)), model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_fingerprint(str(model)) != before
    with raises_key("weights"):
        rolled("project", "evaluation.limit=2", f"evaluation.checkpoint_path={model}")


def test_a_folder_from_before_a_setting_was_noted_goes_on(rolled):
    settings = rolled("project", "evaluation.limit=2") / "settings.json"
    noted = json.loads(settings.read_text())
    settings.write_text(json.dumps({key: value for key, value in noted.items() if key not in ("dtype", "engine")}))
    assert len(by_id(rolled("project", "evaluation.limit=3"))) == 3
    with raises_key("dtype", "dtype=auto", "dtype=bfloat16"):
        rolled("project", "evaluation.limit=3", "rollout.dtype=bfloat16")


def test_every_tensor_counts_in_the_fingerprint(tmp_path, story_teacher):
    weights = load_file(story_teacher / "model.safetensors")
    found = {weights_fingerprint(str(story_teacher))}
    for name in weights:
        changed = weights | {name: torch.full_like(weights[name], 0.5)}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        found.add(weights_fingerprint(str(tmp_path)))
    assert len(found) == 1 + len(weights)

    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    before = weights_fingerprint(str(tmp_path))
    weights["model.layers.1.mlp.up_proj.weight"].zero_()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert weights_fingerprint(str(tmp_path)) != before


def test_a_damaged_weights_file_is_one_line(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 40)
    with raises_key(tmp_path / "model.safetensors"):
        weights_fingerprint(str(tmp_path))


def test_more_and_fewer_questions_of_the_same_set(rolled):
    """A larger limit adds what is missing; a smaller one asks for a file with fewer rows."""
    rolled("project", "evaluation.limit=4")
    folder = rolled("project", "evaluation.limit=7")
    assert len(by_id(folder)) == 7
    assert load(SampleConfig, [f"config={folder / 'config.yaml'}"]).evaluation.limit == 7
    folder = rolled("project", "evaluation.limit=3")
    assert len(by_id(folder)) == 7
    assert len(json.loads(folder.with_suffix(".json").read_text())) == 3


@pytest.fixture
def one_long_question(tmp_path, story_questions):
    """A set whose second question has more tokens than the model has positions."""
    rows = json.loads(story_questions.read_text())[:3]
    rows[1]["question"] = "Tom has 3 apples. " * 100
    path = tmp_path / "Long.json"
    path.write_text(json.dumps(rows))
    return f"evaluation.eval_dataset={path}"


def test_the_remedy_for_a_long_prompt_helps(rolled, one_long_question):
    with raises_key("rollout.long_prompts"):  # no rollout.max_token makes room
        rolled("long", one_long_question)
    folder = rolled("long", one_long_question, "rollout.long_prompts=skip")
    assert set(by_id(folder)) == {"Long/0/0", "Long/2/0"}
    assert len(json.loads(folder.with_suffix(".json").read_text())) == 2


def test_the_longest_answer_that_fits_is_named(rolled):
    with raises_key("rollout.max_token", "=250") as error:
        rolled("near", "rollout.max_token=250", "evaluation.limit=1")
    assert error.value.key == "rollout.max_token"
    room = int(re.search(r"lower it to (\d+)", str(error.value))[1])
    assert len(by_id(rolled("near", f"rollout.max_token={room}", "evaluation.limit=1"))) == 1
    with pytest.raises(UserError):
        rolled("far", f"rollout.max_token={room + 1}", "evaluation.limit=1")


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 24])
def test_nodes_share_the_questions(story_questions, nodes):
    problems = load_problems(story_questions, "math")
    shares = [node_share(problems, nodes, index) for index in range(nodes)]
    assert [problem for share in shares for problem in share] == problems
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with raises_key("evaluation.num_node", "=25", "node 0"):
        node_share(problems, 25, 0)


def test_a_nodes_share_is_its_part_of_the_whole(tmp_path, rolled):
    whole = by_id(rolled("whole"))
    parts = {}
    for index in (0, 1):
        part = rolled("nodes", "evaluation.num_node=2", f"evaluation.node_index={index}")
        assert part.name == f"outputs-{index}-eval-tiny-teacher-Story"
        assert len(json.loads(part.with_suffix(".json").read_text())) == 12
        parts |= by_id(part)
    assert parts == whole


def test_two_responses_per_question_in_the_releases_layout(rolled, story_questions, story_teacher):
    tokenizer = AutoTokenizer.from_pretrained(story_teacher)
    folder = rolled("two", "rollout.num_response_per_task=2", "evaluation.limit=3", "rollout.temperature=1")
    rows = json.loads(folder.with_suffix(".json").read_text())
    questions = json.loads(story_questions.read_text())
    records = list(read_shards(folder, ordered=True))
    assert [record.id for record in records] == [f"Story/{row}/{sample}" for row in range(3) for sample in (0, 1)]
    assert any(a.response_ids != b.response_ids for a, b in zip(records[::2], records[1::2], strict=True))
    for index, row in enumerate(rows):
        mine = records[2 * index : 2 * index + 2]
        assert row["question"] == questions[index]["question"]
        assert row["solution"] == questions[index]["solution"], "the data set's own fields stay"
        assert tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] == mine[0].prompt_ids
        assert row["full_output"] == [record.text for record in mine]
        assert row["step_map"] == [record.unmask_step[: record.length] for record in mine]
        assert row["response_length"] == [record.length for record in mine]
        assert len(row["extracted_output"]) == 2
    back = list(read_release_json(folder.with_suffix(".json")))
    assert [asdict(record) for record in back] == [asdict(record) for record in records]


def test_without_the_unmasking_history(rolled):
    folder = rolled("bare", "evaluation.output_unmasking_history=false", "evaluation.limit=2")
    for row in json.loads(folder.with_suffix(".json").read_text()):
        assert "step_map" not in row and "unmask_step" not in row
        assert row["full_output"] and row["response_ids"]
    assert all(record.unmask_step for record in read_shards(folder)), "the shards keep it"


def test_start_with_think(rolled, story_teacher, story_questions):
    tokenizer = AutoTokenizer.from_pretrained(story_teacher)
    question = json.loads(story_questions.read_text())[0]["question"]
    folder = rolled("think", "rollout.start_with_think=true", "evaluation.limit=1")
    (record,) = read_shards(folder)
    assert record.prompt_ids == prompt_ids(TASKS["math"], {"question": question}, tokenizer, think=True)
    assert record.prompt_ids != prompt_ids(TASKS["math"], {"question": question}, tokenizer)
    assert record.prompt_ids[-5:] == tokenizer("\n<think>\n", add_special_tokens=False)["input_ids"]


def test_a_fault_in_a_spawned_process_is_one_line_too(rolled):
    for processes in (1, 2):
        with raises_key("rollout.max_token", "=1000", "256 positions"):
            rolled(f"long{processes}", "rollout.max_token=1000", f"rollout.num_processes={processes}")


def test_a_run_that_failed_before_its_first_answer_binds_no_other(rolled):
    with raises_key("rollout.max_token", "=1000"):
        rolled("project", "rollout.max_token=1000")
    assert len(by_id(rolled("project", "evaluation.limit=2"))) == 2


def test_throughput_adds_processes_and_takes_the_longest(tmp_path):
    assert throughput(tmp_path) == (None, 0.0)
    sessions = [(0, 100, 2.0), (1, 300, 3.0), (0, 60, 2.0)]
    lines = [json.dumps({"rank": r, "answers": 1, "tokens": t, "seconds": s, "host": "h"}) for r, t, s in sessions]
    (tmp_path / "sessions.jsonl").write_text("\n".join(lines) + '\n{"rank": 1, "ans')
    assert throughput(tmp_path) == (160 / 4 + 300 / 3, 4.0)


SLOW_SECOND_PROCESS = """
import sys, time
from t3d.rollout import run as rollout
from t3d.common.options import load
from t3d.rollout.settings import SampleConfig

decode_share = rollout.decode_share

def late(*arguments):
    rank, world = arguments[-2:]
    assert world == 2
    time.sleep(4 * rank)
    decode_share(*arguments)

rollout.decode_share = late
rollout.roll_out(load(SampleConfig))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs these processes would share the cards")
def test_launched_processes_join(tmp_path, rollout_line, rolled):
    """The first process writes the JSON; with a second that starts late it is whole only if the first waits."""
    script = tmp_path / "late.py"
    script.write_text(SLOW_SECOND_PROCESS)
    line = launch_line("2_cpu_processes.yaml", script, *rollout_line(tmp_path / "launched"))
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "launched" / "temp_data" / "outputs-eval-tiny-teacher-Story"
    assert [len(path.read_text().splitlines()) for path in shard_files(folder)] == [12, 12]
    assert len(json.loads(folder.with_suffix(".json").read_text())) == 24
    assert by_id(folder) == by_id(rolled("alone"))

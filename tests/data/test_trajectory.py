"""The trajectory record, its shards and the release's JSON."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from t3d.common.jsonfiles import read_json_array, write_json_array
from t3d.data.release import prepare_training_file, read_release_json, write_release_json
from t3d.data.shards import ReadReport, ShardWriter, claim_folder, finished_ids, read_shards
from t3d.data.trajectory import Trajectory, response_blocks, split_id
from tests.conftest import raises_key

ROOT = Path(__file__).resolve().parents[2]
MASK, PAD, END = 0, 1, 2
WORDS = {"<mask>": MASK, "<pad>": PAD, "<end>": END} | {word: i for i, word in enumerate("abcdefghijklmnop", 3)}


def encode(text: str) -> list[int]:
    return [WORDS[word] for word in text.split()]


def record(row: int = 0, sample: int = 0, **changes) -> Trajectory:
    """Prompt of 6, blocks of 4: the response has 2 tokens in the prompt's block, then two blocks."""
    values = dict(
        id=f"toy/{row}/{sample}",
        prompt_ids=[3, 4, 5, 6, 7, 8],
        response_ids=[9, 10, 11, 12, 13, 14, END, 15, PAD, PAD],
        unmask_step=[2, 1, 3, 5, 4, 6, 7, 8, 9, 9],
        length=7,
        block_size=4,
        finish_reason="stop",
        forwards=13,
        seconds=0.25,
        decode={"block_size": 4, "temperature": 0.1},
        model="toy",
        question=f"question {row}",
        ground_truth="118",
        text=f"answer “{row}”, {sample}\n",
    )
    return Trajectory(**(values | changes))


def write_all(folder: Path, trajectories, rank: int = 0) -> Path:
    with ShardWriter(folder, rank) as writer:
        for trajectory in trajectories:
            writer.write(trajectory)
    return writer.path


# --- the record


def test_a_valid_record_and_its_defaults():
    trajectory = record()
    assert trajectory.steps == 9
    assert record(unmask_step=[2, 2, 3, 5, 4, 6, 7, 8, 9, 9]).steps == 9  # step 1 unmasked none
    assert trajectory.validate(mask_id=MASK) is trajectory
    assert Trajectory.from_dict(json.loads(json.dumps(asdict(trajectory)))) == trajectory
    bare = {k: v for k, v in asdict(trajectory).items() if k not in ("steps", "decode", "model", "text", "seconds")}
    assert Trajectory.from_dict(bare).steps == 9


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(block_size=0), "block_size 0"),
        (dict(response_ids=[], unmask_step=[]), "response is empty"),
        (dict(unmask_step=[2, 1, 3]), "10 response ids but 3 unmask steps"),
        (dict(initial_ids=[1, 2]), "10 response ids but 2 initial ids"),
        (dict(log_probs=[-1.0]), "10 response ids but 1 log_probs"),
        (dict(prompt_ids=[3]), "do not end on a block of 4"),
        (dict(length=0), "length 0 is not in 1..10"),
        (dict(length=11), "length 11 is not in 1..10"),
        (dict(finish_reason="eos"), "finish_reason 'eos'"),
        (dict(unmask_step=[2, 0, 3, 5, 4, 6, 7, 8, 9, 9]), "step 0 is below 1"),
        (dict(steps=12), "steps 12 is not the last unmask step 9"),
        (dict(unmask_step=[2, 3, 1, 5, 4, 6, 7, 8, 9, 9]), "do not grow from block to block"),
    ],
)
def test_each_violation_names_the_record(changes, said):
    with pytest.raises(ValueError, match="toy/3/1: .*" + said):
        record(3, 1, **changes)


def test_a_mask_left_is_a_violation():
    with pytest.raises(ValueError, match="toy/0/0: mask id 8 in the prompt"):
        record().validate(mask_id=8)
    with pytest.raises(ValueError, match="mask id 15 in the response"):
        record().validate(mask_id=15)


def test_a_record_of_an_earlier_version_reads_where_its_retired_keys_are_empty():
    assert Trajectory.from_dict(asdict(record()) | {"target_ids": [], "target_step": []}) == record()


def test_from_dict_names_unknown_and_missing_keys():
    with pytest.raises(ValueError, match="toy/0/0: unknown key 'colour'"):
        Trajectory.from_dict(asdict(record()) | {"colour": 1})
    with pytest.raises(ValueError, match="toy/0/0: unknown key 'target_ids'"):
        Trajectory.from_dict(asdict(record()) | {"target_ids": [1]})
    with pytest.raises(ValueError, match="toy/0/0: key 'unmask_step' is missing"):
        Trajectory.from_dict({k: v for k, v in asdict(record()).items() if k != "unmask_step"})


def test_blocks_follow_the_absolute_grid():
    for size in (1, 3, 4, 8):
        for prompt in range(9):
            for response in range(1, 20):
                blocks = response_blocks(prompt, response, size)
                by_position = [(prompt + i) // size for i in range(response)]
                assert [b - by_position[0] for b in by_position] == [
                    i for i, (start, end) in enumerate(blocks) for _ in range(start, end)
                ]


def test_split_id():
    assert split_id("my/set/12/3") == ("my/set", 12, 3)
    with pytest.raises(ValueError, match="'12/3'"):
        split_id("12/3")


# --- shards


def test_shards_stream_in_order_and_sort_on_request(tmp_path):
    write_all(tmp_path, [record(10), record(2)], rank=1)
    write_all(tmp_path, [record(3, 1), record(3, 0)], rank=0)
    assert [t.id for t in read_shards(tmp_path)] == ["toy/3/1", "toy/3/0", "toy/10/0", "toy/2/0"]
    assert [t.id for t in read_shards(tmp_path, ordered=True)] == ["toy/2/0", "toy/3/0", "toy/3/1", "toy/10/0"]
    assert next(read_shards(tmp_path)) == record(3, 1)
    assert finished_ids(tmp_path) == {"toy/3/1", "toy/3/0", "toy/10/0", "toy/2/0"}
    assert finished_ids(tmp_path / "nowhere") == set()


@pytest.mark.parametrize("tail", [b'{"id": "toy/9/0", "prompt_', b'{"id": "toy/9/0", "prompt_\n', b"\0" * 70_000])
def test_a_torn_last_line_is_ignored_then_truncated(tmp_path, tail, caplog):
    path = write_all(tmp_path, [record(0), record(1)])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    write_all(tmp_path, [record(2)], rank=1)
    for ordered in (False, True):
        report = ReadReport()
        caplog.clear()
        assert [t.id for t in read_shards(tmp_path, report, ordered)] == ["toy/0/0", "toy/1/0", "toy/2/0"]
        assert report.torn == 1
        assert [r.message.split(": ", 1)[1] for r in caplog.records] == ["left out 1 torn last lines"]
    assert finished_ids(tmp_path) == {"toy/0/0", "toy/1/0", "toy/2/0"}
    with ShardWriter(tmp_path, 0) as writer:
        assert path.read_bytes() == whole
        writer.write(record(9))
    assert [t.id for t in read_shards(path)] == ["toy/0/0", "toy/1/0", "toy/9/0"]


def test_a_shard_with_only_a_torn_line_and_an_empty_one(tmp_path):
    (tmp_path / "shard-00000.jsonl").write_bytes(b'{"id"')
    (tmp_path / "shard-00001.jsonl").touch()
    assert list(read_shards(tmp_path)) == [] and finished_ids(tmp_path) == set()
    assert write_all(tmp_path, [record()]).read_bytes().startswith(b'{"id": "toy')


def test_a_repeated_id_is_dropped_and_counted(tmp_path, caplog):
    write_all(tmp_path, [record(0), record(1)], rank=0)
    write_all(tmp_path, [record(1, text="later"), record(2)], rank=1)
    for ordered in (False, True):
        report = ReadReport()
        found = list(read_shards(tmp_path, report, ordered))
        assert [t.id for t in found] == ["toy/0/0", "toy/1/0", "toy/2/0"] and report.repeated == 1
        assert found[1].text == record(1).text
    assert "1 repeated ids" in caplog.text


@pytest.mark.parametrize("bad", [b"{broken\n", b"7\n", b'{"id": "toy/1/0"}\n', b"\n"])
def test_a_bad_line_in_the_middle_names_file_and_line(tmp_path, bad):
    path = write_all(tmp_path, [record(0)])
    path.write_bytes(path.read_bytes() + bad)
    with open(path, "ab") as file:
        file.write(json.dumps(asdict(record(2))).encode() + b"\n")
    with raises_key(path, "line 2"):
        list(read_shards(tmp_path))


WRITER = """
import sys
from tests.data.test_trajectory import record
from t3d.data.shards import ShardWriter, finished_ids
folder, count = sys.argv[1], int(sys.argv[2])
done = finished_ids(folder)
with ShardWriter(folder, 0) as writer:
    for row in range(count):
        if f"toy/{row}/0" not in done:
            writer.write(record(row, decode={"ballast": "x" * 100_000}))
            print(row, flush=True)
"""


def test_kill_9_loses_and_doubles_nothing(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "100000"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    said = [int(process.stdout.readline()) for _ in range(20)]
    time.sleep(0.003)
    os.kill(process.pid, signal.SIGKILL)
    said += [int(line) for line in process.stdout.read().split()]
    process.wait()
    done = finished_ids(tmp_path)
    assert {f"toy/{row}/0" for row in said} <= done  # what was reported is there
    subprocess.run([*command, str(len(done) + 5)], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    report = ReadReport()
    rows = [split_id(t.id)[1] for t in read_shards(tmp_path, report)]
    assert rows == list(range(len(done) + 5)) and report == ReadReport()


def test_claim_folder_guards_the_settings(tmp_path):
    folder = tmp_path / "shards"
    settings = {"model": "toy", "top_p": 1.0, "stop_ids": (1, 2)}
    claim_folder(folder, settings)
    claim_folder(folder, settings)
    assert [p.name for p in folder.iterdir()] == ["settings.json"]
    with raises_key("top_p", "top_p=1.0", "top_p=0.9", "experiment.project"):
        claim_folder(folder, settings | {"top_p": 0.9})
    with raises_key("seed", "seed=(absent)", "seed=1"):
        claim_folder(folder, settings | {"seed": 1})
    with raises_key("model", "with model=toy, top_p=1.0", "has model=other, top_p=0.9: "):
        claim_folder(folder, settings | {"model": "other", "top_p": 0.9})
    with raises_key("top_p", "has top_p=(absent)"):
        claim_folder(folder, {"model": "toy", "stop_ids": [1, 2]})

    newer = settings | {"candidates": 1}  # a setting that the folder's version did not know
    claim_folder(folder, newer, {"candidates": 1})
    with raises_key("candidates", "candidates=1", "candidates=4"):
        claim_folder(folder, newer | {"candidates": 4}, {"candidates": 1})


# --- JSON lists


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_lists_stream_whatever_the_layout(tmp_path, indent, chunk):
    rows = [{"a": [i, {"b": "]}, [“é"}], "c": -1.5e3} for i in range(5)]
    path = tmp_path / "rows.json"
    path.write_text(" \n" + json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert list(read_json_array(path, chunk)) == rows


@pytest.mark.parametrize(
    "content, named",
    [(b"", "JSON list"), (b'{"a": 1}', "JSON list"), (b'[{"a": 1}, 3]', "row 1"), (b'[{"a": 1}, {"b"', "row 1")]
    + [(b'[{"a": 1}', "row 1"), (b"\xff\xfe[", "UTF-8"), (b'[{"a": "\xff"}]', "UTF-8")],
)
def test_broken_json_lists_are_named(tmp_path, content, named):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with raises_key(path, named):
        list(read_json_array(path))
    with raises_key(tmp_path / "nothing.json"):
        list(read_json_array(tmp_path / "nothing.json"))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "rows.json"
    write_json_array(path, [{"a": 1}])

    def failing():
        yield {"a": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_json_array(path, failing())
    assert json.loads(path.read_text()) == [{"a": 1}] and list(tmp_path.iterdir()) == [path]
    write_json_array(path, [])
    assert json.loads(path.read_text()) == []


# --- the release's JSON

ROWS = [{"question": f"question {i}", "ground_truth_answer": "118", "level": i} for i in range(12)]


def test_the_release_file_round_trips_exactly(tmp_path):
    trajectories = [record(2, 0), record(2, 1), record(10, 0, finish_reason="length", length=10)]
    trajectories[1].initial_ids = [0, 20, 0, 0, 21, 22, 0, 0, 0, 23]
    write_all(tmp_path / "shards", [trajectories[2], trajectories[1]], rank=0)
    write_all(tmp_path / "shards", [trajectories[0]], rank=1)
    path = tmp_path / "outputs.json"
    assert write_release_json(path, tmp_path / "shards", ROWS, lambda text, row: f"{row['level']}", str) == 2
    assert list(read_release_json(path)) == trajectories

    rows = json.loads(path.read_text())
    assert [row["question"] for row in rows] == ["question 2", "question 10"]
    first = rows[0]
    assert (first["ground_truth_answer"], first["level"], first["prompt"]) == ("118", 2, "[3, 4, 5, 6, 7, 8]")
    assert first["full_output"] == [t.text for t in trajectories[:2]]
    assert first["extracted_output"] == ["2", "2"] and first["response_length"] == [7, 7]
    assert first["step_map"] == [[2, 1, 3, 5, 4, 6, 7]] * 2  # to the end of the answer, as in the release
    assert first["unmask_step"][0] == trajectories[0].unmask_step

    write_release_json(tmp_path / "again.json", reversed(trajectories), ROWS)
    assert list(read_release_json(tmp_path / "again.json")) == trajectories

    result = prepare_training_file([path], tmp_path / "renamed.json")
    assert (result.rows, result.kept, result.tokens, result.steps) == (2, 3, 24, 27)
    assert result.finish_reasons == {"stop": 2, "length": 1}
    renamed = json.loads((tmp_path / "renamed.json").read_text())
    assert renamed[0]["answer"] == first["full_output"] and "full_output" not in renamed[0]
    assert list(read_release_json(tmp_path / "renamed.json")) == trajectories


def test_rows_of_another_data_set_are_refused(tmp_path):
    for rows in (ROWS[1:], []):
        with raises_key("question", "toy/2/0"):
            write_release_json(tmp_path / "x.json", [record(2)], rows)
    with raises_key("prompt_ids", "toy/2/0", "toy/2/1"):
        write_release_json(tmp_path / "x.json", [record(2), record(2, 1, prompt_ids=[3, 4])], ROWS)
    assert not list(tmp_path.iterdir())


def test_samples_of_a_problem_may_spell_their_model_differently_and_be_of_another_age(tmp_path):
    decode = {"block_size": 4, "temperature": 0.1}
    first = record(2, model="models/toy", decode=decode)
    later = record(2, 1, model="../models/toy", decode=decode | {"energy_candidates": 1})
    assert write_release_json(tmp_path / "x.json", [first, later], ROWS) == 1
    for changes, key in ((dict(model="models/other"), "model"), (dict(decode=decode | {"top_k": 5}), "decode")):
        with raises_key(key, "toy/2/0", "toy/2/1"):
            write_release_json(tmp_path / "x.json", [first, record(2, 1, **changes)], ROWS)


def test_invalid_records_are_errors_when_read_and_dropped_by_preprocessing(tmp_path):
    path, output = tmp_path / "outputs.json", tmp_path / "renamed.json"
    write_release_json(path, [record(0, 0), record(0, 1), record(1, 0)], ROWS)
    rows = json.loads(path.read_text())
    rows[0]["unmask_step"][0][0] = 0
    rows[1]["id"][0] = rows[0]["id"][1]
    path.write_text(json.dumps(rows))
    with raises_key(f"{path}, row 0", "response 0", "toy/0/0", "unmask step 0", "rename_key"):
        list(read_release_json(path))
    result = prepare_training_file([path], output)
    assert (result.rows, result.kept, result.dropped, result.repeated) == (1, 1, 1, 1)
    assert "toy/0/0: unmask step 0" in "\n".join(result.lines())
    assert list(read_release_json(output)) == [record(0, 1)]
    assert all(len(json.loads(output.read_text())[0][key]) == 1 for key in ("answer", "step_map", "response_length"))


def published(tmp_path: Path, key: str, texts: list[str], step_maps: list[list[int]]) -> Path:
    """A file as the published release writes it: no ids. The prompt has 6 tokens, so the blocks are 2, 4, 4, ..."""
    row = {"question": "q", "ground_truth_answer": "118", "prompt": "a b c d e f", key: texts, "step_map": step_maps}
    path = tmp_path / "SDAR-4B-Chat-toy.json"
    path.write_text(json.dumps([{"question": "p", "prompt": "a", key: [], "step_map": []}, row], indent=2))
    return path


@pytest.mark.parametrize("key", ["full_output", "answer"])
def test_published_files_without_ids_are_tokenised_and_checked(tmp_path, key, caplog):
    texts = [
        "g h i j k <end>",  # the last block is filled up
        "g h i j k",  # one step more than tokens, though texts have their ends here: tokenised shorter, steps shifted
        "g h i j k l m",  # no end: the unfinished block goes
        "g h i j",  # too few tokens for the steps
        "g h i j k <end>",  # shifted: step 3 in the first block, 2 in the second
        "g h",
        "g h i j k <end>",
        "g <mask> i j k <end>",
    ]
    # In the first, step 6 unmasked only what was cut after the end: numbers close up.
    step_maps = [[2, 1, 3, 5, 4, 7], [1, 1, 2, 3, 2, 3], [1, 2, 3, 4, 5, 6, 7]]
    step_maps += [[1, 2, 3, 4, 5, 6, 7], [1, 3, 2, 4, 5, 6], [0, 1], [], [1, 2, 3, 4, 5, 6]]
    path = published(tmp_path, key, texts, step_maps)
    report = ReadReport()
    with caplog.at_level(logging.WARNING):
        found = list(read_release_json(path, encode, stop_ids=[END], fill_id=PAD, mask_id=MASK, report=report))
    assert [t.id for t in found] == ["SDAR-4B-Chat-toy/1/0", "SDAR-4B-Chat-toy/1/2"]
    assert all(t.validate(MASK) and t.prompt_ids == encode("a b c d e f") for t in found)
    assert found[0].response_ids == encode("g h i j k <end>")
    assert found[0].unmask_step == [2, 1, 3, 5, 4, 6] and found[0].finish_reason == "stop" and found[0].length == 6
    assert found[1].response_ids == encode("g h i j k l") and found[1].finish_reason == "length"
    assert found[1].unmask_step == [1, 2, 3, 4, 5, 6] and found[1].length == 6
    assert found[0].ground_truth == "118" and found[0].question == "q"
    assert report.mismatched == 6 and report.first_mismatch.endswith("/1: 5 tokens, 6 steps")
    assert len(caplog.records) == 1 and "6 responses that do not fit their step map" in caplog.text


def test_texts_that_have_lost_their_special_tokens_get_their_end_back(tmp_path):
    path = published(tmp_path, "answer", ["g h i j k", "g h i j k l"], [[1, 1, 2, 3, 2, 3], [1, 2, 3, 4, 5, 6]])
    ended, cut = read_release_json(path, encode, stop_ids=[END], fill_id=PAD)
    assert ended.response_ids == encode("g h i j k <end>") and ended.unmask_step == [1, 1, 2, 3, 2, 3]
    assert (ended.finish_reason, cut.finish_reason) == ("stop", "length")


def test_the_lost_tail_of_the_last_block_is_filled_at_its_last_step(tmp_path):
    path = published(tmp_path, "answer", ["g h i <end>"], [[1, 2, 4, 3]])
    (found,) = read_release_json(path, encode, stop_ids=[END], fill_id=PAD)
    assert found.response_ids == encode("g h i <end> <pad> <pad>") and found.unmask_step == [1, 2, 4, 3, 4, 4]
    assert (found.length, found.finish_reason) == (4, "stop")
    (found,) = read_release_json(path, encode, stop_ids=[END])
    assert found.response_ids[-2:] == [END, END]


def test_text_without_ids_needs_a_tokenizer_and_a_prompt(tmp_path):
    path = published(tmp_path, "answer", ["g h"], [[1, 2]])
    with raises_key("response_ids", "row 0", "tokenizer"):
        list(read_release_json(path))
    path.write_text(json.dumps([{"question": "a b", "answer": ["g h"], "step_map": [[1, 2]]}]))
    with raises_key("prompt", "row 0"):
        list(read_release_json(path, encode))
    path.write_text(json.dumps(ROWS))
    with raises_key("step_map", "row 0", "full_output"):
        list(read_release_json(path, encode))


def test_preprocessing_published_files(tmp_path):
    path = published(tmp_path, "full_output", ["g h", "", "g h"], [[1, 2], [1], []])
    result = prepare_training_file([path], tmp_path / "renamed.json")
    assert (result.kept, result.mismatched, result.without_ids) == (1, 2, 1)
    (row,) = json.loads((tmp_path / "renamed.json").read_text())
    assert row["answer"] == ["g h"] and row["step_map"] == [[1, 2]] and "full_output" not in row
    path = published(tmp_path, "full_output", [""], [[1]])
    with raises_key(path, "roll out again"):
        prepare_training_file([path], tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()

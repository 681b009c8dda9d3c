"""Training columns and the order of training."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

from t3d.common.errors import UserError
from t3d.data.dataset import blocks_within, hub_rows, load_examples, load_trajectories
from t3d.data.release import write_release_json
from t3d.data.rows import read_rows
from t3d.data.shards import ShardWriter
from t3d.data.trajectory import Trajectory, response_blocks
from t3d.training.order import SampleOrder
from tests.conftest import raises_key

MASK, PAD, END = 0, 1, 2
WORDS = {"<mask>": MASK, "<pad>": PAD, "<end>": END} | {word: i for i, word in enumerate("abcdefghijklmnop", 3)}


class ToyTokenizer:
    pad_token_id, eos_token_id, unk_token_id, all_special_ids = PAD, END, None, [MASK, PAD, END]
    chat_template = "the answer, then <end>"

    def get_vocab(self) -> dict[str, int]:
        return WORDS

    def __len__(self) -> int:
        return len(WORDS)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, add_special_tokens)}

    def apply_chat_template(self, turns, tokenize: bool, add_generation_prompt: bool) -> str:
        return f"{turns[-1]['content']} <end>"

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        words = {i: word for word, i in WORDS.items()}
        return " ".join(words[i] for i in ids if not (skip_special_tokens and i in self.all_special_ids))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [WORDS[word] for word in text.split()]


def record(
    row: int, prompt_len: int = 6, response_len: int = 10, size: int = 4, length: int | None = None
) -> Trajectory:
    steps = [
        b
        for b, (start, end) in enumerate(response_blocks(prompt_len, response_len, size), 1)
        for _ in range(start, end)
    ]
    return Trajectory(
        id=f"toy/{row}/0",
        prompt_ids=[3 + i % 9 for i in range(prompt_len)],
        response_ids=[4 + (row + i) % 9 for i in range(response_len)],
        unmask_step=steps,
        length=length or response_len,
        block_size=size,
        finish_reason="length",
        question=f"question {row}",
        ground_truth="1",
    )


def shards(folder: Path, records) -> Path:
    with ShardWriter(folder, 0) as writer:
        for trajectory in records:
            writer.write(trajectory)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "t3d"


@pytest.fixture
def load():
    def load(path, **changes):
        arguments = dict(tokenizer=ToyTokenizer(), mask_id=MASK, max_prompt_len=8, max_gen_length=64)
        return load_trajectories(path, **(arguments | changes))

    return load


# --- trajectories


def test_columns_are_the_records(tmp_path, load):
    records = [record(i, response_len=6 + 4 * (i % 3), length=5) for i in range(7)]
    for one in records[3:]:
        one.initial_ids = [MASK, *range(20, 19 + len(one.response_ids))]
    folder = shards(tmp_path / "shards", records)
    write_release_json(tmp_path / "file.json", folder)
    for path in (folder, folder / "shard-00000.jsonl", tmp_path / "file.json"):
        data, report = load(path)
        own = ["id", "prompt_ids", "response_ids", "unmask_step", "length", "initial_ids"]
        assert data.column_names == [*own, "max_token"]
        expected = {name: [getattr(t, name) for t in records] for name in own}
        assert data[:] == expected | {"max_token": [t.decode.get("max_token", 0) for t in records]}
        assert (report.kept, report.block_size, report.source) == (7, 4, path.name)
        assert data.cache_files  # on disk, memory-mapped


def test_long_prompts_are_left_out_and_long_answers_cut_at_a_block(tmp_path, load, caplog):
    records = [
        record(0),
        record(1, prompt_len=9, response_len=7),
        record(2, response_len=18),
        record(3, 7, 13, length=9),
    ]
    data, report = load(shards(tmp_path / "shards", records), max_gen_length=12)
    assert data["id"] == ["toy/0/0", "toy/2/0", "toy/3/0"]
    assert [len(ids) for ids in data["response_ids"]] == [10, 10, 9] and data["length"] == [10, 10, 9]
    assert (
        data[1]["response_ids"] == records[2].response_ids[:10]
        and data[1]["unmask_step"] == records[2].unmask_step[:10]
    )
    assert (report.kept, report.long_prompts, report.cut_answers) == (3, 1, 2)
    said = "shards: 3 sequences, 1 left out because the prompt is too long, 2 cut to the maximum length"
    assert [r.message for r in caplog.records if r.name == "t3d.data.dataset"] == [said]


def test_blocks_within_is_the_largest_cut_on_the_grid():
    for size in (1, 4, 8):
        for prompt in range(10):
            for blocks in range(1, 6):
                response = (prompt // size + blocks) * size - prompt
                for most in range(1, 30):
                    cuts = [end for _, end in response_blocks(prompt, response, size) if end <= most]
                    assert blocks_within(prompt, response, size, most) == max(cuts, default=0)


def test_a_cached_set_says_its_counts_and_a_changed_file_is_read_again(tmp_path, load, caplog):
    folder = shards(tmp_path / "shards", [record(0), record(1, prompt_len=9, response_len=7)])
    first, report = load(folder)
    caplog.clear()
    again, same = load(folder)
    assert (
        same == report
        and again.cache_files == first.cache_files
        and "1 left out because the prompt is too long" in caplog.text
    )
    assert load(folder, max_prompt_len=9)[1].kept == 2
    shards(folder, [record(2)])
    assert load(folder)[1].kept == 2


def test_torn_lines_and_repeated_ids_are_counted(tmp_path, load):
    folder = shards(tmp_path / "shards", [record(0), record(0), record(1)])
    with open(folder / "shard-00000.jsonl", "a") as file:
        file.write('{"id": "toy/2')
    data, report = load(folder)
    assert data["id"] == ["toy/0/0", "toy/1/0"] and (report.repeated, report.torn) == (1, 1)


def test_limit_keeps_the_first(tmp_path, load):
    data, report = load(shards(tmp_path / "shards", [record(i) for i in range(5)]), limit=2)
    assert data["id"] == ["toy/0/0", "toy/1/0"] and report.kept == 2


def test_another_prompt_keeps_the_blocks_of_the_rollout(tmp_path, load):
    folder = shards(tmp_path / "shards", [record(0, response_len=18)])
    plain = load(folder, max_gen_length=12)[0]
    data, _ = load(folder, max_gen_length=12, prompt_ids=lambda question: [len(question)] * 3)
    assert data["prompt_ids"] == [[10, 10, 10]] and data["response_ids"] == plain["response_ids"]
    assert plain["prompt_ids"] == [record(0).prompt_ids]
    assert load(folder, prompt_ids=lambda question: [1])[0]["prompt_ids"] == [[1]]


def test_published_files_are_tokenised(tmp_path, load, caplog):
    row = {
        "question": "q",
        "prompt": "a b c d e f",
        "answer": ["g h i <end>", "g h i"],
        "step_map": [[1, 2, 4, 3], [1]],
    }
    path = tmp_path / "old.json"
    path.write_text(json.dumps([row]))
    data, report = load(path)
    assert data[0]["response_ids"] == [9, 10, 11, END, PAD, PAD] and data[0]["unmask_step"] == [1, 2, 4, 3, 4, 4]
    assert data["length"] == [4] and report.mismatched == 1 and report.block_size == 4
    assert "1 left out because text and step map differ" in caplog.text


def written(**changes) -> Trajectory:
    """A record as a rollout of the toy tokenizer leaves it."""
    one = record(0)
    one.text, one.model = ToyTokenizer().decode(one.response_ids), "models/teacher"
    for name, value in changes.items():
        setattr(one, name, value)
    return one


def test_trajectories_of_another_model_are_refused(tmp_path, load):
    folder = shards(tmp_path / "shards", [written()])
    for model in ("models/teacher", "owner/teacher", None):
        assert load(folder, model=model)[1].kept == 1
    with raises_key("dataset.allow_other_model", "models/teacher") as error:
        load(folder, model="models/larger")
    assert error.value.key == "dataset.allow_other_model"


def test_another_tokenizers_ids_are_refused(tmp_path, load):
    others = [
        written(response_ids=[len(WORDS)] * 10),  # beyond the vocabulary, with or without a model's name
        written(response_ids=[len(WORDS)] * 10, model=""),
        written(text="another text"),  # other words at these ids
    ]
    for number, other in enumerate(others):
        folder = shards(tmp_path / f"shards{number}", [other])
        with raises_key("dataset.optimization_data", "toy/0/0") as error:
            load(folder, model=None)
        assert error.value.key == "dataset.optimization_data"
    other.question = ToyTokenizer().decode(other.prompt_ids[1:])
    assert load(shards(tmp_path / "asked", [other]))[1].kept == 1, "the question is in the prompt"


@pytest.mark.parametrize(
    "records, changes, named",
    [
        ([record(0, 9, 7)], {}, "1 left out because the prompt is too long; raise max_prompt"),
        ([record(0)], {"max_gen_length": 1}, "1 left out because no block fits"),
        ([record(0), record(1, size=8)], {}, "4 and 8 (toy/1/0)"),
        ([record(0)], {"mask_id": 5}, "toy/0/0: mask id 5 in the prompt"),
        ([], {}, "no shards"),
    ],
)
def test_unusable_sets_are_user_errors(tmp_path, load, records, changes, named):
    if not records:
        (tmp_path / "shards").mkdir()
    else:
        shards(tmp_path / "shards", records)
    with raises_key(tmp_path / "shards", named):
        load(tmp_path / "shards", **changes)


def test_a_missing_file_is_a_user_error(tmp_path, load):
    with raises_key(tmp_path / "nothing.json"):
        load(tmp_path / "nothing.json")


# --- examples


def examples(path, **changes):
    encode = ToyTokenizer().encode
    arguments = dict(max_prompt_len=4, max_gen_length=4, question_key="question", answer_key="answer", block_size=1)
    return load_examples(
        path,
        prompt_ids=lambda row: encode("a " + row["question"], add_special_tokens=False),
        **({"answer_ids": lambda text: [*encode(text, add_special_tokens=False), END]} | arguments | changes),
    )


@pytest.mark.parametrize("lines", [False, True])
def test_examples_end_with_the_turn(tmp_path, lines):
    rows = [
        {"question": "b", "answer": "c d"},
        {"question": "b c d e", "answer": "c"},
        {"question": "e", "answer": ["f g h i j", "k"]},
    ]
    path = tmp_path / ("set.jsonl" if lines else "set.json")
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    data, report = examples(path)
    assert data[:] == {
        "id": ["set/0/0", "set/2/0", "set/2/1"],
        "prompt_ids": [[3, 4], [3, 7], [3, 7]],
        "response_ids": [[5, 6, END], [8, 9, 10, 11], [13, END]],
        "length": [3, 4, 2],
    }
    assert (report.kept, report.long_prompts, report.cut_answers) == (3, 1, 1)
    assert examples(path, limit=1)[0]["id"] == ["set/0/0"]


def test_an_answer_that_cannot_be_encoded_names_its_row(tmp_path):
    def refuse(text: str) -> list[int]:
        raise UserError("answer: it holds <end>", "answer")

    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"question": "b", "answer": ""}, {"question": "b", "answer": "c"}]))
    with raises_key("answer", "row 1", "<end>") as error:
        examples(path, answer_ids=refuse)
    assert error.value.key == "answer"


def test_blank_lines_are_no_rows_and_empty_answers_no_examples(tmp_path, caplog):
    rows = [{"question": "b", "answer": answer} for answer in ("c", "", [], ["d", " \n"])]
    (tmp_path / "set.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n \n\n")
    data, report = examples(tmp_path / "set.jsonl")
    assert data["id"][:] == ["set/0/0", "set/3/0"] and data["response_ids"][:] == [[5, END], [6, END]]
    assert report.no_answer == 3 and "3 left out because the answer is empty" in caplog.text


@pytest.mark.parametrize(
    "row, key, named",
    [
        ({"question": "a"}, "dataset.answer_key", "set.json, row 1"),
        ({"answer": "a"}, "dataset.question_key", "set.json, row 1"),
        ({"question": "a", "answer": ["b", "\ud83d"]}, "{path}, row 1", r"'\ud83d'"),
    ],
)
def test_examples_name_the_row_and_the_key(tmp_path, row, key, named):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"question": "b", "answer": "c"}, row]))
    with raises_key(key.format(path=path), named):
        examples(path)


CONVERSATIONS = [
    {"system": "s", "conversations": [{"from": "user", "value": "b"}, {"from": "assistant", "value": "c d"}]},
    {"system": "s", "conversations": [{"from": "user", "value": "e"}, {"from": "assistant", "value": "f"}]},
]
NESTED = {"question_key": "conversations.0.value", "answer_key": "conversations.1.value"}


def test_what_holds_no_examples_is_told(tmp_path):
    (tmp_path / "shard-00000.jsonl").write_text("{}\n")
    with raises_key("dataset.optimization_data"):
        examples(tmp_path)
    (tmp_path / "set.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with raises_key(tmp_path / "set.jsonl", "line 1"):
        examples(tmp_path / "set.jsonl")


def test_examples_of_nested_columns_and_parquet(tmp_path):
    """The layout of Bespoke-Stratos-17k: turns in a list."""
    import datasets

    (tmp_path / "set.json").write_text(json.dumps(CONVERSATIONS))
    datasets.Dataset.from_list(CONVERSATIONS).to_parquet(tmp_path / "set.parquet")
    for path in (tmp_path / "set.json", tmp_path / "set.parquet"):
        data, _ = examples(path, **NESTED)
        assert data["prompt_ids"][:] == [[3, 4], [3, 7]] and data["response_ids"][:] == [[5, 6, END], [8, END]]
    with raises_key("dataset.answer_key", "row 0", "=conversations.2.value"):
        examples(tmp_path / "set.json", **NESTED | {"answer_key": "conversations.2.value"})
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with raises_key(tmp_path / "torn.parquet"):
        examples(tmp_path / "torn.parquet")


def test_a_set_of_the_hub_is_brought_once(cache, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name != "owner/set":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nmore")
        return datasets.Dataset.from_list(CONVERSATIONS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    paths = [hub_rows(source) for source in ("owner/set", "owner/set", "owner/set:test")]
    assert asked == [("owner/set", "train"), ("owner/set", "test")] and paths[0] == paths[1] != paths[2]
    assert list(read_rows(paths[0])) == CONVERSATIONS
    with raises_key("dataset.optimization_data", "=hub:owner/none"):
        hub_rows("owner/none")
    assert len(list(cache.iterdir())) == 2


# --- the training order


def test_every_epoch_has_each_sample_once_in_another_order():
    order = SampleOrder(num_samples=10, global_batch=4, seed=7)
    pairs = [pair for step in range(15) for pair in order.indices(step)]
    assert Counter(pairs) == Counter((epoch, i) for epoch in range(6) for i in range(10))
    epochs = [[i for e, i in pairs if e == epoch] for epoch in range(6)]
    assert [e for e, _ in pairs] == sorted(e for e, _ in pairs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert {e for e, _ in order.indices(2)} == {0, 1}  # over the border


def test_the_order_is_a_pure_function():
    order = SampleOrder(10, 4, seed=7)
    forward = [order.indices(step) for step in range(20)]
    assert [SampleOrder(10, 4, seed=7).indices(step) for step in (19, 3, 11)] == [forward[s] for s in (19, 3, 11)]
    assert order.indices(1) == forward[1]  # back again, from a filled cache
    assert SampleOrder(10, 4, seed=8).indices(0) != forward[0]
    assert len(order._permutations) <= 2


def test_a_batch_may_be_larger_than_the_set():
    order = SampleOrder(num_samples=3, global_batch=8, seed=0)
    pairs = order.indices(0) + order.indices(1) + order.indices(2)
    assert len(order.indices(0)) == 8 and Counter(pairs) == Counter((e, i) for e in range(8) for i in range(3))


@pytest.mark.parametrize("step", [0, 2, 9])
def test_the_same_samples_for_any_number_of_processes(step):
    order = SampleOrder(num_samples=10, global_batch=8, seed=1)
    for world in (1, 2, 4):
        shares = [SampleOrder(10, 8, seed=1).share(step, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {8 // world}
        assert sorted(sum(shares, [])) == sorted(order.indices(step))
    for rank, world in ((0, 3), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"process {rank} of {world} cannot share a global batch of 8"):
            order.share(step, rank, world)


def test_another_batch_size_and_number_of_processes_go_on_in_the_same_order():
    """Batches of 4 on one process, then of 6 on three, then of 5 on one: each sample once an epoch all the same."""
    straight = SampleOrder(10, 1, seed=7)
    whole = [straight.indices(step)[0] for step in range(36)]
    order, steps, drawn = SampleOrder(10, 4, seed=7), 0, []
    for batch, world, count in ((4, 1, 2), (6, 3, 3), (5, 1, 2)):
        order = SampleOrder(10, batch, seed=7).resumed(steps, len(drawn))
        for step in range(steps, steps + count):
            assert order.consumed(step) == len(drawn)
            shares = [order.share(step, rank, world) for rank in range(world)]
            drawn += [pair for pairs in zip(*shares, strict=True) for pair in pairs]
        steps += count
    assert drawn == whole
    assert order.steps(4) == 7  # 36 of 40 are drawn after 7 steps, and 4 make no batch of 5


def test_steps():
    assert SampleOrder(10, 4, 0).steps(3) == 7
    assert SampleOrder(10, 4, 0).steps(0.5) == 1
    assert SampleOrder(10, 64, 0).steps(1) == 1
    with pytest.raises(ValueError, match="num_samples 0"):
        SampleOrder(0, 4, 0)


@pytest.fixture(autouse=True)
def _log_everything(caplog):
    caplog.set_level(logging.INFO, logger="t3d")

"""Trajectories and worked answers as memory-mapped columns."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t3d.common.errors import UserError
from t3d.common.jsonfiles import atomic_write, check_characters
from t3d.common.paths import model_name
from t3d.data.prompts import end_of_turn_id
from t3d.data.release import read_release_json
from t3d.data.rows import column, read_rows
from t3d.data.shards import ReadReport, read_shards, shard_files
from t3d.data.trajectory import Trajectory

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------- trajectories


@dataclass
class DropReport:
    """Counts of kept and left-out sequences of a training set; loading prints them in one line."""

    kept: int = 0
    long_prompts: int = 0  # left out: the prompt is over max_prompt_len
    cut_answers: int = 0  # kept, cut to max_gen_length
    no_room: int = 0  # left out: no whole block is left after the cut
    no_answer: int = 0  # left out: the answer is empty
    mismatched: int = 0  # left out: text without ids that does not fit its step map
    repeated: int = 0  # left out: the id was there before
    torn: int = 0  # unfinished last lines
    block_size: int | None = None  # of the rollouts
    source: str = ""

    def line(self) -> str:
        parts = (
            (self.long_prompts, "left out because the prompt is too long"),
            (self.cut_answers, "cut to the maximum length"),
            (self.no_room, "left out because no block fits"),
            (self.no_answer, "left out because the answer is empty"),
            (self.mismatched, "left out because text and step map differ"),
            (self.repeated, "repeated ids left out"),
            (self.torn, "torn last lines ignored"),
        )
        return f"{self.source}: {self.kept} sequences" + "".join(f", {count} {what}" for count, what in parts if count)

    def announce(self) -> None:
        lost = self.long_prompts + self.cut_answers + self.no_room + self.no_answer
        lost += self.mismatched + self.repeated + self.torn
        log.log(logging.WARNING if lost else logging.INFO, "%s", self.line())


def read_trajectories(path: str | Path, report: ReadReport | None = None, **release: Any) -> Iterator[Trajectory]:
    """Stream trajectories from a shard folder, a .jsonl shard or a release-layout JSON (with that reader's options)."""
    path = Path(path)
    if path.is_dir() and not shard_files(path):
        raise UserError(f"{path} holds no shard-*.jsonl; run sample/sdar_sample.py first", str(path))
    if not path.exists():
        raise UserError(f"{path} does not exist; run sample/sdar_sample.py and data/rename_key.py first", str(path))
    if path.is_dir() or path.suffix == ".jsonl":
        return read_shards(path, report)
    return read_release_json(path, report=report, **release)


def load_trajectories(
    path: str | Path,
    *,
    tokenizer: Any,
    mask_id: int,
    max_prompt_len: int,
    max_gen_length: int,
    limit: int | None = None,
    prompt_ids: Callable[[str], list[int]] | None = None,
    model: str | None = None,
) -> "tuple[Dataset, DropReport]":
    """Trajectories as memory-mapped columns: id, prompt_ids, response_ids, unmask_step, length, initial_ids (x_T of
    the response; empty where it was all masks), max_token (the decoder's; 0 = not known).

    Prompts over `max_prompt_len` tokens are left out. Responses over `max_gen_length` keep the whole blocks that fit
    (`blocks_within`); `length` is then at most that. `limit` keeps the first `limit` sequences. The columns are built
    in a stream, once per file and arguments, in the cache of `datasets`.

    Args:
        tokenizer: the student's. The trajectories must have its ids; it tokenises published text without ids.
        prompt_ids: question -> ids that replace the rollout's prompt in the columns. (The release trains without the
            rollout's instruction.) The blocks to keep are still the rollout's.
        model: a path or hub id; trajectories of a model with another name are refused. None = every model is accepted.

    Returns:
        The data set and its counts, with the rollouts' `block_size`.

    Raises:
        UserError: nothing left, mixed block sizes, a mask id in a record, another tokenizer's ids, a broken file.
    """
    path = Path(path)
    ends = (end_of_turn_id(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    stop_ids = list(dict.fromkeys(token for token in ends if token is not None))

    def generate(report: DropReport) -> Iterator[dict[str, Any]]:
        read = ReadReport()
        encode = partial(tokenizer.encode, add_special_tokens=False)
        special = {"stop_ids": stop_ids, "fill_id": tokenizer.pad_token_id, "mask_id": mask_id}
        for record in read_trajectories(path, read, encode=encode, **special):
            if report.kept == limit:
                break
            _check_record(record, path, mask_id, report)
            _check_origin(record, path, tokenizer, model)
            prompt = record.prompt_ids if prompt_ids is None else prompt_ids(record.question)
            if row := _trajectory_row(record, prompt, max_prompt_len, max_gen_length, report):
                yield row
        report.mismatched, report.repeated, report.torn = read.mismatched, read.repeated, read.torn

    columns = ("id", "prompt_ids", "response_ids", "unmask_step", "length", "initial_ids", "max_token")
    encoding = (stop_ids, _vocabulary_key(tokenizer), prompt_ids and _callables_key(prompt_ids))
    arguments = (mask_id, max_prompt_len, max_gen_length, limit, model and model_name(model), *encoding)
    return _build(path, columns, generate, arguments)


def _check_record(record: Trajectory, path: Path, mask_id: int, report: DropReport) -> None:
    try:
        record.validate(mask_id)
    except ValueError as error:
        raise UserError(f"{path}: {error}; roll out again with this model", str(path)) from error
    report.block_size = report.block_size or record.block_size
    if record.block_size != report.block_size:
        sizes = f"{report.block_size} and {record.block_size} ({record.id})"
        raise UserError(f"{path}: rollouts with block sizes {sizes} are mixed; train on one of them", str(path))


def _check_origin(record: Trajectory, path: Path, tokenizer: Any, model: str | None) -> None:
    """Raises UserError if a record comes from another model or another tokenizer.

    The ids come from this tokenizer if it turns them back into the record's text or question.
    """
    fits = max([*record.prompt_ids, *record.response_ids]) < len(tokenizer)
    if fits and record.model:
        text = tokenizer.decode(record.response_ids[: record.length], skip_special_tokens=True)
        fits = text == record.text or record.question in tokenizer.decode(record.prompt_ids)
    if not fits:
        by = f", of {record.model}," if record.model else ""
        raise UserError(
            f"{path}: {record.id}{by} does not have this model's token ids; roll out again with this model's tokenizer",
            "dataset.optimization_data",
        )
    if model and record.model and model_name(record.model) != model_name(model):
        key = "dataset.allow_other_model"
        raise UserError(
            f"{key}=false: {path} holds trajectories of {record.model}, and the model to train is {model}; roll out "
            f"with {model}, or set {key}=true to learn from another model",
            key,
        )


def _trajectory_row(
    record: Trajectory, prompt: list[int], max_prompt_len: int, max_gen_length: int, report: DropReport
) -> dict[str, Any] | None:
    """A record's columns, counted; None if it is left out."""
    response = len(record.response_ids)
    keep = blocks_within(len(record.prompt_ids), response, record.block_size, max_gen_length)
    if len(prompt) > max_prompt_len:
        report.long_prompts += 1
        return None
    if keep < 1:
        report.no_room += 1
        return None
    report.kept += 1
    report.cut_answers += keep < response
    return {
        "id": record.id,
        "prompt_ids": prompt,
        "response_ids": record.response_ids[:keep],
        "unmask_step": record.unmask_step[:keep],
        "length": min(record.length, keep),
        "initial_ids": record.initial_ids[:keep],
        "max_token": record.decode.get("max_token", 0),
    }


def blocks_within(prompt_len: int, response_len: int, block_size: int, max_gen_length: int) -> int:
    """The number of response tokens to keep: all, or the whole blocks with at most `max_gen_length` of them.

    The blocks lie on the grid of prompt + response.
    """
    if response_len <= max_gen_length:
        return response_len
    return max(0, (prompt_len + max_gen_length) // block_size * block_size - prompt_len)


# ------------------------------------------------------------------------------------------------------------- examples


def load_examples(
    path: str | Path,
    *,
    prompt_ids: Callable[[dict[str, Any]], list[int]],
    answer_ids: Callable[[str], list[int]],
    max_prompt_len: int,
    max_gen_length: int,
    question_key: str,
    answer_key: str,
    block_size: int,
    limit: int | None = None,
) -> "tuple[Dataset, DropReport]":
    """Question-answer rows (see `read_rows`) for SFT as memory-mapped columns: id, prompt_ids, response_ids, length.

    Each answer of a list gives one example. Empty answers and prompts over `max_prompt_len` are left out. Responses
    over `max_gen_length` are cut at a block's end. Padding after the cut would look like the answer's end, so there is
    none. If no block fits, the example is left out. `length` is the number of response ids, without padding.

    Args:
        prompt_ids: row -> ids; the row has its question under "question" too.
        answer_ids: answer -> ids, with the end of the turn.
        question_key, answer_key: the columns; dots lead into nested ones: `conversations.0.value`.

    Raises:
        UserError: the row and the key that is missing, or nothing left.
    """
    path = Path(path)
    if path.is_dir():
        key = "dataset.optimization_data"
        raise UserError(f"{key}={path}: a folder; training.objective=sft needs a file of questions and answers", key)

    def generate(report: DropReport) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(read_rows(path)):
            question, answers = _question_and_answers(row, question_key, answer_key, f"{path}, row {index}")
            try:
                prompt = prompt_ids(row | {"question": question})
                wholes = [answer_ids(answer) if answer.strip() else [] for answer in answers or [""]]
            except UserError as error:
                raise UserError(f"{path}, row {index}: {error}", error.key) from error
            for sample, whole in enumerate(wholes):
                if report.kept == limit:
                    return
                if response := _response(prompt, whole, block_size, max_prompt_len, max_gen_length, report):
                    name, length = f"{path.stem}/{index}/{sample}", len(response)
                    yield {"id": name, "prompt_ids": prompt, "response_ids": response, "length": length}

    columns = ("id", "prompt_ids", "response_ids", "length")
    encoding = _callables_key(prompt_ids, answer_ids)
    arguments = (encoding, question_key, answer_key, block_size, max_prompt_len, max_gen_length, limit)
    return _build(path, columns, generate, arguments)


def _question_and_answers(row: dict[str, Any], question_key: str, answer_key: str, where: str) -> tuple[str, list[str]]:
    question, answers = column(row, question_key), column(row, answer_key)
    if not isinstance(question, str):
        key = "dataset.question_key"
        raise UserError(f"{where}: no text under {key}={question_key}", key)
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        key = "dataset.answer_key"
        raise UserError(f"{where}: no text under {key}={answer_key}; SFT needs solutions", key)
    check_characters(where, [question, answers])
    return question, answers


def _response(
    prompt: list[int], whole: list[int], block_size: int, max_prompt_len: int, max_gen_length: int, report: DropReport
) -> list[int] | None:
    """An answer's ids, cut if it is too long, and counted; None if the example is left out."""
    if not whole:
        report.no_answer += 1
        return None
    if len(prompt) > max_prompt_len:
        report.long_prompts += 1
        return None
    response = whole[: blocks_within(len(prompt), len(whole), block_size, max_gen_length)]
    if not response:
        report.no_room += 1
        return None
    report.kept += 1
    report.cut_answers += len(response) < len(whole)
    return response


def hub_rows(source: str) -> Path:
    """A set of the hub, "owner/name" or "owner/name:split" (default train), as a local parquet file.

    It is fetched once. `UserError`: no such set or split, or the hub cannot be reached.
    """
    import datasets

    name, _, split = source.partition(":")
    cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "t3d"
    path = cache_dir / f"{name.replace('/', '--')}--{split or 'train'}.parquet"
    if path.exists():
        return path
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # offline, unknown set, unknown split
        raise UserError(
            f"dataset.optimization_data=hub:{source}: {str(error).strip().splitlines()[0]}; check name and connection, "
            "or give a file",
            "dataset.optimization_data",
        ) from error
    cache_dir.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rows.to_parquet(unfinished)
    os.replace(unfinished, path)
    return path


CACHE_VERSION = 5  # raise it when the meaning of the columns changes


def _build(
    path: Path,
    columns: Sequence[str],
    generate: Callable[[DropReport], Iterator[dict[str, Any]]],
    arguments: Sequence[Any],
) -> "tuple[Dataset, DropReport]":
    """The rows of `generate` as a data set on disk with its counts, made once per (file, arguments)."""
    import datasets

    key = repr((CACHE_VERSION, columns, _file_fingerprint(path), arguments))
    key = hashlib.sha256(key.encode()).hexdigest()[:32]
    cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "t3d"
    counts = cache_dir / f"{key}.json"  # next to the columns, so that a cached set has its counts too

    def generate_and_count() -> Iterator[dict[str, Any]]:
        report = DropReport(source=path.name)
        yield from generate(report)
        if not report.kept:
            remedy = "raise max_prompt_len or max_gen_length, or roll out again"
            raise UserError(f"nothing to train on: {report.line()}; {remedy}", str(path))
        with atomic_write(counts) as file:
            file.write(json.dumps(asdict(report)))

    text, number = datasets.Value("string"), datasets.Value("int32")
    kinds = {"id": text, "length": number, "max_token": number}
    try:
        # `datasets` holds a lock while it builds. So the processes of a launch build once and share the file.
        dataset = datasets.Dataset.from_generator(
            generate_and_count,
            features=datasets.Features({name: kinds.get(name, datasets.List(number)) for name in columns}),
            cache_dir=str(cache_dir),
            fingerprint=key,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    report = DropReport(**json.loads(counts.read_text(encoding="utf-8")) | {"source": path.name})
    report.announce()
    return dataset, report


def _file_fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """(absolute name, bytes, modification time) of a file or of every shard of a folder."""
    files = shard_files(path) if path.is_dir() else [path] if path.exists() else []
    if not files:
        raise UserError(f"{path} does not exist or has no shards; run the stage before this one first", str(path))
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _callables_key(*callables: Callable[..., Any]) -> str:
    from datasets.fingerprint import Hasher

    return Hasher.hash(callables)


def _vocabulary_key(tokenizer: Any) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else None
    return hashlib.sha256(repr((type(tokenizer).__qualname__, vocabulary)).encode()).hexdigest()

"""The answers of a report: those of several runs to the same questions, small enough for one page."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t3d.evaluation.plots import method_name
from t3d.evaluation.results import method_order, read_records, records_file, result_files, rows_of_file, strategy_label

Row = Mapping[str, Any]
LIMIT = 1_300_000  # bytes of all answers in the page; the page as a whole stays below 2 MB
LENGTHS = (20_000, 4_000, 2_000, 1_000, 500)  # characters of a text: the longest that fits is taken
CUT = " […] "


@dataclass(frozen=True)
class AnswerSet:
    """The graded answers of one unit: its name on the page, its data set, and its lines of records.jsonl."""

    name: str
    dataset: str
    records: Sequence[Row]


@dataclass(frozen=True)
class Packed:
    """Answers as the page holds them: gzipped JSON in base64.

    shown, all: questions in it and questions there are. length: characters to which texts are cut; None = none is.
    """

    data: str
    shown: int
    all: int
    length: int | None


def find_answers(folders: Iterable[str | Path]) -> list[AnswerSet]:
    """The answer sets below folders with results. A row of results whose answers are not there is left out."""
    units = []
    for folder in map(Path, folders):
        for path in result_files(folder):
            rows = rows_of_file(path)
            if len(rows) == 1 and records_file(path).is_file():
                units.append(({"run": str(folder), **rows[0]}, path))
    return answer_sets(units)


def answer_sets(units: Sequence[tuple[Row, Path]]) -> list[AnswerSet]:
    """The answer sets of units: their rows, and their results files or folders. Equal units are taken once."""
    graded = sorted((unit for unit in units if "accuracy" in unit[0]), key=lambda unit: _place(unit[0]))
    named = dict(zip(_names([row for row, _ in graded]), graded, strict=True))
    return [AnswerSet(name, row["dataset"], read_records(path)) for name, (row, path) in named.items()]


def _place(row: Row) -> tuple:
    """The order of sets: the original at its slowest first, of each data set."""
    return str(row["dataset"]), method_order(row["method"]), row["block_size"], row["tokens_per_step"]


def _names(rows: Sequence[Row]) -> list[str]:
    """A name for each row, with the fields in which rows differ."""
    parts = {
        "dataset": lambda row: row["dataset"],
        "block_size": lambda row: f"block {row['block_size']}",
        "strategy": lambda row: strategy_label(row["strategy"]),
        "temperature": lambda row: f"temperature {row['temperature']}",
        "seed": lambda row: f"seed {row['seed']}",
        "run": lambda row: row["run"],
    }
    differing = [key for key in parts if len({row.get(key) for row in rows}) > 1]

    def name(row: Row) -> str:
        speed = f"{row['tokens_per_step']:.3g} token{'s' * (row['tokens_per_step'] != 1)} a step"
        return ", ".join([method_name(row["method"]), speed, *(parts[key](row) for key in differing if key in row)])

    return [name(row) for row in rows]


def pack(sets: Sequence[AnswerSet], limit: int = LIMIT) -> Packed:
    """The answers for a page, the questions first that the first set gets right and another one wrong.

    If they take more than ``limit`` bytes, long texts lose their middle; if that is not enough, the last questions go.
    """
    questions = _questions(sets)
    names = [{"name": one.name, "dataset": one.dataset} for one in sets]
    shown = len(questions)
    for length in LENGTHS:
        data = _packed(names, questions, length)
        if len(data) <= limit:
            break
    while len(data) > limit and shown > 1:
        shown = max(1, int(shown * 0.95 * limit / len(data)))
        data = _packed(names, questions[:shown], length)
    longest = max((len(answer[0]) for one in questions for answer in one["answers"] if answer), default=0)
    return Packed(data, shown, len(questions), length if longest > length else None)


def _questions(sets: Sequence[AnswerSet]) -> list[dict[str, Any]]:
    """One entry per question and sample: its texts, and an answer or None of every set."""
    found: dict[tuple, dict[str, Any]] = {}
    for number, one in enumerate(sets):
        for record in one.records:
            key = (one.dataset, record["id"], record["question"])
            entry = found.setdefault(
                key,
                {"id": record["id"], "question": record["question"], "truth": record.get("ground_truth") or ""}
                | {"answers": [None] * len(sets)},
            )
            figures = [record.get(name) or 0 for name in ("length", "forwards")]
            said = record.get("extracted")
            entry["answers"][number] = [record.get("text") or "", said, bool(record["correct"]), *figures]
    return sorted(found.values(), key=_interest)


def _interest(entry: Row) -> int:
    """0 = the first set that answers is right and another wrong; then wrong and another right; then all wrong."""
    first, *others = [answer[2] for answer in entry["answers"] if answer]
    if first:
        return 0 if not all(others) else 3
    return 1 if any(others) else 2


def _packed(names: Sequence[Row], questions: Sequence[dict[str, Any]], length: int) -> str:
    kept = [
        entry | {"answers": [answer and [_cut(answer[0], length), *answer[1:]] for answer in entry["answers"]]}
        for entry in questions
    ]
    text = json.dumps({"sets": names, "questions": kept}, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(errors="replace"), mtime=0)).decode()


def _cut(text: str, length: int) -> str:
    """The text without its middle if it is longer: the end has the answer."""
    half = (length - len(CUT)) // 2
    return text if len(text) <= length else text[:half] + CUT + text[-half:]

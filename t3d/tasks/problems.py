"""Data sets of problems: rows of a .json list (the layout of the Gen-Verse sets), a .jsonl or a .parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from t3d.common import paths
from t3d.common.errors import UserError
from t3d.data.rows import read_rows
from t3d.tasks import find_task, recognise
from t3d.tasks.base import Task, check_sound


@dataclass(frozen=True)
class Problem:
    """One row of a data set.

    id: "<dataset>/<row>", rows counted from 0. raw: the whole row, as it was read.
    """

    id: str
    raw: Mapping[str, Any]

    @property
    def question(self) -> str:
        return self.raw["question"]

    @property
    def ground_truth(self) -> str:
        """The final answer; "" if the row has none, as for code."""
        return self.raw.get("ground_truth_answer") or ""


def load_problems(name_or_path: str | Path, data_type: str, limit: int | None = None) -> list[Problem]:
    """Read a data set by name or by path; with `limit` only the first rows.

    Raises UserError for a missing file or a bad row, in one line that names file, row, field and remedy.
    """
    task = find_task(data_type)
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} is not a number of problems; use 1 or more, or leave it out", "limit")
    path = paths.data_file(name_or_path)
    rows = enumerate(islice(_rows(path), limit))
    if problems := [Problem(f"{path.stem}/{index}", checked(row, task, f"{path}: row {index}")) for index, row in rows]:
        return problems
    raise UserError(f"{path} has no rows; check the file", str(path))


def data_type_of(name_or_path: str | Path, given: str) -> str:
    """The kind of a data set's questions: as given, or for "auto" the kind that recognises the first row."""
    if given != "auto":
        return given
    path = paths.data_file(name_or_path)
    where = f"{path}: row 0"
    for row in _rows(path):
        check_sound(row, where)
        return recognise(row, where)
    raise UserError(f"{path} has no rows; check the file", str(path))


def checked(row: Any, task: Task, where: str) -> dict[str, Any]:
    """The row. Raises UserError, "<where>: field ...", unless it has all fields of the task."""
    check_sound(row, where)
    task.check_row(row, where)
    return row


def _rows(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; {_remedy(path.stem)}", str(path))
    return read_rows(path)


def _remedy(name: str) -> str:
    """The remedy for a missing set: the command that fetches or makes it."""
    from t3d.tasks.download import SETS

    if name in SETS:
        return f"get it with: python data/download_data.py --dataset {name}"
    domain, _, split = name.partition("_")
    if domain in ("StoryMath", "StoryCode"):
        return f"make it with: python -m studies.{domain.lower()}" + " --sft" * (split == "sft")
    return f"give a file, or the name of a set: {', '.join(SETS)}"

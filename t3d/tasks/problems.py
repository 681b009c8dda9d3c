"""Data sets of problems, in the layout of the Gen-Verse sets: a JSON list of rows, checked row by row."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t3d.common import paths
from t3d.common.errors import UserError
from t3d.common.jsonfiles import check_characters

# What a row must hold, by kind of question; for code, what its tests need comes on top (`grading.code.check_row`).
_REQUIRED = {
    "math": ("question", "ground_truth_answer"),
    "option": ("question", "ground_truth_answer"),
    "code": ("question", "test_method"),
}


@dataclass(frozen=True)
class Problem:
    """One row of a data set.

    id: "<dataset>/<row>", rows counted from 0. ground_truth: the final answer ("" for code, whose tests are in `raw`).
    solution: a worked solution where the set has one (SFT needs it). raw: the whole row, as it was read.
    """

    id: str
    question: str
    ground_truth: str
    solution: str | None = None
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def prefix(self) -> str | None:
        """How the answer begins: a function's first lines. A script (test_method stdio) begins with nothing."""
        return self.raw.get("prefix") if self.raw.get("test_method") == "function" else None


def load_problems(name_or_path: str | Path, data_type: str, limit: int | None = None) -> list[Problem]:
    """Read a data set, by name or by path; the first `limit` rows only, where given.

    Raises UserError, in one line that names file, row, field and remedy, where the file is missing or a row is not
    sound.
    """
    if data_type not in _REQUIRED:
        raise UserError(f"evaluation.data_type: {data_type!r} is not known; use one of {', '.join(_REQUIRED)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} is not a number of problems; use 1 or more, or leave it out")
    path = paths.data_file(name_or_path)
    rows = _read_rows(path)[:limit]
    return [_problem(path, index, row, data_type) for index, row in enumerate(rows)]


def data_type_of(name_or_path: str | Path, given: str) -> str:
    """The kind of a data set's questions: as given, or for "auto" code where the first row has a test_method, else
    math.
    """
    if given != "auto":
        return given
    first = _read_rows(paths.data_file(name_or_path))[0]
    return "code" if isinstance(first, dict) and "test_method" in first else "math"


def check_row(where: str, row: Any, data_type: str) -> None:
    """Raise UserError, "<where>: field ...", unless the row has what questions of its kind need."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}; mend or remove the row")
    check_characters(where, row)
    for name in _REQUIRED[data_type]:
        _check(where, row, name, f"data_type={data_type} needs it")
    if row.get("solution") is not None:
        _check(where, row, "solution", "where it is given")
    if data_type == "code":
        from t3d.grading import code

        code.check_row(row, where)


def _read_rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; {_remedy(path.stem)}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a JSON list of problems with at least one row; check the file")
    return rows


def _remedy(name: str) -> str:
    """Where a set that is missing comes from."""
    from t3d.tasks.download import SETS

    if name in SETS:
        return f"get it with: python data/download_data.py --dataset {name}"
    if name.startswith("StoryMath_"):
        return "make it with: python -m studies.storymath" + " --sft" * (name == "StoryMath_sft")
    return f"give a file, or the name of a set: {', '.join(SETS)}"


def _problem(path: Path, index: int, row: Any, data_type: str) -> Problem:
    check_row(f"{path}: row {index}", row, data_type)
    return Problem(
        id=f"{path.stem}/{index}",
        question=row["question"],
        ground_truth=row.get("ground_truth_answer") or "",
        solution=row.get("solution"),
        raw=row,
    )


def _check(where: str, row: dict[str, Any], name: str, reason: str) -> None:
    value = row.get(name)
    if value is None:
        raise UserError(f"{where}: field {name!r} is missing ({reason}); add it, or remove the row")
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} must be text, found {value!r}; put it in quotation marks")
    # An empty ground truth is no obstacle: rollouts need none, and in evaluation no answer matches it. MATH_train has
    # two.
    if name != "ground_truth_answer" and not value.strip():
        raise UserError(f"{where}: field {name!r} is empty ({reason}); fill it, or remove the row")

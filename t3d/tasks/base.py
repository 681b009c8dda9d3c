"""The base of a kind of task: the fields of a row, the prompt, the answer in a text, and the grading.

A new kind is one class that inherits from `Task`, here or in a user's own file (`data_type=my_module:MyTask`). The
defaults suit questions with one short answer. `turn` and `grade` are the two methods that every kind writes itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t3d.common.errors import UserError
from t3d.common.jsonfiles import check_characters
from t3d.grading import Verdict

Row = Mapping[str, Any]
THINK = "<think>\n"


@dataclass(frozen=True)
class Answer:
    """A model's text, and the row of the data set that it answers."""

    text: str
    row: Row

    @property
    def truth(self) -> str:
        return self.row.get("ground_truth_answer") or ""


@dataclass(frozen=True)
class Grading:
    """How to grade.

    Attributes:
        workers: answers graded side by side; None = one per core.
        time_limit: CPU seconds of one answer; None = the task's own limit.
        allow_unsandboxed: run programs although network and files are open to them.
        extraction: the rule that chooses an answer's program; None = the default.
        progress: show a progress bar where grading takes long.
    """

    workers: int | None = None
    time_limit: float | None = None
    allow_unsandboxed: bool = False
    extraction: str | None = None
    progress: bool = True


class Task:
    """A kind of task.

    Attributes:
        fields: text fields that every row has.
        graded: whether answers are right or wrong. If not, no accuracy is reported.
    """

    fields: tuple[str, ...] = ("question", "ground_truth_answer")
    graded = True

    def recognises(self, row: Row) -> bool:
        """Whether a row is certainly of this kind, for `evaluation.data_type=auto`."""
        return False

    def check_row(self, row: Row, where: str) -> None:
        """Raises UserError, one line that starts with `where`, for a row that lacks a field of the task."""
        for name in self.fields:
            check_text(row, name, where)

    def row(self, question: str) -> Row:
        """The row of a single question, such as a chat's."""
        return {"question": question}

    def turn(self, row: Row, think: bool = False) -> str:
        """The user's turn, word by word. `think`: the answer will begin with "<think>"."""
        raise NotImplementedError

    def opening(self, row: Row, think: bool = False) -> str:
        """The beginning of the assistant's turn; the model continues it."""
        return THINK if think else ""

    def extract(self, text: str, row: Row) -> str | None:
        """The answer in a model's text, as the release's `extracted_output` has it; None without one."""
        return text

    def grade(self, answers: Sequence[Answer], how: Grading) -> list[Verdict]:
        """One verdict per answer, in their order."""
        raise NotImplementedError

    def isolation(self, how: Grading) -> str | None:
        """The isolation of the answers' programs; None if grading runs no program. Called before decoding begins.

        Raises:
            UserError: grading would run programs, and this machine cannot isolate them.
        """
        return None


def check_sound(row: Any, where: str) -> None:
    """Raises UserError unless a row is an object of whole characters."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}; correct or remove the row", where)
    check_characters(where, row)


def check_text(row: Row, name: str, where: str) -> None:
    """Raises UserError unless a field holds text. A ground truth may be empty, as two of MATH_train are."""
    value = row.get(name)
    if value is None:
        raise UserError(f"{where}: field {name!r} is missing; add it, remove the row, or set another data_type", name)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} must be text, found {value!r}; put it in quotation marks", name)
    if name != "ground_truth_answer" and not value.strip():
        raise UserError(f"{where}: field {name!r} is empty; fill it, or remove the row", name)

"""Multiple choice: a question with its options, and the letter of the right one."""

from __future__ import annotations

from collections.abc import Sequence

from t3d.grading import Verdict, option
from t3d.tasks.base import Answer, Grading, Row, Task

_TURN = (
    "This is the problem:\n{question}\nYou need to think step by step and put the final option "
    "(A, B, C, or D only—no other character) in \\boxed{{}}. "
)


class Option(Task):
    """Rows need `question`, which holds the options, and `ground_truth_answer`, a letter."""

    def turn(self, row: Row, think: bool = False) -> str:
        return _TURN.format(question=row["question"])

    def extract(self, text: str, row: Row) -> str | None:
        return option.extract_answer(text)

    def grade(self, answers: Sequence[Answer], how: Grading) -> list[Verdict]:
        return option.grade_all([(answer.text, answer.truth) for answer in answers])

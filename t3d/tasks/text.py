"""Free text: a question and the model's text. There is no right answer, so nothing is graded."""

from __future__ import annotations

from collections.abc import Sequence

from t3d.grading import Verdict
from t3d.tasks.base import Answer, Grading, Row, Task


class Text(Task):
    """Rows need `question`, which is the whole of the user's turn."""

    fields = ("question",)
    graded = False

    def turn(self, row: Row, think: bool = False) -> str:
        return row["question"]

    def grade(self, answers: Sequence[Answer], how: Grading) -> list[Verdict]:
        return [Verdict(None, None, "ungraded") for _ in answers]

"""Programming: a question, and tests that the answer's Python program must pass."""

from __future__ import annotations

from collections.abc import Sequence

from t3d.common.errors import UserError
from t3d.grading import Verdict, code, sandbox
from t3d.tasks.base import Answer, Grading, Row, Task

_TURNS = {
    "stdio": "This is the problem:\n{question}\nYou should put your code in ```python ```. "
    "Use input() to read input and print() to produce output in your script. ",
    "function": "This is the problem:\n{question}\nPlace your code within a single Python code block ```python ```. "
    "Do not include more than one code block. ",
}


class Code(Task):
    """Rows need `question` and `test_method`.

    function: also `test_list`, and perhaps `prefix`, the lines that begin the answer. stdio: also `test_input` and
    `test_output`.
    """

    fields = ("question", "test_method")

    def recognises(self, row: Row) -> bool:
        return "test_method" in row

    def check_row(self, row: Row, where: str) -> None:
        super().check_row(row, where)
        code.check_row(row, where)

    def row(self, question: str) -> Row:
        return {"question": question, "test_method": "stdio"}

    def turn(self, row: Row, think: bool = False) -> str:
        method = row.get("test_method")
        if method not in _TURNS:
            raise UserError(f"test_method: {method!r} is not known; use {' or '.join(_TURNS)}", "test_method")
        return _TURNS[method].format(question=row["question"])

    def opening(self, row: Row, think: bool = False) -> str:
        """The prefix of a function. The answer has then begun, so no thoughts come before it."""
        prefix = row.get("prefix") if row.get("test_method") == "function" else None
        return prefix or super().opening(row, think)

    def extract(self, text: str, row: Row) -> str | None:
        return code.answer_program(code.CodeItem(text, row))

    def grade(self, answers: Sequence[Answer], how: Grading) -> list[Verdict]:
        return code.grade_all(
            [code.CodeItem(answer.text, answer.row) for answer in answers],
            workers=how.workers,
            time_limit=how.time_limit,
            allow_unsandboxed=how.allow_unsandboxed,
            extraction=how.extraction or code.EXTRACTIONS[0],
        )

    def isolation(self, how: Grading) -> str | None:
        return sandbox.isolation(how.allow_unsandboxed)

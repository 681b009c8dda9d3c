r"""Mathematics: a question and its final answer, which a model puts into \boxed{}."""

from __future__ import annotations

from collections.abc import Sequence

from t3d.grading import Verdict, math
from t3d.tasks.base import Answer, Grading, Row, Task

# All kinds use the wording of the released T3D code, including blanks at the end: a model's answer depends on every
# character of its prompt.
_TURN = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_TURN_THINK = "You need to put your final answer in \\boxed{{}}. This is the problem:\n{question}"


class Math(Task):
    """Rows need `question` and `ground_truth_answer`. An answer with an equal value is right, in every form."""

    def recognises(self, row: Row) -> bool:
        return "ground_truth_answer" in row

    def turn(self, row: Row, think: bool = False) -> str:
        return (_TURN_THINK if think else _TURN).format(question=row["question"])

    def extract(self, text: str, row: Row) -> str | None:
        return math.extract_answer(text)

    def grade(self, answers: Sequence[Answer], how: Grading) -> list[Verdict]:
        limit = math.TIME_LIMIT if how.time_limit is None else how.time_limit
        return math.grade_all([(answer.text, answer.truth) for answer in answers], how.workers, limit, how.progress)

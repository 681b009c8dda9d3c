"""Grading of answers, one module per kind of question. Nothing here needs a model or torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """The grading of one answer.

    Attributes:
        correct: None if nothing was graded.
        extracted: the answer, or program, found in the text; None without one.
        reason: a name from the REASONS of the module that graded.
        grading_seconds: wall time spent on this answer, without queueing.
    """

    correct: bool | None
    extracted: str | None
    reason: str
    grading_seconds: float = field(default=0.0, compare=False)

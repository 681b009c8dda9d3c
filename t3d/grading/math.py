r"""Grading of mathematical answers: the last \boxed{...} against the ground truth.

Cheap and certain rules decide first (`forms`): equal spellings, words, plain numbers. Computer algebra (`algebra`)
decides the rest, in processes with a limit on their CPU time (`workers`). An answer that raises an exception or exceeds
a limit is wrong, with the reason "error" or "timeout". The grading of the others continues.
"""

from __future__ import annotations

from collections.abc import Sequence

from t3d.grading import Verdict
from t3d.grading.boxes import extract_answer
from t3d.grading.forms import decide
from t3d.grading.numbers import parse_number
from t3d.grading.workers import compare_all

__all__ = ["REASONS", "Verdict", "extract_answer", "grade_all", "parse_number"]

_LONGEST = 1000  # characters of an answer that the cheap rules read outside a worker's time limit
TIME_LIMIT = 10.0
REASONS = ("correct", "wrong", "no_answer", "timeout", "error")


def grade_all(
    pairs: Sequence[tuple[str, str]], workers: int | None = None, time_limit: float = TIME_LIMIT, progress: bool = True
) -> list[Verdict]:
    """Verdicts for (text, ground truth) pairs, in their order.

    workers: processes for the answers that need computer algebra (default: one per core). time_limit: CPU seconds for
    one such answer; an answer that needs more is wrong, with the reason "timeout".
    """
    answers = [extract_answer(text) for text, _ in pairs]
    jobs = [(answer, truth) for answer, (_, truth) in zip(answers, pairs, strict=True)]
    quick = [_quick_reason(answer, truth) for answer, truth in jobs]
    hard = [(a, truth) for (a, truth), reason in zip(jobs, quick, strict=True) if a is not None and reason is None]
    replies = iter(compare_all(hard, workers, time_limit, progress) if hard else ())
    graded = [(reason, 0.0) if reason is not None else next(replies) for reason in quick]
    return [
        Verdict(reason == "correct", answer, reason, spent)
        for answer, (reason, spent) in zip(answers, graded, strict=True)
    ]


def _quick_reason(answer: str | None, truth: str) -> str | None:
    """A reason, or None for an answer that a worker must grade. Long answers take time even in the cheap rules."""
    if answer is None:
        return "no_answer"
    if max(len(answer), len(truth)) > _LONGEST:
        return "correct" if answer == truth else None
    try:
        return {True: "correct", False: "wrong", None: None}[decide(answer, truth)]
    except Exception:
        return "error"

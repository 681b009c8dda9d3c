r"""Grading of multiple-choice answers: the letter in the last \boxed{...} against the right letter."""

from __future__ import annotations

import re
from collections.abc import Sequence

from t3d.grading import Verdict
from t3d.grading.math import extract_answer as boxed

REASONS = ("correct", "wrong", "no_answer")

_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*(?:\)|[.:)]\s.*|[.:])?", re.DOTALL)


def letter(answer: str) -> str | None:
    r"""The option that an answer names, in upper case: C, (C), C., C. Paris, \text{C}. None for anything else."""
    text = re.sub(r"\\(?:text|mathrm|mbox)[a-z]*\s*\{([^{}]*)\}", r"\1", answer)
    match = _LETTER.fullmatch(text.strip(" \t\n${}"))
    return match[1].upper() if match else None


def extract_answer(text: str) -> str | None:
    r"""The letter in the last \boxed{...} of a text; None where there is no box, or no single letter in it."""
    answer = boxed(text)
    return None if answer is None else letter(answer)


def grade_all(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Verdicts for (text, ground truth) pairs, in their order."""
    verdicts = []
    for text, truth in pairs:
        answer = extract_answer(text)
        right = answer is not None and answer == letter(truth)
        verdicts.append(Verdict(right, answer, "no_answer" if answer is None else "correct" if right else "wrong"))
    return verdicts

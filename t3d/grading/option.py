r"""Grading of multiple-choice answers: the letter in the last \boxed{...} against the right letter."""

from __future__ import annotations

import re
from collections.abc import Sequence

from t3d.grading import Verdict
from t3d.grading.boxes import extract_answer as boxed

REASONS = ("correct", "wrong", "no_answer")

_COMMANDS = re.compile(r"\\(?:text|math)[a-z]*(?![a-zA-Z])|\\(?:mbox|hbox|rm|bf|left|right|displaystyle)(?![a-zA-Z])")
_SPACES = re.compile(r"\\[,;:!> ]|\\q?quad(?![a-zA-Z])|[~\s]+")
_INTRODUCTION = r"(?:(?:the|final|correct|answer|option|choice|is|:) ?)*"
_MARK = r"(?:[.):\]]|\s-(?=\s))"  # the mark between an option's letter and its text
_ALONE = re.compile(rf"{_INTRODUCTION}[(\[]?\s*([a-z])\s*[)\].:,;]*", re.IGNORECASE)
_FIRST = re.compile(rf"{_INTRODUCTION}[(\[]?\s*([a-z])\s*{_MARK}(.*)", re.IGNORECASE)
_ANOTHER = re.compile(
    r"[(\[]\s*([A-Za-z])\s*[)\]]"  # (D)
    r"|(?:^|(?<=[\s,;/&]))([A-Z])\s*[.):](?![A-Za-z0-9])"  # D. Rome
    r"|(?:[,;/&+]|(?<![A-Za-z])(?:and|or|not))\s*(?:option\s+)?([A-HJ-Z])(?![A-Za-z'])"  # and D
)


def letter(answer: str) -> str | None:
    r"""The option that an answer names, as a capital letter: C, (C), C., C), C. Paris and \text{C} are "C".

    None for an answer that names another letter too, such as "C or D", and for any other text.
    """
    text = _SPACES.sub(" ", _COMMANDS.sub("", answer))
    text = re.sub(r"[{}$*]", "", text).strip()
    if alone := _ALONE.fullmatch(text):
        return alone[1].upper()
    if (first := _FIRST.fullmatch(text)) is None:
        return None
    named = first[1].upper()
    others = (other[1] or other[2] or other[3] for other in _ANOTHER.finditer(first[2]))
    return named if all(other.upper() == named for other in others) else None


def extract_answer(text: str) -> str | None:
    r"""The letter in the last \boxed{...} of a text; None without a box, or if the box does not name one letter."""
    answer = boxed(text)
    return None if answer is None else letter(answer)


def grade_all(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Verdicts for (text, ground truth) pairs, in their order. A ground truth has any form that an answer may have."""
    return [_verdict(extract_answer(text), letter(truth)) for text, truth in pairs]


def _verdict(answer: str | None, truth: str | None) -> Verdict:
    if answer is None:
        return Verdict(False, None, "no_answer")
    return Verdict(answer == truth, answer, "correct" if answer == truth else "wrong")

r"""Forms of mathematical answers: rules that decide without algebra; the structure of lists, tuples and sets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from t3d.grading import option
from t3d.grading.marks import TEXT, clean, enclosed, key, per_answer, split
from t3d.grading.numbers import CHANGED, numbers_agree, parse_number, plain, units_conflict

# --- times, options, words -------------------------------------------------------------------------------------------

_TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))?\s*(?:([ap])\.?\s*m\.?|(noon|midnight))?", re.IGNORECASE)


@per_answer
def parse_time(answer: str) -> tuple[int, int, int, str] | None:
    """(hour, minute, second, "a", "p" or "" without a.m. and p.m.) of a time of day, None for anything else."""
    text = TEXT.sub(r" \1 ", clean(answer))
    text = re.sub(r"\s*:\s*", ":", text).strip(" .")
    match = _TIME.fullmatch(re.sub(r"^(?=noon$|midnight$)", "12 ", text, flags=re.IGNORECASE))
    if match is None:
        return None
    half = (match[4] or {"noon": "p", "midnight": "a"}.get((match[5] or "").lower(), "")).lower()
    return int(match[1]), int(match[2] or 0), int(match[3] or 0), half


def _twelve_hours(time: tuple[int, int, int, str]) -> tuple[int, int, int, str]:
    """A time of day with its hour up to 12: 15:30 is 3:30 p.m."""
    return (time[0] - 12, *time[1:3], "p") if 12 < time[0] < 24 and not time[3] else time


def _times_agree(answer: str, truth: str) -> bool | None:
    """None unless one of the two has a.m. or p.m. Only a truth without either accepts both."""
    ours, theirs = parse_time(answer), parse_time(truth)
    if not (ours and ours[3]) and not (theirs and theirs[3]):
        return None
    if ours is None or theirs is None:
        return False
    ours, theirs = _twelve_hours(ours), _twelve_hours(theirs)
    return ours == theirs if theirs[3] else ours[:3] == theirs[:3]


@per_answer
def _words(answer: str) -> str | None:
    r"""The letters of an answer made of words only, such as \text{(C)}, in lower case; None for anything else."""
    text = TEXT.sub(r"\1", clean(answer)).strip()
    return re.sub(r"[\s().]", "", text).lower() if re.fullmatch(r"[A-Za-z\s().]*[A-Za-z][A-Za-z\s().]*", text) else None


def _options_agree(answer: str, truth: str) -> bool | None:
    """None unless the truth is one capital letter and the answer names an option."""
    bare = re.fullmatch(r"\(?([A-Z])\)?", key(truth))
    named = option.letter(answer) if bare else None
    if bare is None or named is None:
        return None
    return named == bare[1] and not re.fullmatch(r"[a-z]", key(answer))  # b alone is a variable


def _bases_agree(answer: str, truth: str) -> bool | None:
    """None unless one is a number that names its base, as 52_8 does. A number without a base has base 10."""
    ours, theirs = (re.fullmatch(r"(-?[\dA-F.]+)_\{?(\d+)\}?", key(side)) for side in (answer, truth))
    if ours and theirs:
        return ours.groups() == theirs.groups()
    named, other = ours or theirs, truth if ours else answer
    if named is None or "=" in other:
        return None
    return named[2] == "10" and parse_number(other) == parse_number(named[1])


_INTEGER = re.compile(r"-?[0-9]{1,18}")


def decide(answer: str, truth: str) -> bool | None:
    """True, False, or None if only computer algebra can decide."""
    if answer == truth or (_INTEGER.fullmatch(answer) and _INTEGER.fullmatch(truth)):  # most answers, at once
        return bool(truth) and (answer == truth or int(answer) == int(truth))
    if not key(truth) or not key(answer):
        return False
    if key(answer) == key(truth):
        return True
    for rule in (_times_agree, _options_agree, _bases_agree):
        if (decided := rule(answer, truth)) is not None:
            return decided
    answer_number, truth_number = parse_number(answer), parse_number(truth)
    if answer_number and truth_number:
        return numbers_agree(answer_number, truth_number) and not units_conflict(answer, truth)
    # Algebra would read words as products of letters: "east" would equal "seat".
    answer_words, truth_words = _words(answer), _words(truth)
    if answer_words and truth_words and (TEXT.match(clean(truth)) or len(truth_words) > 2):
        return answer_words == truth_words
    # It would also drop the word after a number, even "million" or "factorial".
    changed = [CHANGED.search(plain(side).replace('"', "")) for side in (answer, truth)]
    return False if any(changed) else None


# --- structure -------------------------------------------------------------------------------------------------------

_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\s*\{(?P<name>[pb]?(?:small)?matrix|array)\}(?:\s*\{[^{}]*\})?(?P<cells>.*?)\\end\s*\{(?P=name)\}\s*[)\]]?",
    re.DOTALL,
)
_JOINED = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*,?\s*")
_MEMBER = re.compile(  # x \in S; S = {1, 2}; (x, y) = (1, 2)
    r"^\s*(?:\\?[a-zA-Z]+(?:\s*\([a-z]\))?\s*(?:\\in(?![a-zA-Z])|=(?=\s*(?:\\\{|[(\[])))|\([a-z](?:\s*,\s*[a-z])+\)\s*=)\s*"
)


@dataclass(frozen=True)
class Structure:
    """kind: list, union, matrix <rows>, or the two brackets of a tuple or an interval; its parts in their order."""

    kind: str
    parts: tuple[str, ...]


@per_answer
def structure(answer: str) -> Structure | None:
    r"""A list, set, tuple, interval, union or matrix; None for a single value. \pm makes a list of two values."""
    if parse_number(answer):  # 1,080 is no list
        return None
    text = _MEMBER.sub("", clean(answer)).strip()
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", matrix["cells"]) if row.strip()]
        return Structure(f"matrix {len(rows)}", tuple(cell for row in rows for cell in row))
    if len(parts := split(text, (r"\cup",))) > 1:
        return Structure("union", tuple(parts))
    text = _JOINED.sub(",", _words_as_list(text)).strip(" ,")
    if len(parts := split(text, (",", ";"))) > 1:
        return Structure("list", tuple(half for part in parts for half in _both_signs(part)))
    for opening, closing in ((r"\{", r"\}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")):
        if (inside := enclosed(text, opening, closing)) is None:
            continue
        parts = split(inside, (",", ";"))
        if opening == r"\{":
            return Structure("list", tuple(half for part in parts for half in _both_signs(part)))
        return Structure(opening + closing, tuple(parts)) if len(parts) > 1 else None
    halves = _both_signs(text)
    return Structure("list", tuple(halves)) if len(halves) > 1 else None


def _words_as_list(text: str) -> str:
    r"""\text{A, C} as A, C."""
    whole = TEXT.fullmatch(text)
    return whole[1] if whole else text


def _both_signs(text: str) -> list[str]:
    r"""The two values of an expression with one \pm; otherwise the text alone."""
    if len(re.findall(r"\\(?:pm|mp)(?![a-zA-Z])", text)) != 1 or "=" in text.split(r"\pm")[-1]:
        return [text]
    return [re.sub(r"\\(?:pm|mp)(?![a-zA-Z])", sign, text) for sign in "+-"]

r"""The gold answers of the real sets, their harmless rewritings, and their meaning, worked out without `t3d`."""

import json
import re
from collections.abc import Callable
from functools import cache
from math import pi
from pathlib import Path

SETS = ("MATH500", "MATH_train", "GSM8K", "GSM8K_train")


@cache
def gold_answers(shared: Path, *names: str) -> tuple[str, ...]:
    """The different gold answers of the sets, all by default, in their order. Two rows of MATH_train have none."""
    rows = [row for name in names or SETS for row in json.loads((shared / "data" / f"{name}.json").read_text("utf-8"))]
    return tuple(sorted({row["ground_truth_answer"] for row in rows} - {""}))


# --- rewritings: a function of an answer that returns None where it does not apply -----------------------------------


def _around(left: str, right: str) -> Callable:
    return lambda answer: left + answer + right


def _replaced(pattern: str, replacement: str, unless: str = "$^") -> Callable:
    def rewrite(answer: str) -> str | None:
        changed = re.sub(pattern, replacement, answer)
        return None if changed == answer or re.search(unless, answer) else changed

    return rewrite


def _grouped(mark: str) -> Callable:
    """10080 with a mark between its thousands."""

    def rewrite(answer: str) -> str | None:
        digits = re.sub(r"\{,\}|,\\! ?|(?<=\d),(?=\d{3}(?!\d))", "", answer)
        return f"{int(digits):,}".replace(",", mark) if re.fullmatch(r"\d{5,}", digits) else None

    return rewrite


def _joined(word: str) -> Callable:
    """A list whose last comma is a word."""

    def rewrite(answer: str) -> str | None:
        numbers = [number.strip() for number in answer.split(",")]
        if not all(re.fullmatch(r"-?\d+|-?\\frac\{\d+\}\{\d+\}|-?\d*\\?[a-z]+", number) for number in numbers):
            return None
        grouped = re.fullmatch(r"\d{1,3}(,\d{3})+", answer)
        return None if len(numbers) < 2 or grouped else ", ".join(numbers[:-1]) + word + numbers[-1]

    return rewrite


def _integers(form: str, one_in: int = 1) -> Callable:
    """Whole numbers in another form, or one in so many of them where the form costs algebra."""

    def rewrite(answer: str) -> str | None:
        return form.format(answer) if re.fullmatch(r"-?\d+", answer) and int(answer) % one_in == 0 else None

    return rewrite


def _delimited(answer: str) -> str | None:
    if "left" in answer or r"\{" in answer or "sqrt[" in answer or not re.search(r"[(\[]", answer):
        return None
    return re.sub(r"([)\]])", r"\\right\1", re.sub(r"([(\[])", r"\\left\1", answer))


_MARKS = (",", "{,}", r",\!", r"\,", r"\;", "~", "\u2009", "\u202f")
REWRITINGS: dict[str, Callable[[str], str | None]] = {
    **{f"{mark!r} at the end": _around("", mark) for mark in (".", ",", ";", " .", r"\,", "\\\\", ".\n")},
    "in dollars": _around("$", "$"),
    "in double dollars": _around("$$", "$$"),
    "in dollars before a full stop": _around("$", "$."),
    "in round mathematics": _around(r"\(", r"\)"),
    "in square mathematics": _around(r"\[", r"\]"),
    "in braces": _around("{", "}"),
    "in bold": _around("**", "**"),
    "in spaces": _around(" ", " "),
    "in display style": _around(r"\displaystyle ", ""),
    "after an opening": _around(r"\text{The answer is } ", ""),
    "dfrac": _replaced(r"\\[dt]?frac", r"\\dfrac"),
    "tfrac": _replaced(r"\\[dt]?frac", r"\\tfrac"),
    "frac": _replaced(r"\\[dt]frac", r"\\frac"),
    "slash": _replaced(r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3"),
    "mbox": _replaced(r"\\text(?=\s*\{)", r"\\mbox"),
    "textbf": _replaced(r"\\(?:text|mbox)(?=\s*\{)", r"\\textbf"),
    "mathrm": _replaced(r"\\(?:text|mbox)(?=\s*\{)", r"\\mathrm"),
    "degrees in braces": _replaced(r"\^\\circ", r"^{\\circ}"),
    "degree sign": _replaced(r"\^\{?\\circ\}?", "°"),
    "degrees as text": _replaced(r"\^\{?\\circ\}?", r"\\text{ degrees}"),
    "degrees left out": _replaced(r"\^\{?\\circ\}?$", "", unless="sin|cos|tan"),
    "left and right": _delimited,
    "no left and right": _replaced(r"\\(left|right)(?![a-z.])", ""),
    "minus sign": _replaced("-", "−"),
    **{
        f"{mark!r} in thousands": _grouped(mark) for mark in (",", "{,}", r",\!", r"\,", "\u2009", "\u202f", r"\;", "~")
    },
    "no thousands": _grouped(""),
    "commas without spaces": _replaced(r",(?!\\!)\s+", ","),
    "commas with spaces": _replaced(r",(?!\\!)\s*", r",\\ ", unless=r"\d,\d{3}|\{,\}|,\\[!,]"),
    "and": _joined(r"\text{ and }"),
    "comma and": _joined(r", \text{and } "),
    "or": _joined(" or "),
    "an equation": _integers("x = {}", one_in=20),
    "decimals": _integers("{}.00"),
    "units": _integers(r"{}\text{{ units}}"),
    "as text": _integers(r"\text{{{}}}"),
    "powers in braces": _replaced(r"\^(\d)", r"^{\1}"),
    "roots in braces": _replaced(r"\\sqrt ?(\d)", r"\\sqrt{\1}"),
    "no dollar sign": _replaced(r"^\\\$ ?(?!.*\\\$)", ""),
    "bare percent sign": _replaced(r"\s*\\%", "%"),
    "square matrix": _replaced("pmatrix", "bmatrix"),
}


# --- meaning ---------------------------------------------------------------------------------------------------------


def alike(one: str, other: str) -> bool:
    """Whether two gold answers mean the same to a teacher who does not insist on units, and reads 18% as 18 or 0.18."""
    return bool(_meanings(one) & _meanings(other))


@cache
def _meanings(answer: str) -> frozenset:
    """An answer's values: a list is also the tuple of its parts in their order."""
    answer = answer.strip(" ,").rstrip(".,")
    text = re.sub(r"\\!\s*|\{,\}|\\left|\\right(?![a-z])|\\[,;$]|\^\{?\\circ\}?|\\ ", "", answer)
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\\(?:mbox|textnormal|mathbf)", r"\\text", text))
    text = re.sub(r"\\text\s*\{[ ,]*(?:and|or)\s*\}", ",", text)
    text = re.sub(r"^\\text\s*\{\(?([^{}]*?)\)?\}", r"\1", text)
    text = re.sub(r"\\text\s*\{[^{}]*\}(?:\^\d)?", "", text).strip()
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    sides = re.split(r"=|\\approx", text)
    if len(sides) > 1 and (len(sides[0]) <= 2 or "approx" in text or re.fullmatch(r"[\d. ]+", sides[0])):
        return frozenset().union(*(_meanings(side.strip()) for side in sides if re.search(r"\d", side)))
    for opening, closing in ("()", "(]", "[)", "[]"):
        if text.startswith(opening) and text.endswith(closing) and len(parts := _parts(text[1:-1])) > 1:
            return frozenset([(opening + closing, tuple(map(_value, parts)))])
    if len(parts := _parts(text.removeprefix(r"\{").removesuffix(r"\}"))) > 1:
        values = tuple(map(_value, parts))
        return frozenset([("list", tuple(sorted(values, key=repr))), ("()", values)])
    if text.endswith("%"):
        number = float(text.rstrip("\\% "))
        return frozenset([f"{number:.10g}", f"{number / 100:.10g}"])
    return frozenset([_value(text)])


def _parts(text: str) -> list[str]:
    r"""Between commas outside brackets, with the two values of a \pm."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.replace(r"\pm", sign) for part in parts for sign in ("+-" if r"\pm" in part else "+")]


def _value(text: str) -> str:
    """A number, or an expression at one point, to ten digits; any other text as it is, without its spaces."""
    places = {letter: 1.37 + 0.291 * i for i, letter in enumerate("abcdfghjklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")}
    try:
        if "_" in text:
            raise ValueError("a base, not Python's mark between digits")
        value = complex(eval(_python(text), {"__builtins__": {}}, places | {"i": 1j, "e": 2.718281828459045, "P": pi}))
    except Exception:
        return re.sub(r"\s", "", text)
    return f"{value.real + 0.0:.10g}" if abs(value.imag) < 1e-12 else f"{value:.10g}"


def _python(text: str) -> str:
    r"""LaTeX with \frac, \sqrt, \pi and powers as Python; P is pi."""
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", re.sub(r"\}\s*(\d)(?=\D|$)", r"}{\1}", text))
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text.replace(r"\pi", " P ")).replace(r"\cdot", "*").replace(":", "/")
    text = re.sub(r"(^|[-+*/(,]\s*)(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}$", r"\1(\2+\3/\4)", text)  # 1 4/5
    before = None
    while before != text:
        before = text
        text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\s*\[(\d)\]\s*\{([^{}]*)\}", r"((\2)**(1/\1))", text)
        text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"((\1)**0.5)", text)
        text = re.sub(r"\^\s*\{([^{}]*)\}", r"**(\1)", text)
    text = re.sub(r"\^", "**", text.replace("$", ""))
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text.strip())
    return re.sub(r"(?<=[\w)])\s*(?=[a-zA-Z(])|(?<=[a-zA-Z)])\s*(?=\d)", "*", text)

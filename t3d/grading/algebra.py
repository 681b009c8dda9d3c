r"""Equality of mathematical answers by computer algebra. It may take for ever: `workers` runs it under a limit.

Structures (lists, tuples, intervals, matrices) are compared part by part. Single values are compared as numbers:
exactly if both are exact, else to a relative 1e-6. math-verify decides the rest, such as equations and inequalities.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from zlib import crc32

import sympy
from latex2sympy2_extended import NormalizationConfig, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from mpmath import mpc
from sympy.logic.boolalg import Boolean

from t3d.grading.forms import decide, structure
from t3d.grading.marks import DOLLAR, TEXT, clean, key, split
from t3d.grading.numbers import parse_number, units_conflict

_DIGITS = 1000  # equal digits that make two exact values equal, if their difference cannot be simplified to 0
_ROUNDED = 10**6  # a rounded value may be off by one part in a million
_LATEX = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_SYMBOL = re.compile(r"\s*(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\s*\([^()]*\))?|\\text\s*\{[^{}]*\})\s*")
_INEQUALITY = re.compile(r"[<>≤≥≠]|\\(?:[lg]eq?|[lg]eqslant|[lg]t|neq?)(?![a-zA-Z])")
_SETS = ("union", "()", "(]", "[)", "[]")  # kinds of structures that may be sets of real numbers
_POINTS = 6  # points at which two expressions must agree: three positive, three negative


def equal(answer: str, truth: str) -> bool:
    """Whether two answers are the same, by the rules of `forms` first."""
    decided = decide(answer, truth)
    if decided is not None:
        return decided
    ours, theirs = structure(answer), structure(truth)
    if ours and theirs:
        decided = _structures_equal(ours.kind, ours.parts, theirs.kind, theirs.parts)
    elif one := ours or theirs:
        if len(one.parts) == 1:  # a set of one
            return equal((ours.parts[0] if ours else answer), (theirs.parts[0] if theirs else truth))
        interval = one.kind in _SETS
        decided = None if interval and _INEQUALITY.search(truth if ours else answer) else False
    else:
        return _single_equal(answer, truth)
    return _expressions_equal(answer, truth) if decided is None else decided


# --- structures ------------------------------------------------------------------------------------------------------


def _structures_equal(kind: str, parts: Sequence[str], true_kind: str, true_parts: Sequence[str]) -> bool | None:
    """None if only math-verify can decide: sets composed of different intervals."""
    if "union" in (kind, true_kind) and kind in _SETS and true_kind in _SETS:
        same = kind == true_kind and len(parts) == len(true_parts) and _same_parts(parts, true_parts)
        return same or None
    if len(parts) != len(true_parts):
        return False
    if kind == true_kind == "list" and not _are_words(true_parts):
        return _same_parts(parts, true_parts)
    vectors = {kind, true_kind} <= {"()", "[]"} and len(parts) > 2  # of two numbers they are intervals
    if kind == true_kind or vectors or {kind, true_kind} == {"list", "()"}:
        return all(equal(part, true_part) for part, true_part in zip(parts, true_parts, strict=True))
    return False


def _are_words(parts: Sequence[str]) -> bool:
    return all(re.fullmatch(r"[A-Za-z]{2}[A-Za-z ]*", key(part)) for part in parts)


def _same_parts(parts: Sequence[str], true_parts: Sequence[str]) -> bool:
    """Whether both have the same parts, each equally often, in any order."""
    left = sorted(true_parts, key=key)
    for part in sorted(parts, key=key):
        match = next((other for other in left if equal(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


# --- single values ---------------------------------------------------------------------------------------------------


def _single_equal(answer: str, truth: str) -> bool:
    ours, theirs = (split(clean(side), (r"\approx",)) for side in (answer, truth))
    if len(ours) + len(theirs) > 2:
        return equal(ours[0], theirs[0])  # the exact one
    ours, theirs = (split(clean(side), ("=",)) for side in (answer, truth))
    assigned, truly_assigned = (len(side) > 1 and _SYMBOL.fullmatch(side[0]) for side in (ours, theirs))
    if assigned and truly_assigned and key(ours[0]) == key(theirs[0]):
        return equal(ours[-1], theirs[-1])
    if len(ours) > 1 and len(theirs) == 1:
        return bool(assigned or _names_a_value(ours[0])) and equal(ours[-1], truth)
    if len(ours) == 1 and truly_assigned:
        return equal(answer, theirs[-1])
    if len(ours) == 1 and len(theirs) > 1 and parse_number(theirs[0]):  # 0.56 = 56%
        return equal(answer, theirs[0]) or equal(answer, theirs[-1])
    return _expressions_equal(answer, truth)


def _names_a_value(left: str) -> bool:
    """Whether an equation with this left side stands for its right side: a + b = 5 does, the line 2x - y = 5 not."""
    signs = re.sub(r"\\[a-zA-Z]+", "", TEXT.sub("", left))
    return not (re.search(r"[a-zA-Z]", signs) and re.search(r"\d", signs))


def _expressions_equal(answer: str, truth: str) -> bool:
    ours, theirs = expression(answer), expression(truth)
    if ours is None or theirs is None or units_conflict(answer, truth):
        return False
    if ours == theirs:
        return True
    if _is_value(ours) and _is_value(theirs):
        decided = values_equal(ours, theirs)
        if decided is not None:
            return decided
    if isinstance(ours, sympy.Eq) and isinstance(theirs, sympy.Eq) and ours.free_symbols != theirs.free_symbols:
        return False
    return verify(
        _exact(theirs), _exact(ours), numeric_precision=_DIGITS, timeout_seconds=None, allow_set_relation_comp=True
    )


@lru_cache(maxsize=1 << 13)
def expression(answer: str) -> sympy.Basic | sympy.MatrixBase | None:
    """An answer without its units as an object of sympy; None if the parser fails."""
    text = without_units(clean(answer)).replace("%", r"\%")
    try:
        parsed = latex2sympy(
            normalize_latex(text, _LATEX),
            is_real=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return None
    imaginary = {symbol: sympy.I for symbol in getattr(parsed, "free_symbols", ()) if symbol.name == "i"}
    return parsed.xreplace(imaginary) if imaginary else parsed


def without_units(text: str) -> str:
    """A cleaned answer without currency signs and units. Degrees stay as arguments of trigonometric functions."""
    text = re.sub(r"(?:\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?)+$", "", text).replace(DOLLAR, "") or text
    text = re.sub(r"(?<=[\d}]) (?:[a-z]{3,} ?)+$", "", text)
    text = re.sub(r"(?<![.\d])(\d{1,3}(?:,\d{3})+)(?=[}])", lambda number: number[1].replace(",", ""), text)
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return re.sub(r"(\d+(?:\.\d+)?)°", r"{(\1 \\cdot \\frac{\\pi}{180})}", text)
    return TEXT.sub(r"\1", text.replace("°", ""))


def _is_value(parsed: object) -> bool:
    return isinstance(parsed, sympy.Expr) and not isinstance(parsed, (Boolean, sympy.MatrixExpr))


def _exact(parsed: sympy.Basic | sympy.MatrixBase) -> sympy.Basic | sympy.MatrixBase:
    """The value with every decimal fraction as a ratio, so that math-verify does not round."""
    floats = {number: sympy.Rational(str(number)) for number in parsed.atoms(sympy.Float)}
    return parsed.xreplace(floats) if floats else parsed


def values_equal(answer: sympy.Expr, truth: sympy.Expr) -> bool | None:
    """Equality of two expressions at several points: to 1e-6 if one has decimal fractions, else exactly.

    None if they cannot be evaluated, such as an unknown function.
    """
    rounded = bool(answer.atoms(sympy.Float)), bool(truth.atoms(sympy.Float))
    answer, truth = _evaluated(answer), _evaluated(truth)
    if answer == truth:
        return True
    if isinstance(answer, sympy.Rational) and isinstance(truth, sympy.Rational):
        return rounded[0] != rounded[1] and bool(abs(answer - truth) * _ROUNDED <= abs(truth))
    symbols = answer.free_symbols | truth.free_symbols
    tried: set[bool | None] = set()
    for number in range(_POINTS if symbols else 1):
        tried.add(_agree_at(number, answer, truth, any(rounded)))
        if False in tried:
            return False
    return True if True in tried else None


def _agree_at(number: int, answer: sympy.Expr, truth: sympy.Expr, rounded: bool) -> bool | None:
    """Equality at one point; None if one has no value there."""
    (a, near_a), (b, near_b) = _at(number, answer), _at(number, truth)
    if near_a is None or near_b is None:
        return None
    if abs(near_a - near_b) > 1e-4 * max(abs(near_a), abs(near_b)):
        return False
    difference = (a - b).evalf(15, maxn=_DIGITS)
    return _is_zero(difference) or (rounded and abs(_approximate(difference)) * _ROUNDED <= abs(near_b))


@lru_cache(maxsize=1 << 13)
def _evaluated(value: sympy.Expr) -> sympy.Expr:
    return _exact(value).doit()


@lru_cache(maxsize=1 << 15)
def _at(number: int, value: sympy.Expr) -> tuple[sympy.Expr, mpc | None]:
    """A value at a point, exactly and to 15 digits; the second is None if it is not finite.

    A symbol has the same value in all expressions: a ratio that depends on its name. Outside the real domain roots have
    several values, so only expressions with i count there.
    """
    places = {symbol: _place(symbol.name, number) for symbol in value.free_symbols}
    exact = value.subs(places)
    near = exact.evalf(15, maxn=_DIGITS)
    if not near.is_number or near.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return exact, None
    return exact, _approximate(near) if near.is_real or not places or value.has(sympy.I) else None


def _approximate(near: sympy.Expr) -> mpc:
    """A value of `evalf` as a number of mpmath, whose range is unlimited."""
    return mpc(0) if _is_zero(near) else mpc(*(part._to_mpmath(53) for part in near.as_real_imag()))


def _place(name: str, number: int) -> sympy.Rational:
    size = sympy.Rational(101 + crc32(name.encode()) % 899, 101 + 2 * number)
    return -size if number % 2 else size


def _is_zero(value: sympy.Expr) -> bool:
    """Whether an evaluated difference has no significant digit."""
    return all(part.is_zero or (part.is_Float and part._prec == 1) for part in value.as_real_imag())

"""Plain numbers with their units: parsed exactly, compared exactly or, for rounded ratios, to a relative 1e-6."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from t3d.grading.marks import TEXT, clean, per_answer

_SCALES: dict[str, int | Fraction] = {"hundred": 10**2, "thousand": 10**3, "dozen": 12}
_SCALES |= {"million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "tenth": 10, "hundredth": 100, "thousandth": 1000}
_SCALES |= {f"{name}{end}": Fraction(1, part) for name, part in _PARTS.items() for end in ("", "s")}
_SCALES |= {"half": Fraction(1, 2), "halves": Fraction(1, 2)}
_OPERATIONS = ("squared", "cubed", "factorial")  # only after a number alone: 16 squared meters are an area
CHANGED = re.compile(rf"\d\s*(?:(?:{'|'.join(_SCALES)})\b|(?:{'|'.join(_OPERATIONS)})\.?$)", re.IGNORECASE)
_NOT_UNITS = {"and", "or", "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "mod", "choose", "base"}
_UNIT_NAMES = {
    "inch": "inches in", "foot": "feet ft", "yard": "yards yd yds", "mile": "miles mi mph",
    "mm": "millimeter millimeters millimetres", "cm": "centimeter centimeters centimetre centimetres",
    "m": "meter meters metre metres", "km": "kilometer kilometers kilometres kmph kph",
    "second": "seconds sec secs s", "minute": "minutes min mins", "hour": "hours hr hrs h mph kmph kph",
    "day": "days", "week": "weeks", "month": "months", "year": "years yr yrs",
    "dollar": "dollars usd ＄", "cent": "cents ¢", "euro": "euros eur €", "pound": "pounds lb lbs £",
    "ounce": "ounces oz", "mg": "milligram milligrams", "g": "gram grams gm", "kg": "kilogram kilograms kgs",
    "gallon": "gallons gal", "quart": "quarts qt", "liter": "liters litre litres l", "ml": "milliliter milliliters",
    "degree": "degrees deg °", "radian": "radians rad", "percent": "%", "acre": "acres", "hectare": "hectares",
}  # fmt: skip
_ANY_UNIT = {"unit", "square", "sq", "cubic", "cube", "total", "in", "each", "per", "left", "more", "long", "of", "the"}
_UNITS: dict[str, set[str]] = {}
for _unit, _others in _UNIT_NAMES.items():
    for _spelling in (_unit, *_others.split()):
        _UNITS.setdefault(_spelling, set()).add(_unit)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"  # 1,080  1080
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*[＄€£]?\s*(?P<sign2>[-+]?)\s*"
    r"(?:(?P<whole>\d{1,3}(?:,\d{3})+|\d*)"
    r"(?:\.(?P<decimals>\d*)(?:\\(?:overline|bar|dot)\s*\{?(?P<recurring>\d+)\}?|\((?P<recurring2>\d+)\)"
    r"|(?P<dots>\\ldots)\s*)?)?"
    rf"|(?:(?P<mixed>{_DIGITS})\s+)?(?P<top>{_DIGITS})\s*/\s*(?P<bottom>{_DIGITS}))"  # 3/4  1 3/4
    r"(?:\s*(?P<unit>%|[＄€£¢]|°(?:\s*[CF](?![a-zA-Z]))?|\"[^\"]*\"|(?<=\s)[A-Za-z]{2,})"
    r"(?P<more>(?:[ .,/()-]|\"[^\"]*\"|[A-Za-z])*(?:\^\s*\{?\d\}?)?))?\s*\.?"  # the exponent of a unit, as in cm^2
)


@dataclass(frozen=True)
class Number:
    """An exact value; whether a percent sign follows; whether it was written as a ratio, or as a decimal fraction."""

    value: Fraction
    percent: bool = False
    ratio: bool = False
    decimal: bool = False


@per_answer
def plain(answer: str) -> str:
    r"""An answer with numbers in plain digits instead of LaTeX, and the words of \text{...} between quotation marks."""
    number = rf"\{{([-+]?{_DIGITS})\}}"
    text = re.sub(rf"\\frac{number}{number}", r" \1/\2", clean(answer))
    # A number set as text is a number; other text is a unit.
    text = TEXT.sub(lambda words: words[1] if re.match(r"\s*[-\d＄.]", words[1]) else f' "{words[1].strip()}" ', text)
    return text.strip()


@per_answer
def parse_number(answer: str) -> Number | None:
    r"""A plain number, or None for any other answer.

    Takes 18, -3.5, .5, 1,080, 1{,}080, 10,\!080, 10\,080, \$18.00, 18 dollars, 5.4\text{ cents}, 90^\circ, 40\%, 3/4,
    1\frac{3}{4}, 0.\overline{3}, 2 million, 3 halves. A unit is not part of the value. Commas must group thousands, so
    1,2 is not a number.
    """
    text = plain(answer)
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict(default="")
    words = _unit_words(part["unit"], part["more"])
    value = _value(part)
    if words is None or value is None or (part["sign"] and part["sign2"]):
        return None
    scale = _SCALES.get(words[0], 1) if words else 1
    value *= scale
    if "-" in (part["sign"], part["sign2"]):
        value = -value
    recurring = bool(part["recurring"] or part["recurring2"] or part["dots"])
    return Number(
        value,
        percent=part["unit"] == "%" or "percent" in words,
        ratio=bool(part["bottom"]) or recurring or scale < 1,
        decimal=bool(part["decimals"]) and not recurring,
    )


def _unit_words(unit: str, more: str) -> list[str] | None:
    """The words after a number, in lower case; None if they are no unit."""
    words = re.findall(r"[a-z]+", f"{unit} {more}".lower())
    if unit[:1].isalpha() and len(words[0]) < 3 and words[0] not in _UNITS:  # 2 pi, 2 x
        return None
    if set(words) & _NOT_UNITS or " ".join(words) in _OPERATIONS or _has_meridiem(f"{unit} {more}"):
        return None
    return words


def _has_meridiem(text: str) -> bool:
    return re.search(r"(?<![a-z])[ap]\.?\s*m(?![a-z])", text.lower()) is not None


def _integer(digits: str) -> int:
    return int(Decimal(digits.replace(",", "")))  # int() of a text refuses more than 4,300 digits


def _value(part: dict[str, str]) -> Fraction | None:
    """The value of the parts of `_NUMBER`, without sign and unit."""
    if part["bottom"]:
        bottom = _integer(part["bottom"])
        return _integer(part["mixed"] or "0") + Fraction(_integer(part["top"]), bottom) if bottom else None
    whole, decimals = part["whole"].replace(",", ""), part["decimals"]
    if not whole and not decimals and not part["recurring"] + part["recurring2"]:
        return None
    value = Fraction(_integer((whole + decimals) or "0"), 10 ** len(decimals))
    recurring = part["recurring"] or part["recurring2"]
    if part["dots"]:
        repeated = re.search(r"(\d+?)\1+$", decimals[-60:])
        if repeated is None or len(repeated[0]) < 3:
            return None
        recurring = repeated[1]
    if recurring:
        value += Fraction(_integer(recurring), 10 ** len(decimals) * (10 ** len(recurring) - 1))
    return value


@per_answer
def units(answer: str) -> frozenset[str]:
    r"""The units of an answer: the known ones in its words and signs ($, %, °), and other words set in \text{...}."""
    text = clean(answer)
    set_as_text = re.findall(r"[a-z]+", " ".join(TEXT.findall(text)).lower())
    bare = re.findall(r"(?<![a-z\\])[a-z]{2,}|[＄€£%°¢]", TEXT.sub(" ", text).lower())
    known = [name for word in set_as_text + bare for name in _UNITS.get(word, ())]
    return frozenset(known) or frozenset(word.rstrip("s") for word in set_as_text) - _ANY_UNIT


_POWER = r"(?:\\text\s*\{[^{}]*\}|(?<![\\a-zA-Z])[a-z]{2,})\s*\^\s*\{?\s*"
_OPPOSED = [  # marks of units with another value
    tuple(re.compile(mark, re.IGNORECASE) for mark in pair)
    for pair in (
        (r"°\s*(?:\\text\s*\{)?\s*C(?![a-z])|celsius", r"°\s*(?:\\text\s*\{)?\s*F(?![a-z])|fahrenheit"),
        (rf"{_POWER}2|\b(?:sq|squared?)\b", rf"{_POWER}3|\bcub(?:ic|ed?)\b"),
    )
]


def units_conflict(answer: str, truth: str) -> bool:
    """Whether both have units, at least one known, and none in common: 5 feet are not 5 inches, nor 5 points. Nor are
    20 degrees Celsius 20 degrees Fahrenheit, or square inches cubic inches.
    """
    sides = clean(answer), clean(truth)
    if any(a.search(x) and b.search(y) for a, b in _OPPOSED for x, y in (sides, sides[::-1])):
        return True
    ours, theirs = units(answer), units(truth)
    return bool(ours and theirs) and not ours & theirs and not (ours | theirs).isdisjoint(_UNIT_NAMES)


def numbers_agree(answer: Number, truth: Number) -> bool:
    """Whether the values are equal. A percent sign is a unit or stands for 1/100: 18% equals 18 and 0.18. The decimals
    of a ratio may be rounded at 1e-6.
    """
    values = {answer.value, answer.value / 100} if answer.percent and not truth.percent else {answer.value}
    truths = {truth.value, truth.value / 100} if truth.percent and not answer.percent else {truth.value}
    rounded = (answer.decimal and truth.ratio) or (answer.ratio and truth.decimal)
    tolerance = Fraction(1, 10**6) if rounded else 0
    return any(abs(a - b) <= tolerance * abs(b) for a in values for b in truths)

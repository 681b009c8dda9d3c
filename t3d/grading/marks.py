r"""Removes LaTeX marks without meaning, and unifies the spellings of an answer."""

from __future__ import annotations

import re
from functools import lru_cache

per_answer = lru_cache(maxsize=1 << 14)  # many answers meet the same truth

_SIGNS = str.maketrans(
    {"−": "-", "×": r"\times ", "·": r"\cdot ", "±": r"\pm ", "π": r"\pi ", "∞": r"\infty "}
    | {"≤": r"\leq ", "≥": r"\geq ", "≈": r"\approx ", "∪": r"\cup ", "…": r"\ldots ", "²": "^2", "³": "^3"}
    | dict.fromkeys("°º˚", r"^\circ ")
    | dict.fromkeys("\u00a0\u2007\u2009\u202f", r"\,")
)
_END = r"(?![a-zA-Z])"  # of a command's name
DOLLAR = "＄"  # the sign before an amount, distinct from the mark around mathematics
_ARGUMENT = r"(?:\{([^{}]*)\}|(\\(?:pi|theta|alpha|beta|phi)(?![a-zA-Z])|[a-zA-Z0-9]))"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"(?<!\\)\\[,:;> ]|\\q?quad{_END}|\\thinspace{_END}|~|\s+", " "),
        (r"\\! ?", ""),
        (r" +", " "),
        (rf"\\(?:left|right) ?\.|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits){_END}", ""),
        (rf"\\(?:langle|lparen){_END}", "("),
        (rf"\\(?:rangle|rparen){_END}", ")"),
        (r"\\[vh]?phantom ?(?:\{[^{}]*\}|-)", ""),
        (r"\\(?:mbox|hbox|text(?!degree)[a-z]+|math(?:rm|bf|it|sf|tt|normal))(?= ?\{)", r"\\text"),
        (r"\\text ?\{ ?\}", ""),
        (rf"\\le(?:qslant)?{_END}|<=", r"\\leq "),
        (rf"\\ge(?:qslant)?{_END}|>=", r"\\geq "),
        (rf"\\l?dots{_END}|\\cdots{_END}|\.{{3,}}", r"\\ldots "),
        (rf" ?(?:\{{ ?\}})?\^ ?(?:\{{ ?\\circ ?\}}|\\circ{_END})| ?\\(?:text)?degree{_END}", "°"),
        (r"(?<=\d)(?:\{,\}|\\text ?\{ ?, ?\})(?=\d{3})", ""),
        (r"\{,\}|\\text ?\{ ?, ?\}", ","),
        (r"(?:\\text ?)?\{ ?: ?\}", ":"),
        (r"\\dot ?\{?(\d)\}?(\d*)\\dot ?\{?(\d)\}?", r"\\overline{\1\2\3}"),
        (r"\\%", "%"),
        (r"\\\$", DOLLAR),
        (rf"\\(?:pounds|textsterling){_END} ?", "£"),
        (rf"\\(?:euro|texteuro){_END} ?", "€"),
        (r"(?i)\b(no (?:real |integer )?solution)s\b", r"\1"),
        (r"\\text ?\{ ?degrees? ?\}", "°"),
        (r"(?<![\d.,] )(?<![\d.,])(\d{1,3}(?: \d{3})+)(?! ?[\d/])", lambda groups: groups[1].replace(" ", "")),
        (rf"\\[dtc]?frac ?{_ARGUMENT} ?{_ARGUMENT}", lambda part: _command(r"\frac", *part.groups())),
        (rf"\\[dtc]frac{_END}", r"\\frac"),
        (rf"\\sqrt ?{_ARGUMENT}", lambda part: _command(r"\sqrt", *part.groups())),
    )
]


def _command(name: str, *groups: str | None) -> str:
    """A command with its arguments in braces; each argument is a pair of groups, one for braces and one for a token."""
    inside, token = groups[::2], groups[1::2]
    return name + "".join(f"{{{(a or b or '').strip()}}}" for a, b in zip(inside, token, strict=True))


_PHRASE = r"(?:the\s+)?(?:final\s+|correct\s+)?(?:answers?|solutions?|roots?|values?)\s+(?:is|are)\s*:?\s*"
_STARTS = re.compile(
    rf"^(?:\s|[*=:]|\\approx(?![a-zA-Z])|{_PHRASE}"
    r"|\\text\s*\{[^{}]*(?<![a-z])(?:is|are|either|both)\s*:?\s*\}"
    r"|(?:either|both)\s+(?=[-\d$\\(]))+",
    re.IGNORECASE,
)
_STARTS_INSIDE = re.compile(rf"^(\\text\s*\{{)\s*{_PHRASE}(?=[^\s}}])", re.IGNORECASE)
_OPENING, _CLOSING = {"(", "[", "{", r"\{", r"\(", r"\["}, {")", "]", "}", r"\}", r"\)", r"\]"}
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"))
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


@per_answer
def clean(answer: str) -> str:
    """An answer without marks that have no meaning, with one spelling for each LaTeX command that has several."""
    text = answer.translate(_SIGNS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    while (bare := _without_marks(text)) != text:
        text = bare
    return text.replace("$", DOLLAR)


def _without_marks(text: str) -> str:
    """The text with one layer of marks removed: final punctuation, an opening phrase, or a pair of marks around it."""
    text = _STARTS_INSIDE.sub(r"\1", _STARTS.sub("", text)).rstrip(" .,;:*\\")
    for opening, closing in _PAIRS:
        if (inside := enclosed(text, opening, closing)) and ("$" not in opening or "$" not in inside):
            return inside
    return text


def enclosed(text: str, opening: str, closing: str) -> str | None:
    """The text between two matching brackets that enclose the whole text; None without them."""
    inside, depth = text[len(opening) : len(text) - len(closing)], 0
    if not text.startswith(opening) or not text.endswith(closing) or len(text) < len(opening) + len(closing):
        return None
    for token in _TOKEN.findall(inside):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth < 0:
            return None
    return inside


@per_answer
def key(answer: str) -> str:
    """A cleaned answer in one spelling: two answers with the same key are the same."""
    text = TEXT.sub(lambda words: f" {words[1]} ", clean(answer))
    text = re.sub(r"(?<=\d)\s*\^?\s*\{?\s*(?:st|nd|rd|th)(?![a-zA-Z])\s*\}?", "", text)  # March 1st
    text = re.sub(r"([A-Z][a-z]{2,} \d{1,2}), *(?=\d{4}(?!\d))", r"\1 ", text)  # March 1, 2003
    text = re.sub(r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2", text)
    text = re.sub(r"(\\[a-zA-Z]+)\s+(?![a-zA-Z])", r"\1", text)
    return re.sub(r"(?<![a-zA-Z0-9.])\s+|\s+(?![a-zA-Z0-9.])", "", text).strip()


def split(text: str, separators: tuple[str, ...]) -> list[str]:
    """The parts of a text between separators that stand outside all brackets."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        if token in separators and depth == 0:
            parts.append("")
            continue
        parts[-1] += token
        depth += (token in _OPENING) - (token in _CLOSING)
    return [part.strip() for part in parts]

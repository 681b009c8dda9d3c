r"""The answer of a text: the content of its last \boxed{...}."""

from __future__ import annotations

import re

_COMMAND = r"\\(?:boxed|fbox)\s*"
_TOKEN = re.compile(rf"(?P<box>\\?{_COMMAND}\{{)|\\.|[{{}}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""The content of the last \boxed{...} (or \fbox{...}) with balanced braces that is not empty; None without one.

    Of nested boxes the outer one counts, and the inner commands are removed: \boxed{x = \boxed{5}} is "x = {5}". A box
    that is never closed does not count, for instance after a cut at the length limit. \{ and \} are characters, not
    braces. The time grows linearly with the text.
    """
    opened: list[tuple[int, bool]] = []  # start of each open brace's content, and whether a box opened it
    boxes: list[tuple[int, int]] = []  # closed boxes, none inside another
    for token in _TOKEN.finditer(text):
        if token["box"] or token.group() == "{":
            opened.append((token.end(), bool(token["box"])))
        elif token.group() == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                while boxes and boxes[-1][0] > start:
                    boxes.pop()
                boxes.append((start, token.start()))
    for start, end in reversed(boxes):
        if content := re.sub(_COMMAND + r"(?=\{)", "", text[start:end]).strip():
            return content
    return None

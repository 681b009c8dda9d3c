r"""Grading of programs: the program in an answer against the tests of its row, in boxes (`sandbox`).

`extract_program` finds an answer's program among its blocks.

A row with test_method "function" has test code: statements that call the program's functions. Program and tests run in
two boxes, and calls cross between them (`sandbox/inside/values.py`). So a program can read neither the tests nor their
expected values, and it cannot claim to have passed. The verdict comes from the tests' box, with a token that the grader
draws for this answer. Names of Python and of the row's prefix keep their meaning in the tests, even if the program
defines them too (`plan`). The program is a module that the tests import: its `__name__` is not "__main__". A value that
cannot cross gives the verdict "unsupported_value". The tests may hand over a module or a file; or an object of the
program may claim to equal data of the tests.

A row with test_method "stdio" has inputs and outputs. The program runs once per input, in a new box, as `python
answer.py` does. Its output is compared here, word by word: the kind and amount of white space do not count (as in the
released T3D code). Prompts of input() and the exit code of exit() do not count either.

Time limits are CPU seconds of the program, from the start of its own process.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import secrets
import socket
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from t3d.common.errors import UserError, fault
from t3d.grading import Verdict
from t3d.grading.plan import plan_tests, prefix_program
from t3d.grading.sandbox import Box, Limits, SandboxError, attend, run_script, walls

# "error": an exception, a crash, too many processes, a full disk. "unsupported_value": the tests need a value that
# cannot cross between program and tests. "sandbox": the box did not work, so there is no verdict on the answer.
REASONS = (
    "correct", "wrong", "no_code", "error", "timeout", "memory", "output_limit", "unsupported_value", "sandbox",
)  # fmt: skip
EXTRACTIONS = ("defining", "last")
_ENDINGS = {"cpu": "timeout", "wall": "timeout", "memory": "memory", "output": "output_limit"}
_CHECKER = Limits(cpu=10.0)


@dataclass(frozen=True)
class CodeItem:
    """An answer without its prefix, and its row of the data set."""

    text: str
    row: Mapping[str, Any]


# --- rows ------------------------------------------------------------------------------------------------------------


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError, one line that starts with `where`, if a row cannot be graded."""
    method = row.get("test_method")
    if method == "function":
        lists: tuple[str, ...] = ("test_list",)
    elif method == "stdio":
        lists = ("test_input", "test_output")
    else:
        raise UserError(f"{where}: field 'test_method' is {method!r}; use function or stdio", "test_method")
    for name in lists:
        value = row.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise UserError(
                f"{where}: field {name!r} must be a list of at least one text; correct or remove the row", name
            )
    if method == "stdio" and len(row["test_input"]) != len(row["test_output"]):
        raise UserError(
            f"{where}: fields 'test_input' and 'test_output' differ in length; correct or remove the row", "test_output"
        )
    limit = row.get("test_time_limit", 1)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit <= 0:
        raise UserError(
            f"{where}: field 'test_time_limit' is {limit!r}; it must be a number of seconds above 0", "test_time_limit"
        )
    if not isinstance(row.get("prefix") or "", str):
        raise UserError(
            f"{where}: field 'prefix' must be text, found {row['prefix']!r}; correct or remove the row", "prefix"
        )
    for number, test in enumerate(row["test_list"] if method == "function" else ()):
        try:
            ast.parse(test)
        except (SyntaxError, ValueError) as error:
            raise UserError(
                f"{where}: field 'test_list', item {number}: not Python ({error}); correct it", "test_list"
            ) from error


# --- the program in the answer ---------------------------------------------------------------------------------------

_RELEASE = re.compile(r"```python(.*?)```", re.DOTALL)
_INLINE = re.compile(r"```python\b(.*?)```", re.DOTALL)
_OPENING = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^\s`{]*)[^`]*")
_PYTHON = re.compile(r"(?:py|python)[\d.]*", re.IGNORECASE)
_FAR = 300  # most lines from a fence that may end a block to the fence that ends it
_PRINTS = re.compile(r"\bprint\s*\(|\bstdout\b|^\s*(?:import|from)\s+\w", re.MULTILINE)


@dataclass(frozen=True)
class _Block:
    """A complete block of code: its lines, and whether its fence names Python (or no language)."""

    code: str
    tagged: bool


def extract_program(
    text: str, prefix: str | None = None, names: Sequence[str] = (), extraction: str = "defining"
) -> str | None:
    """The program in an answer; None without a complete block. Line ends become newlines; indentation in common goes.

    prefix: the start of the answer, which opens a block. names: the names that the tests take from the program.
    extraction:

    - "defining": the last block that defines most of the names. Without names, or if no block defines any, the last
      complete block. Fences named python, Python, py or python3 count. A fence without a name counts if its block
      defines a name or holds a program (and not its output), or if the answer has no named fence.
    - "last": the release's rule: the last complete ```python block.

    An answer continues the block of its prefix, or opens its own blocks. A program from the answer's own block is put
    after the prefix's lines.
    """
    if extraction not in EXTRACTIONS:
        raise fault("evaluation.extraction", extraction, f"use one of {', '.join(EXTRACTIONS)}")
    text, prefix = (part.replace("\r\n", "\n").replace("\r", "\n") for part in (text, prefix or ""))
    if extraction == "last":
        return _last_program(text, prefix)
    start = prefix_program(prefix)
    goes_on = bool(prefix) and not _opens_its_own(text)
    blocks = _blocks(prefix + text if goes_on else text)
    if not blocks:
        return None
    number = _choose(blocks, names)
    program = blocks[number].code
    if not prefix or (goes_on and number == 0):
        return _tidy(program)
    if program.strip("\n")[:1] in " \t" and not _definitions(_tidy(program), names):
        return _tidy(f"{start}\n{program}")  # the rest of the prefix's function
    return f"{start}\n{_tidy(program)}"


def _choose(blocks: list[_Block], names: Sequence[str]) -> int:
    """The number of the block with the program."""
    for imports in (False, True):  # an example after the answer may import it: from solution import f
        defined = [_definitions(_tidy(block.code), names, imports) for block in blocks]
        if most := max(defined):
            return max(number for number, count in enumerate(defined) if count == most)
    programs = [number for number, block in enumerate(blocks) if block.tagged or _PRINTS.search(block.code)]
    return (programs or range(len(blocks)))[-1]


def _definitions(program: str, names: Sequence[str], imports: bool = True) -> int:
    """How many of the names the program defines, or imports, at its top level, judged by its lines."""
    found = re.findall(r"^(?:async\s+)?(?:def|class)\s+(\w+)|^(\w+)\s*(?::[^=\n]+)?=(?!=)", program, re.MULTILINE)
    imported = re.findall(r"^(?:from\s.*)?import\b(.*)", program, re.MULTILINE) if imports else []
    defined = {name for pair in found for name in pair}.union(*(re.findall(r"\w+", line) for line in imported))
    return len(defined.intersection(names))


def _blocks(text: str) -> list[_Block]:
    """The complete blocks of Python, in their order.

    A block ends at a fence alone on its line, no deeper than its start; without such a fence, at the next fence.
    """
    blocks, lines, at = [], text.split("\n"), 0
    while at < len(lines):
        opening = _OPENING.fullmatch(lines[at])
        at += 1
        if opening is None:
            continue
        indentation, fence, name = opening.groups()
        end, last_line = _closing(lines, at, fence, len(indentation))
        if end is None:
            continue
        if not name or _PYTHON.fullmatch(name):
            blocks.append(_Block("\n".join([*lines[at:end], last_line]), bool(name)))
        at = end + 1
    return blocks or [_Block(code, True) for code in _INLINE.findall(text)]


def _closing(lines: list[str], start: int, fence: str, depth: int) -> tuple[int | None, str]:
    """The line where a block ends, and the code on that line; None if the block is cut off."""
    alone = re.compile(rf"([ \t]*){fence[0]}{{{len(fence)},}}[ \t]*")
    loose = None
    for number in range(start, len(lines)):
        line = lines[number]
        closing = alone.fullmatch(line)
        if closing and len(closing[1]) <= depth + 3:
            return number, ""
        opening = _OPENING.fullmatch(line)
        if (opening and opening[3]) or (loose and number > loose[0] + _FAR):
            break  # the next block begins: this one ended before, if at all
        if loose is None and line.rstrip().endswith(fence):
            loose = number, line.rstrip().rstrip(fence[0])
    return loose or (None, "")


def _tidy(program: str) -> str:
    return textwrap.dedent(program).strip("\n") + "\n"


def _opens_its_own(text: str) -> bool:
    """Whether an answer to a prefix starts its own block instead of continuing the prefix's."""
    before, fence, after = text.partition("```")
    name = after.partition("\n")[0].strip()
    opens = bool(fence) and (bool(_PYTHON.fullmatch(name)) or (not name and "```" in after))
    return opens and not re.search(r"^[ \t]+\S", before, re.MULTILINE)


def _last_program(text: str, prefix: str) -> str | None:
    before, fence, _ = text.partition("```python")
    if prefix and fence and "```" not in before and not re.search(r"^[ \t]+\S", before, re.MULTILINE):
        program = _last_program(text, "")
        return None if program is None else f"{prefix_program(prefix)}\n{program}"
    blocks = _RELEASE.findall(prefix + text)
    return _tidy(blocks[-1]) if blocks else None


# --- verdicts --------------------------------------------------------------------------------------------------------


def grade_all(
    items: Sequence[CodeItem],
    workers: int | None = None,
    time_limit: float | None = None,
    allow_unsandboxed: bool = False,
    progress: bool = True,
    extraction: str = "defining",
) -> list[Verdict]:
    """Verdicts for answers, in their order.

    workers: answers graded side by side (default: one per core, at most 64). time_limit: CPU seconds for an answer, or
    for each input of "stdio"; None = the row's test_time_limit, else 1. extraction: see `extract_program`.

    Raises UserError for a bad row, or if the machine has no sandbox and `allow_unsandboxed` is false.
    """
    from tqdm import tqdm

    kind = walls(allow_unsandboxed)
    for number, item in enumerate(items):
        check_row(item.row, f"the row of answer {number}")

    def grade(item: CodeItem) -> Verdict:
        start = time.monotonic()
        program = answer_program(item, extraction)
        reason = "no_code" if program is None else _run(program, item.row, time_limit, kind)
        return Verdict(reason == "correct", program, reason, time.monotonic() - start)

    threads = ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 64))
    try:
        verdicts = threads.map(grade, items)
        return list(tqdm(verdicts, total=len(items), desc="grading", unit="answer", disable=not progress))
    finally:
        threads.shutdown(cancel_futures=True)


def answer_program(item: CodeItem, extraction: str = "defining") -> str | None:
    """The program of an answer to a row; None without one."""
    if not _is_function(item.row):
        return extract_program(item.text, extraction=extraction)
    prefix = item.row.get("prefix") or ""
    return extract_program(item.text, prefix, plan_tests(tuple(item.row["test_list"]), prefix).names, extraction)


def _is_function(row: Mapping[str, Any]) -> bool:
    return row["test_method"] == "function"


def _run(program: str, row: Mapping[str, Any], time_limit: float | None, kind: str) -> str:
    """The reason, one of REASONS, for a program's verdict."""
    limits = Limits(cpu=float(time_limit or row.get("test_time_limit", 1)))
    try:
        if _is_function(row):
            return _run_function(program, row["test_list"], row.get("prefix") or "", limits, kind)
        return _run_stdio(program, row["test_input"], row["test_output"], limits, kind)
    except (SandboxError, OSError) as error:
        logging.getLogger(__name__).warning("an answer without a verdict: %s", error)
        return "sandbox"


def _run_function(program: str, tests: list[str], prefix: str, limits: Limits, kind: str) -> str:
    token = secrets.token_hex(16)
    patient = replace(_CHECKER, wall=limits.wall_seconds + 60)  # the tests' box waits for the program
    order = {"plan": asdict(plan_tests(tuple(tests), prefix)), "token": token}
    theirs, ours = socket.socketpair()
    with theirs, ours:
        with (
            Box("serve", {"program": program}, limits, kind, channel=theirs.fileno()) as answering,
            Box("check", order, patient, kind, channel=ours.fileno()) as checking,
        ):
            theirs.close()  # so that the end of one box closes the other's channel
            ours.close()
            attend(answering, checking, until=checking)
            try:
                outcome = json.loads(checking.stdout)
            except ValueError:
                return "error"  # the program's values exceeded a limit of the tests' box
            if outcome["token"] == token:
                answering.stop()
                attend(answering)  # read its final CPU time; a busy supervisor may report late
                return "timeout" if answering.ending["end"] == "cpu" else "correct"
            if outcome["reason"] != "gone":
                return outcome["reason"]
            attend(answering)  # a program that closed its channel runs until its limits end it
            return _ENDINGS.get(answering.ending["end"], "error")


def _run_stdio(program: str, inputs: list[str], outputs: list[str], limits: Limits, kind: str) -> str:
    prompts = True
    for given, expected in zip(inputs, outputs, strict=True):
        reason = _run_once(program, given, expected, limits, kind, prompts)
        if reason == "wrong" and prompts and _PROMPT.search(program):
            prompts = False
            reason = _run_once(program, given, expected, limits, kind, prompts)
        if reason != "correct":
            return reason
    return "correct"


_PROMPT = re.compile(r"\binput\b(?!\s*\(\s*\))")
_CRASH = re.compile(rb'^(?:Traceback \(most recent call last\):|  File ".*answer\.py", line \d+)$', re.MULTILINE)


def _run_once(program: str, given: str, expected: str, limits: Limits, kind: str, prompts: bool) -> str:
    box = run_script(program, limits, kind, stdin=given, prompts=prompts)
    if box.ending["end"] != "exit":
        return _ENDINGS.get(box.ending["end"], "error")
    if box.ending["code"] == 1 and box.stderr.rstrip().endswith(b"MemoryError"):
        return "memory"
    if box.ending["code"] == 1 and _CRASH.search(box.stderr):  # exit(1) itself is an orderly end, like any number
        return "error"
    return "correct" if box.stdout.decode(errors="replace").split() == expected.split() else "wrong"

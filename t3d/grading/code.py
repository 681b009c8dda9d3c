r"""Grading of programs: the answer's ```python block against the tests of its row, in boxes (`sandbox`).

A row with test_method "function" has test code: statements that call what the program defines. Program and tests run in
two boxes, and calls cross between them as data (`inside/roles.py`). A program can therefore neither read the tests, nor
the values they expect, nor say that they were passed: the verdict comes from the tests' box, with a token that the
grader made up for this one answer. What the tests call by a name of Python's, or take from the row's prefix, is
Python's and the prefix's, whatever the program defines. What cannot cross is graded wrong: an instance whose operators
the tests use, an exception class of the program's in their `except`, a function they hand over, an endless generator.

A row with test_method "stdio" has inputs and outputs. The program runs once per input, in a new box; what it printed is
compared here, word by word: the kind and amount of white space do not count (as in the released T3D code).

Time limits are CPU seconds of the program, from the moment when its own process exists.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
import logging
import os
import re
import secrets
import socket
import symtable
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from t3d.common.errors import UserError
from t3d.grading import Verdict
from t3d.grading.sandbox import Box, Limits, SandboxError, attend, run_script, walls

# "error": an exception, a crash, too many processes, a full disk; "sandbox": no box, and so no verdict on the answer.
REASONS = ("correct", "wrong", "no_code", "error", "timeout", "memory", "output_limit", "sandbox")
EXTRACTIONS = ("last",)  # rules that choose the answer's program; the first is the default
_ENDINGS = {"cpu": "timeout", "wall": "timeout", "memory": "memory", "output": "output_limit"}
_CHECKER = Limits(cpu=10.0)


@dataclass(frozen=True)
class CodeItem:
    """An answer without its prefix, and its row of the data set."""

    text: str
    row: Mapping[str, Any]


# --- rows ------------------------------------------------------------------------------------------------------------


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError, one line that starts with `where`, if a row is not fit for grading."""
    method = row.get("test_method")
    if method == "function":
        lists = ("test_list",)
    elif method == "stdio":
        lists = ("test_input", "test_output")
    else:
        raise UserError(f"{where}: field 'test_method' is {method!r}; use function or stdio")
    for name in lists:
        value = row.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where}: field {name!r} must be a list of at least one text; mend or remove the row")
    if method == "stdio" and len(row["test_input"]) != len(row["test_output"]):
        raise UserError(f"{where}: fields 'test_input' and 'test_output' differ in length; mend or remove the row")
    limit = row.get("test_time_limit", 1)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit <= 0:
        raise UserError(f"{where}: field 'test_time_limit' is {limit!r}; it must be a number of seconds above 0")
    if not isinstance(row.get("prefix") or "", str):
        raise UserError(f"{where}: field 'prefix' must be text, found {row['prefix']!r}; mend or remove the row")
    for number, test in enumerate(row["test_list"] if method == "function" else ()):
        try:
            ast.parse(test)
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{where}: field 'test_list', item {number}: not Python ({error}); mend it") from error


# --- the program in the answer ---------------------------------------------------------------------------------------

_BLOCK = re.compile(r"```python(.*?)```", re.DOTALL)


def extract_program(text: str, prefix: str | None = None) -> str | None:
    """The last complete ```python block of prefix + text, as in the release; None without one, as for an answer cut
    off in its block. Line ends become newlines, a common indentation goes.

    A prefix opens a block, which the answer continues. If the answer opens one of its own instead, that one counts,
    after the prefix's lines.
    """
    text, prefix = (part.replace("\r\n", "\n").replace("\r", "\n") for part in (text, prefix or ""))
    before, fence, _ = text.partition("```python")
    if prefix and fence and "```" not in before and not re.search(r"^[ \t]+\S", before, re.MULTILINE):
        program = extract_program(text)
        return None if program is None else f"{_prefix_program(prefix)}\n{program}"
    blocks = _BLOCK.findall(prefix + text)
    return textwrap.dedent(blocks[-1]).strip("\n") + "\n" if blocks else None


def _prefix_program(prefix: str) -> str:
    """The lines of the block that a prefix opens, or all of them."""
    return prefix.rpartition("```python")[2]


# --- what the tests may ask of it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """tests: code to run; names: what it takes from the program; helpers: code of the prefix that it runs itself."""

    tests: tuple[str, ...]
    names: tuple[str, ...]
    helpers: str


@functools.lru_cache(maxsize=1024)
def plan_tests(tests: tuple[str, ...], prefix: str = "") -> Plan:
    """Which names of the tests are the program's: the global ones that the tests do not define themselves.

    A built-in function is the program's only where the prefix defines it, or the tests end with check(<it>), or they
    ask for nothing else: no program can slip its own `abs` into the tests. Nor its own `math`: modules that the tests
    use without an import, x in x.y, and what the prefix imports, are imported on the tests' side. Functions which the
    prefix gives in full, such as an encoder whose decoder is asked for, are run there, with what stands before them.
    And check(check), of a row that asks for a function `check`, means the program's: the tests' own gets another name.
    """
    trees = [ast.parse(test) for test in tests]
    calls = [node.value for tree in trees for node in tree.body if isinstance(node, ast.Expr)]
    calls = [call for call in calls if isinstance(call, ast.Call) and call.args and isinstance(call.func, ast.Name)]
    entries = {call.args[0].id for call in calls if isinstance(call.args[0], ast.Name)}
    own = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    for call in calls:
        name = call.func.id
        if name in entries and name in own:
            call.func.id = own[name].name = f"{name}_program"
    used = set()
    for tree in trees:
        used |= _globals_read(symtable.symtable(ast.unparse(tree), "tests", "exec"))
    used -= {name for tree in trees for name in _bound(tree)}

    try:
        given = ast.parse(_prefix_program(prefix)).body
    except SyntaxError:
        given = []
    functions = {node.name: node for node in given if isinstance(node, ast.FunctionDef)}
    imports = [node for node in given if isinstance(node, ast.Import | ast.ImportFrom)]
    imports = [node for node in imports if _bound(ast.Module([node], [])) & used - entries]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    modules = used & sys.stdlib_module_names - entries - called - _bound(ast.Module(given, []))
    imports += [ast.Import([ast.alias(name)]) for name in sorted(modules)]
    used = used - _bound(ast.Module(imports, [])) or used
    asked = {name for name in used if not hasattr(builtins, name) or name in functions or name in entries} or used
    whole = {
        name
        for name, function in functions.items()
        if name in asked - entries
        and function is not given[-1]  # that one is for the answer to go on with
        and (len(function.body) > 1 or ast.get_docstring(function) is None)
    }
    helpers = imports + (given[:-1] if whole else [])
    return Plan(tuple(map(ast.unparse, trees)), tuple(sorted(asked - whole)), ast.unparse(ast.Module(helpers, [])))


def _globals_read(table: symtable.SymbolTable) -> set[str]:
    """Names that the code looks up in its module or among the built-ins."""
    module = table.get_type() == "module"
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (module or s.is_global())}
    return names.union(*map(_globals_read, table.get_children()))


def _bound(tree: ast.Module) -> set[str]:
    """Names that the code binds at its top level."""
    symbols = symtable.symtable(ast.unparse(tree), "tests", "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


# --- verdicts --------------------------------------------------------------------------------------------------------


def grade_all(
    items: Sequence[CodeItem],
    workers: int | None = None,
    time_limit: float | None = None,
    allow_unsandboxed: bool = False,
    progress: bool = True,
    extraction: str = EXTRACTIONS[0],
) -> list[Verdict]:
    """Verdicts for answers, in their order.

    workers: answers graded side by side (default: one per core, at most 64). time_limit: CPU seconds for an answer, for
    each input of "stdio"; None = the row's test_time_limit, 1 without one.

    Raises UserError where a row is not sound, or the machine has no sandbox and `allow_unsandboxed` is false.
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


def answer_program(item: CodeItem, extraction: str = EXTRACTIONS[0]) -> str | None:
    """The program of an answer to a row; None without one."""
    return extract_program(item.text, item.row.get("prefix") if _is_function(item.row) else None)


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
    patient = replace(_CHECKER, wall=limits.wall_seconds + 60)  # it waits for the program
    order = asdict(plan_tests(tuple(tests), prefix)) | {"token": token}
    theirs, ours = socket.socketpair()
    with theirs, ours:
        with (
            Box("serve", {"program": program}, limits, kind, channel=theirs.fileno()) as answering,
            Box("check", order, patient, kind, channel=ours.fileno()) as checking,
        ):
            theirs.close()  # so that the end of one box is the end of the line for the other
            ours.close()
            attend(answering, checking, until=checking)
            try:
                outcome = json.loads(checking.stdout)
            except ValueError:
                return "error"  # the answers were too much for the tests' box
            if outcome["token"] == token:
                answering.stop()
                attend(answering)  # its last word on the CPU time; a busy supervisor may not have looked for a while
                return "timeout" if answering.ending["end"] == "cpu" else "correct"
            if outcome["reason"] != "gone":
                return outcome["reason"]
            attend(answering)  # nobody waits for a program that hung up but its limits
            return _ENDINGS.get(answering.ending["end"], "error")


def _run_stdio(program: str, inputs: list[str], outputs: list[str], limits: Limits, kind: str) -> str:
    for given, expected in zip(inputs, outputs, strict=True):
        box = run_script(program, limits, kind, stdin=given)
        if (box.ending["end"], box.ending.get("code")) != ("exit", 0):
            if box.stderr.rstrip().endswith(b"MemoryError"):
                return "memory"
            return _ENDINGS.get(box.ending["end"], "error")
        if box.stdout.decode(errors="replace").split() != expected.split():
            return "wrong"
    return "correct"

"""The tests' side of the line: runs the test code, with stand-ins for the program's names, and reports the outcome.

The program can only see arguments and answer with values, like an honest one. It answers operations whose operands are
all its own objects. It is never asked for an operation with data of the tests: it would see the data, and its answer
would prove nothing. Tests that need such an operation have no verdict: Unsupported.
"""

from __future__ import annotations

import _thread
import builtins
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

from values import CONTAINERS, Gone, Peer, StandIn, Unsupported, overwrite

_CHANNEL = 3  # the socket between program and tests
_MODULE = "tests"  # module name of the classes that the test code defines
_PLAIN = ("builtins", "functools", "itertools", "operator")  # modules of functions and iterators that it may hand over
_OPEN = ("__class__", "__name__", "__qualname__", "__doc__", "__dict__")
_MOST_LENT = 1 << 14  # most characters of a container of the program that is searched for changes by the tests
_ARITHMETIC = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or".split()
_MIXED = {f"__{name}__" for name in ("eq", "lt", "le", "gt", "ge")}  # operations with a second operand
_MIXED |= {f"__{way}{name}__" for way in ("", "r", "i") for name in _ARITHMETIC}


class Tests(Peer):
    """Asks the program. `gone` and `unsupported` keep the first fault, even if the tests catch the exception."""

    gives = True

    def __init__(self) -> None:
        super().__init__(_CHANNEL)
        self.trouble: BaseException | None = None
        self.raised: list[BaseException] = []  # by the program
        self._pending: list[tuple[Any, list]] = []  # containers with their new content, not yet in place
        self._copies: dict[int, tuple[Any, Any]] = {}  # by id: a returned copy, the container it stands for
        self._at_once: set[int] = set()  # numbers of given containers that a test's own object holds
        self._answering = 0
        self._lent: dict[int, tuple[Any, list, Any]] = {}  # by number: a container, its content there, itself
        self._made: set[int] = set()  # ids of objects that the tests made with a class of the program
        self._turn = _thread.RLock()  # tests may have threads
        self._streams = sys.stdout, sys.stdin, builtins.input
        self.doubt = ""  # the reason why a failure may not be the program's

    # asking

    def exchange(self, kind: str, target: Any, *rest: Any) -> tuple[str, Any]:
        with self._turn:
            if kind != "update":
                self.settle()
                self._give_back()
            return self._exchange(kind, target, *rest)

    def _exchange(self, kind: str, target: Any, *rest: Any) -> tuple[str, Any]:
        if self.trouble:
            raise self.trouble
        if self._streams != (sys.stdout, sys.stdin, builtins.input):
            self.doubt = "the tests replaced a stream, and the program does not see that"
        try:
            outcome, value = super().exchange(kind, target, *rest)
        except (Gone, Unsupported) as trouble:
            self.trouble = trouble
            raise
        except (EOFError, OSError) as trouble:
            self.trouble = Gone(f"{type(trouble).__name__}: {trouble}")
            raise self.trouble from trouble
        except Exception as trouble:  # the message held no value
            self.trouble = Gone(f"{type(trouble).__name__}: {trouble}")
            raise self.trouble from None
        if kind == "call" and isinstance(target, StandIn) and "__instancecheck__" in vars(type(target)):
            self._made.add(id(value))
        if outcome == "error":
            self.raised.append(value)
            iterating = kind in ("next", "resume") or (kind == "apply" and rest[0] == "__next__")
            if isinstance(value, StopIteration | StopAsyncIteration | GeneratorExit) and not iterating:
                self.refuse(f"{type(value).__name__} out of a call")  # it would end a loop of the tests in silence
        return outcome, value

    def refuse(self, why: str) -> None:
        self.trouble = self.trouble or Unsupported(why)
        raise self.trouble

    def operation(self, name: str) -> Callable:
        if name == "__contains__":
            return lambda value, item: self._contains(value, item)

        def ask(value: Any, *others: Any) -> Any:
            foreign = [other for other in others if not self._is_theirs(other)]
            if foreign and name in _MIXED and not (name == "__eq__" and foreign == [None]):
                self.refuse(f"{name} of a {type(value).__name__} with a {type(foreign[0]).__name__}")
            answer = self.ask("apply", value, name, *others)
            return False if foreign and name == "__eq__" else answer

        return ask

    def _contains(self, value: Any, item: Any) -> bool:
        """Look at the object's items. Only an object that the tests made themselves may answer directly."""
        base: Any = type(value).__mro__[1]
        if base is not StandIn:
            held = base.__contains__(value, item)
        else:
            held = "__iter__" in vars(type(value)) and any(each is item or each == item for each in value)
        claimed = held or self.ask("apply", value, "__contains__", item)
        if claimed and not held and id(value) not in self._made:
            self.refuse(f"__contains__ of a {type(value).__name__}")
        return bool(claimed)

    def _is_theirs(self, value: Any) -> bool:
        return id(value) in self._theirs or id(type(value)) in self._theirs

    # containers that the program changed

    def _give(self, value: Any) -> int:
        number = super()._give(value)
        if self._answering:
            self._at_once.add(number)
        return number

    def changed(self, changes: list, value: Any) -> None:
        """Changes wait for the end of the statement: f(x) == sorted(x) compares with the x before the call."""
        for number, content in changes:
            container = self.given[number]
            now = self.decode(content)
            if type(now) is not type(container):
                raise ValueError("a container cannot become another")
            if number in self._at_once:
                overwrite(container, now)
            else:
                self._pending.append((container, now))
        if value is None:  # as from list.sort: this statement compares nothing
            self._settle_pending()

    def _settle_pending(self) -> None:
        pending, self._pending = self._pending, []
        for container, now in pending:
            overwrite(container, now)

    def _decode_copy(self, number: int, content: Any) -> Any:
        copy = self.decode(content)
        self._copies[id(copy)] = copy, self.given[number]
        return copy

    def _forget(self) -> None:
        super()._forget()
        if self.depth == 0:
            self._at_once.clear()

    def _decode_lent(self, number: int, content: Any) -> Any:
        container = self.decode(content)
        known = self._lent.get(number)
        if known and type(known[0]) is type(container):
            overwrite(known[0], container)
            container = known[0]
        if len(str(content)) < _MOST_LENT:
            token = self._stand_in(number, object)
            self._lent[number] = container, self._plain(container), token
        return container

    def _plain(self, container: Any) -> list:
        """The content of a container that is not given to the program."""
        self.gives = False
        try:
            return self.content(container)
        finally:
            self.gives = True

    def _give_back(self) -> None:
        """Send the program the tests' changes in its containers."""
        for number, (container, before, token) in list(self._lent.items()):
            now = self._plain(container)
            if now != before:
                self._lent[number] = container, now, token
                self.ask("update", token, container)

    # functions that the test code calls (see `code.Settling`)

    def settle(self) -> None:
        """Make pending changes: before a statement, and between the operands of `and` and `or`."""
        self._settle_pending()
        self._copies.clear()

    def original(self, value: Any) -> Any:
        """The container itself, for a result that is one of the arguments."""
        copies = dict(self._copies)
        self._settle_pending()
        return copies.get(id(value), (value, value))[1]

    def type_of(self, value: Any) -> Any:
        """type(value) for the program's objects and exceptions."""
        kind = type(value)
        if id(value) in self._theirs and not isinstance(value, type):
            return self.ask("attribute", value, "__class__")
        return kind.__mro__[1] if "_text" in getattr(value, "__dict__", ()) else kind

    # being asked

    def answer(self, message: list) -> None:
        self._answering += 1
        try:
            super().answer(message)
        finally:
            self._answering -= 1

    def may_share(self, value: Any) -> bool:
        """Functions, classes, iterators and instances of the tests' own classes: never a module, a frame or a file."""
        own = type(value).__module__ == _MODULE
        if own and isinstance(value, CONTAINERS):
            return False  # the program's changes in it would be lost
        return own or (type(value).__module__ in _PLAIN and (callable(value) or isinstance(value, Iterator)))

    def allow(self, kind: str, target: Any, rest: list) -> None:
        """Allow calls and items of objects that were handed over, attributes and operations of the tests' objects."""
        if kind in ("call", "next", "apply") and id(target) in self._numbers:
            return
        own = type(target).__module__ == _MODULE
        if kind in ("apply", "copy") and own:
            return
        public = isinstance(rest[0], str) and (
            not rest[0].startswith("__") or (kind == "attribute" and rest[0] in _OPEN)
        )
        if public and (own or (kind == "attribute" and isinstance(target, type) and target.__module__ == _MODULE)):
            return
        raise AttributeError(f"{kind} is not for the program")


def main(order: dict) -> None:
    """Runs the tests of order["plan"] and writes the outcome to the result pipe, the box's standard output.

    The token proves that the tests passed their last line. It is read from the order just before it is written. The
    tests' own output is discarded.
    """
    result = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.path[:] = [path for path in sys.path if path != order["code"]]
    sys.argv = ["tests.py"]
    random.seed(0)  # some tests draw their arguments: the same ones every time
    reason, detail = run(Tests(), **order["plan"])
    token = order["token"] if reason == "passed" else None
    os.write(result, json.dumps({"reason": reason, "detail": detail[:500], "token": token}).encode() + b"\n")


def run(peer: Tests, tests: tuple, names: tuple, classes: tuple, helpers: str) -> tuple[str, str]:
    """(reason, detail) of the tests' outcome: passed, wrong, error, memory, unsupported_value, or gone."""
    space: dict[str, Any] = {"__name__": _MODULE}
    try:
        exec(compile(helpers, _MODULE, "exec", dont_inherit=True), space)
        space |= _given_names(peer, names, space, set(classes))
        for test in tests:
            exec(compile(test, _MODULE, "exec", dont_inherit=True), space)
    except BaseException as error:
        return _reason(peer, error)
    return _reason(peer, peer.trouble) if peer.trouble else ("passed", "")


def _reason(peer: Tests, error: BaseException) -> tuple[str, str]:
    trouble = peer.trouble or error
    detail = f"{type(trouble).__name__}: {trouble}"
    theirs = any(trouble is each for each in peer.raised)
    if peer.doubt:
        return "unsupported_value", f"{peer.doubt}; {detail}"
    if isinstance(trouble, Unsupported):
        return "unsupported_value", detail
    if isinstance(trouble, Gone):
        return "gone" if isinstance(trouble.__cause__, EOFError | OSError) else "error", detail
    if isinstance(trouble, MemoryError) and theirs:
        return "memory", detail
    return "wrong" if isinstance(trouble, AssertionError) and not theirs else "error", detail


def _given_names(peer: Tests, names: tuple, space: dict[str, Any], classes: set[str]) -> dict[str, Any]:
    """The program's names, and the functions that keep the test code in step with the program (`code.Settling`)."""
    data = []
    found = {}
    for name in names:
        try:
            found[name] = peer.ask("get", name)
        except NameError:
            continue  # the tests' use of it then raises an error, or finds the built-in
        if not isinstance(found[name], StandIn | type):
            data.append(name)

    def settle() -> None:
        peer.settle()
        for name in classes & space.keys():  # defined by now
            classes.discard(name)
            peer.ask("offer", name, space[name])
        for name in data:  # calls may have changed them
            space[name] = peer.ask("get", name)

    return found | {"__settle__": settle, "__original__": peer.original, "__type__": peer.type_of}

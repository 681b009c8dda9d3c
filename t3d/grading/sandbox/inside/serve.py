"""The program's side of the line: runs answer.py as a module, then answers calls of its names."""

from __future__ import annotations

import operator
import os
import sys
import types
from typing import Any

from values import Gone, Peer, Unsupported

_CHANNEL = 3  # the socket between program and tests
_FRESH = 2  # references to an object that nothing in the program holds: ours, and getrefcount's own


class Program(Peer):
    """Answers all requests, and reports the changes in the containers that a call was given."""

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__(_CHANNEL)
        self.names = names
        self.failure: BaseException | None = None
        self._before: list[Any] = []  # of each given container, when it came or was reported
        self._referring = False
        self._lending = False  # whether the container to encode is held by an object or a name

    def do(self, kind: str, target: Any, rest: list) -> Any:
        if self.failure is not None:
            raise self.failure
        if kind == "get":
            if target not in self.names:
                raise NameError(f"name {target!r} is not defined")
            self._lending = True
            return self.names[target]
        if kind == "offer":
            self.names.setdefault(target, rest[0])
            return None
        if kind == "await":
            import asyncio

            return asyncio.run(target)
        self._note()
        result = super().do(kind, target, rest)
        self._lending = sys.getrefcount(result) > _FRESH
        return result

    def exchange(self, kind: str, target: Any, *rest: Any) -> tuple[str, Any]:
        answer = super().exchange(kind, target, *rest)
        self._note()
        return answer

    def _note(self) -> None:
        """Remember the content of the containers that came with the last message."""
        self._before += map(_held, self.given[len(self._before) :])

    def _refer(self, container: Any) -> Any:
        """The content of a given container, with references to the others."""
        self._referring = True
        try:
            return self.content(container)
        finally:
            self._referring = False

    def _encode_container(self, value: Any) -> Any:
        number = self._given_numbers.get(id(value))
        if self._referring and number is not None:
            return ["given", number]
        lending, self._lending = self._lending and number is None, False  # the container itself, not its items
        data = super()._encode_container(value)
        return ["lent", self._keep(value), data] if lending else data

    def changes(self) -> list:
        changed, self._lending = [], False
        for number, (container, before) in enumerate(zip(self.given, self._before, strict=False)):
            now = _held(container)
            if len(now) != len(before) or not all(map(operator.is_, now, before)):
                self._before[number] = now
                changed.append([number, self._refer(container)])
        return changed

    def _forget(self) -> None:
        super()._forget()
        if self.depth == 0:
            self._before.clear()


def _held(container: Any) -> list:
    """The objects that a container holds, in its order. If they are the same objects, it has not changed."""
    if isinstance(container, dict):
        return [*container, *container.values()]
    if hasattr(container, "tobytes"):
        return list(container.tobytes())  # small numbers are the same objects
    return list(container)


def main() -> None:
    """Answers until the tests close the channel. After an exit() the program's names count that it had defined. Any
    other failure of the program is its answer to every request.
    """
    path = os.path.join(os.getcwd(), "answer.py")
    sys.path[0], sys.argv, sys.orig_argv = os.getcwd(), ["answer.py"], [sys.executable, "answer.py"]
    module = types.ModuleType("answer")
    module.__file__ = path
    here = sys.modules["__main__"]  # kept: this very code runs in it
    sys.modules["answer"] = sys.modules["__main__"] = module
    for name in ("serve", "values"):
        del sys.modules[name]
    program = Program(module.__dict__)
    try:
        with open(path, "rb") as file:
            source = file.read()
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        pass
    except BaseException as error:
        program.failure = error
    try:
        while True:
            program.answer(program.receive())
    except (EOFError, OSError, Gone, Unsupported):
        del here

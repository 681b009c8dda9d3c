"""Many modules of t3d as one file: the definitions that some roots need, in an order in which they can run.

Nothing is copied by hand: the text of every definition is its source. A definition is a function, a class or an
assignment at the top of a module. It needs the names in its text, wherever they are defined.
"""

import ast
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef
PACKAGE = "t3d"


class Place(NamedTuple):
    """A definition's module and name."""

    module: str
    name: str


class Source(NamedTuple):
    """A module's text: its lines, its definitions, and name -> (module, attribute or "") of its imports."""

    lines: list[str]
    definitions: dict[str, ast.stmt]
    imports: dict[str, tuple[str, str]]


@cache
def source_of(module: str) -> Source:
    """The parsed source of a module."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    text = Path(spec.origin).read_text(encoding="utf-8")
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in _statements(ast.parse(text).body):
        if isinstance(node, Function | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                definitions |= {name.id: node for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level
            imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
    return Source(text.splitlines(), definitions, imports)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements at the top of a module; those of `if TYPE_CHECKING` count, because annotations need them."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements(node.body)
        else:
            yield node


def _names(*nodes: ast.AST | None) -> set[str]:
    return {name.id for node in nodes if node for name in ast.walk(node) if isinstance(name, ast.Name)}


def _at_once(node: ast.AST) -> set[str]:
    """The names that must exist when a definition runs; a function's body runs later."""
    if isinstance(node, Function):
        arguments = node.args
        return _names(*node.decorator_list, node.returns, arguments)
    if isinstance(node, ast.ClassDef):
        names = _names(*node.decorator_list, *node.bases, *node.keywords)
        return names.union(*map(_at_once, node.body))
    return _names(node)


class Bundle:
    """The definitions that ``roots`` need.

    Args:
        replaced: definitions whose text is not their source, because it depends on t3d's folders. A text may name other
            roots.
    """

    def __init__(self, roots: Sequence[Place], replaced: Mapping[Place, str]):
        self.replaced = replaced
        self.order: list[Place] = []
        self.external: dict[str, tuple[str, str]] = {}
        self._begun: set[Place] = set()
        for place in roots:
            self._place(place)
        for place in self.order:  # it grows: the bodies of its functions need more
            for other in self._needs(place, _names):
                self._place(other)

    def _node(self, place: Place) -> ast.AST:
        if place in self.replaced:
            return ast.parse(self.replaced[place]).body[0]
        return source_of(place.module).definitions[place.name]

    def _place(self, place: Place) -> None:
        """Add a definition after the definitions that it needs at once."""
        if place in self._begun:
            return
        self._begun.add(place)
        node = self._node(place)
        for other in self._needs(place, _at_once):
            self._place(other)
            if not isinstance(node, Function) and isinstance(self._node(other), Function):
                for called in self._needs(other, _names):  # a class or an assignment may call it
                    self._place(called)
        self.order.append(place)

    def _needs(self, place: Place, names: object) -> list[Place]:
        """The definitions of t3d that a definition names; other libraries' names go to ``external``."""
        assert callable(names)
        found = []
        for name in sorted(names(self._node(place))):
            if other := self._resolved(place.module, name):
                found.append(other)
        return found

    def _resolved(self, module: str, name: str) -> Place | None:
        source = source_of(module)
        if name in source.definitions:
            return Place(module, name)
        if name not in source.imports:
            return None  # a builtin, or a local name
        origin, attribute = source.imports[name]
        if origin.partition(".")[0] == PACKAGE:
            found = self._resolved(origin, attribute)
            assert found, f"{module}: {name} is a module; import its definitions, or replace what uses it"
            return found
        known = self.external.setdefault(name, (origin, attribute))
        assert known == (origin, attribute), f"{name} is {known} and {(origin, attribute)}"
        return None

    def text(self) -> str:
        """The imports, then the definitions."""
        names = [name for _, name in self.order]
        twice = {name for name in names if names.count(name) > 1} | (set(names) & self.external.keys())
        assert not twice, f"two definitions are named {sorted(twice)}"
        parts = dict.fromkeys(self._source(place) for place in self.order)
        return "\n\n\n".join(["\n".join(self._imports()), *parts]) + "\n"

    def _imports(self) -> list[str]:
        whole = sorted(module for module, attribute in self.external.values() if not attribute)
        parts: dict[str, list[str]] = {}
        for name, (module, attribute) in sorted(self.external.items()):
            if attribute:
                parts.setdefault(module, []).append(name if name == attribute else f"{attribute} as {name}")
        every = [f"from {module} import {', '.join(parts[module])}" for module in sorted(parts)]
        return [*(f"import {module}" for module in whole), *every]

    def _source(self, place: Place) -> str:
        if place in self.replaced:
            return self.replaced[place].strip()
        node, lines = source_of(place.module).definitions[place.name], source_of(place.module).lines
        inner = [part for part in ast.walk(node) if isinstance(part, ast.ImportFrom)]
        assert not any((part.module or "").partition(".")[0] == PACKAGE for part in inner), f"{place}: a lazy import"
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        return "\n".join(lines[first - 1 : node.end_lineno])

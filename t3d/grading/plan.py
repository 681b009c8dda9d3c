"""Prepares test code for a program in another box: the names that come from the program, and the points to wait for it.

A row's tests are statements that call the program's functions. `plan_tests` finds the names that come from the program,
and inserts calls such as `__settle__` into the tests (`sandbox/inside/check.py`).
"""

from __future__ import annotations

import ast
import builtins
import functools
import symtable
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Test code, ready to run.

    Attributes:
        tests: code to run.
        names: the names that it takes from the program.
        classes: the classes that it defines; the program may use them.
        helpers: code of the prefix that runs on the tests' side.
    """

    tests: tuple[str, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    helpers: str


@functools.lru_cache(maxsize=1024)
def plan_tests(tests: tuple[str, ...], prefix: str = "") -> Plan:
    """Finds the names of the tests that come from the program: the global names that the tests do not define.

    - A built-in function comes from the program if the prefix defines it, if the tests end with check(<it>), or if the
      tests take no other name. So no program can replace `abs` in the tests.
    - Modules are imported on the tests' side, so no program can replace `math`. These are the imports of the prefix,
      and each x of x.y that the tests use without an import.
    - Functions with a body in the prefix run on the tests' side, with the code before them. An example is an encoder
      in a row that asks for the decoder.
    - check(check), in a row that asks for a function `check`, calls the program's. The tests' own check is renamed.
    """
    trees = [ast.parse(test) for test in tests]
    entries = _entries(trees)
    used = _names_used(trees)
    given = _statements(prefix_program(prefix))
    imports = _imports(trees, given, used, entries)
    used = used - _bound(ast.Module(imports, [])) or used
    functions = {node.name for node in given if isinstance(node, ast.FunctionDef)}
    asked = {name for name in used if not hasattr(builtins, name) or name in functions or name in entries} or used
    whole = asked & _given_in_full(given) - entries
    helpers = imports + (given[:-1] if whole else [])
    return Plan(
        tests=tuple(ast.unparse(ast.fix_missing_locations(_Settling().visit(tree))) for tree in trees),
        names=tuple(sorted(asked - whole)),
        classes=tuple(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)),
        helpers=ast.unparse(ast.Module(helpers, [])),
    )


def prefix_program(prefix: str) -> str:
    """The lines of the block that a prefix opens, or all of them."""
    return prefix.rpartition("```python")[2]


def _entries(trees: list[ast.Module]) -> set[str]:
    """The names x of calls check(x) at the top level. If x is `check`, the tests' own check is renamed."""
    calls = [node.value for tree in trees for node in tree.body if isinstance(node, ast.Expr)]
    called = [
        (call.func, call.args[0])
        for call in calls
        if isinstance(call, ast.Call) and call.args and isinstance(call.func, ast.Name)
    ]
    entries = {argument.id for _, argument in called if isinstance(argument, ast.Name)}
    own = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    for function, _ in called:
        name = function.id
        if name in entries and name in own:
            function.id = own[name].name = f"{name}_program"
    return entries


def _names_used(trees: list[ast.Module]) -> set[str]:
    """Names that the tests use and do not define."""
    tables = [symtable.symtable(ast.unparse(tree), "tests", "exec") for tree in trees]
    return set().union(*map(_globals_read, tables)).difference(*map(_bound, trees))


def _statements(program: str) -> list[ast.stmt]:
    try:
        return ast.parse(program).body
    except SyntaxError:
        return []


def _imports(trees: list[ast.Module], given: list[ast.stmt], used: set[str], entries: set[str]) -> list[ast.stmt]:
    """Imports of the prefix that the tests need, and of modules x that they use as x.y without an import."""
    imports: list[ast.stmt] = [node for node in given if isinstance(node, ast.Import | ast.ImportFrom)]
    imports = [node for node in imports if _bound(ast.Module([node], [])) & used - entries]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    modules = used & sys.stdlib_module_names - entries - called - _bound(ast.Module(given, []))
    return [*imports, *(ast.Import([ast.alias(name)]) for name in sorted(modules))]


def _given_in_full(given: list[ast.stmt]) -> set[str]:
    """Functions of the prefix with a body. The answer continues the last statement, so that one does not count."""
    functions = [node for node in given[:-1] if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if len(node.body) > 1 or ast.get_docstring(node) is None}


def _globals_read(table: symtable.SymbolTable) -> set[str]:
    """Names that the code looks up in its module or among the built-ins."""
    module = table.get_type() == "module"
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (module or s.is_global())}
    return names.union(*map(_globals_read, table.get_children()))


def _bound(tree: ast.Module) -> set[str]:
    """Names that the code binds at its top level."""
    symbols = symtable.symtable(ast.unparse(tree), "tests", "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


# --- in step with the program ----------------------------------------------------------------------------------------


class _Settling(ast.NodeTransformer):
    """Marks the points at which the program's changes of an argument appear: the next statement or operand of `and`.

    __settle__() makes the changes. If a call returned its argument, __original__(x) is the argument itself: for
    `f(x) is x`, and for names that are assigned. type(x) becomes __type__(x), the program's own class.
    """

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, field, [new for statement in value for new in _settled(statement)])
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        node.values[1:] = [ast.BoolOp(ast.Or(), [_call("__settle__"), value]) for value in node.values[1:]]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "type" and len(node.args) == 1 and not node.keywords:
            node.func.id = "__type__"
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "__class__" and isinstance(node.ctx, ast.Load):
            return _call("__type__", node.value)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops):
            node.left = _call("__original__", node.left)
            node.comparators = [_call("__original__", each) for each in node.comparators]
        return node


def _settled(statement: ast.stmt) -> list[ast.stmt]:
    """A statement with the calls around it. Imports and texts get none, because some must stay first."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [statement]
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return [statement]
    after = []
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call | ast.Await):
        stored = [node for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)]
        names = {node.id for node in stored if isinstance(node.ctx, ast.Store)}
        after = [ast.Assign([ast.Name(n, ast.Store())], _call("__original__", ast.Name(n))) for n in sorted(names)]
    return [ast.Expr(_call("__settle__")), statement, *after]


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])

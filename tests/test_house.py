"""The rooms of t3d/ and what each may import: lower floors only, no circle, at most 7 floors."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = (
    ("common", "blocks"),
    ("data", "states", "grading"),
    ("tasks", "decode", "objectives"),
    ("models",),
    ("rollout", "training", "integrations"),
    ("evaluation",),
    ("cli", "share"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}


def imported(path: Path) -> set[str]:
    """The rooms of t3d that a file imports, lazy imports included; "studies" for our own studies."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name != "t3d.__version__"]
    return {part[1] for part in parts if part[0] == "t3d" and len(part) > 1} | {"studies"} & {p[0] for p in parts}


def test_every_room_has_its_floor():
    folders = {path.parent.name for path in (ROOT / "t3d").glob("*/__init__.py")}
    assert folders == set(FLOOR)
    assert {path.name for path in (ROOT / "t3d").glob("*.py")} <= {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_imports_lower_floors_only(room):
    for path in (ROOT / "t3d" / room).rglob("*.py"):
        for other in imported(path) - {room}:
            assert other in FLOOR and FLOOR[other] < FLOOR[room], f"{path.relative_to(ROOT)} imports t3d.{other}"


@pytest.mark.parametrize("script", ["data", "sample", "train", "eval.py"])
def test_scripts_call_stages_not_the_command(script):
    path = ROOT / script
    for file in path.glob("*.py") if path.is_dir() else [path]:
        assert imported(file) <= set(FLOOR) - {"cli"}, file

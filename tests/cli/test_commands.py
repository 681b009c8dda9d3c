"""The command `t3d`: its table, its help, and what `python -m` does with modules that are no command."""

import subprocess
import sys
import time
import tomllib
from importlib import import_module

import pytest

from t3d.cli import COMMANDS, dispatch, main
from tests.conftest import ROOT, raises_key


def python_m(module: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_fits_a_screen_and_names_every_command(capsys):
    for arguments in (["--help"], ["-h"]):
        assert dispatch(arguments) is None
    text = capsys.readouterr().out
    assert text.count("\n") < 2 * 24 and max(map(len, text.splitlines())) <= 100
    assert all(f"  {name} " in text and line in text for name, (line, _) in COMMANDS.items())
    assert dispatch([]) == 2


def test_help_is_quick():
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        done = python_m("t3d", "--help")
        taken.append(time.perf_counter() - began)
        assert done.returncode == 0 and done.stdout.startswith("usage: t3d") and not done.stderr
    assert min(taken) < 0.5
    heavy = "import sys, t3d.cli; sys.exit(bool({'torch', 'transformers', 'omegaconf', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_under_its_name(name, capsys):
    module, _, function = COMMANDS[name][1].partition(":")
    assert callable(getattr(import_module(module), function))
    with pytest.raises(SystemExit) as left:
        dispatch([name, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: t3d {name} ")


@pytest.mark.parametrize("given, meant", [("trian", "train"), ("evaluate", "eval"), ("rollouts", "rollout")])
def test_an_unknown_command_is_answered_by_the_nearest(given, meant):
    with raises_key(given) as error:
        dispatch([given, "a.b=c"])
    assert str(error.value).endswith(f"did you mean {meant}?")


def test_the_exit_code_is_the_commands(capsys):
    with pytest.raises(SystemExit) as left:
        main(["nothing-like-it"])
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        main(["train", "training.block_siz=8"])
    assert left.value.code == 2


def test_it_is_installed_under_its_name():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["t3d"] == "t3d.cli:main"


@pytest.mark.parametrize("package, stage", [("rollout", "1"), ("training", "3"), ("evaluation", "4")])
def test_a_stages_package_is_a_command(package, stage):
    done = python_m(f"t3d.{package}", "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m t3d.{package} ")
    assert f"Stage {stage}:" in done.stdout


@pytest.mark.parametrize(
    "module, command", [("rollout.run", "rollout"), ("training.loop", "train"), ("evaluation.run", "eval")]
)
def test_a_stages_workflow_names_its_command(module, command):
    done = python_m(f"t3d.{module}")
    assert done.returncode != 0 and f"t3d {command}" in done.stderr and done.stderr.count("\n") == 1


def test_a_module_without_command_is_refused():
    done = python_m("t3d.data.prompts")
    assert done.returncode != 0 and "t3d.data.prompts" in done.stderr and done.stderr.count("\n") == 1

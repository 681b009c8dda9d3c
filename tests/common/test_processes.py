"""Threads by the model's size, passive waiting before torch loads, and imports only where they are used."""

import os
import subprocess
import sys

import pytest
import torch

from t3d.common.processes import choose_threads, cores
from tests.conftest import ROOT, tiny_model


def python(code: str, **variables: str) -> str:
    """What a fresh process prints."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=unset | variables, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Sized:
    """The two facts of a model that decide."""

    def __init__(self, weights: int, device: str = "cpu"):
        self.weights, self.device = weights, torch.device(device)

    def num_parameters(self) -> int:
        return self.weights


def test_a_small_model_gets_one_thread_and_a_large_one_its_share(threads, monkeypatch):
    monkeypatch.setattr("t3d.common.processes.cores", lambda: 8)
    assert choose_threads(tiny_model()) == 1 == torch.get_num_threads()
    assert choose_threads(Sized(35_000_000)) == 3
    assert choose_threads(Sized(10**9)) == 8
    assert choose_threads(Sized(10**9), processes=4) == 2
    assert choose_threads(Sized(10**9), processes=100) == 1


def test_a_number_that_is_set_is_kept(threads, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads(Sized(10**9)) == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert choose_threads(Sized(10**9, "meta")) == 1  # not on a CPU
    assert cores() >= 1


def test_commands_wait_passively_and_a_choice_is_kept():
    code = "from t3d.common.errors import run_main\nimport os\nrun_main(lambda: print(os.environ['OMP_WAIT_POLICY']))"
    assert python(code) == "PASSIVE"
    assert python(code, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


HEAVY = ("torch", "transformers", "deepspeed", "datasets", "pandas", "matplotlib", "peft", "jinja2")


@pytest.mark.parametrize(
    "module",
    ["t3d.cli", "t3d.evaluation", "t3d.evaluation.__main__", "t3d.rollout.__main__", "t3d.training.__main__"]
    + ["t3d.evaluation.report", "t3d.grading.math", "t3d.tasks.problems"],
)
def test_an_import_brings_no_heavy_library(module):
    """So run_main sets the threads' waiting before torch loads, and help is quick."""
    assert python(f"import sys, {module}\nprint([n for n in {HEAVY} if n in sys.modules])") == "[]"


def test_an_unwrap_imports_no_deepspeed():
    code = """
import sys
from accelerate import Accelerator
from torch.nn import Linear
from t3d.training.distribution import unwrapped
accelerator, model = Accelerator(cpu=True), Linear(2, 2)
assert unwrapped(accelerator, accelerator.prepare_model(model)) is model
print("deepspeed" in sys.modules)
"""
    assert python(code) == "False"

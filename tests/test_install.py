"""The files that say which packages are installed agree with each other, and the package works without its extras."""

import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FULL = [*PROJECT["dependencies"], *EXTRAS["deepspeed"], *EXTRAS["track"], *EXTRAS["lm-eval"]]


def lines(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def pins(name: str) -> dict[str, Version]:
    """A constraints file: the version of each package, under its normalised name."""
    parts = (line.split("==") for line in lines(name))
    return {normal(package): Version(version) for package, version in parts}


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def installed_extras() -> set[str]:
    """The extras that the targets of the Makefile install."""
    makefile = (ROOT / "Makefile").read_text()
    return {name for names in re.findall(r'-e "\.\[([\w,-]+)\]"', makefile) for name in names.split(",")}


def test_requirements_are_the_dependencies_and_the_extras_of_the_pipeline():
    assert sorted(lines("requirements.txt")) == sorted(FULL)


def test_the_pinned_versions_lie_in_the_ranges():
    pinned = pins("constraints.txt")
    extras = [line for name in sorted(installed_extras()) for line in EXTRAS[name]]
    for line in [*FULL, *extras, *EXTRAS["smollm"]]:
        requirement = Requirement(line)
        assert pinned[normal(requirement.name)] in requirement.specifier, line


def test_pins_hold_on_every_platform():
    pinned = pins("constraints.txt")
    assert not [version for version in pinned.values() if version.local]
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda", "triton"))]


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = pins("constraints-oldest.txt")
    for line in FULL:
        requirement = Requirement(line)
        (bound,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
        assert oldest.pop(normal(requirement.name)) == bound, line
    assert not oldest, "pinned, but no dependency of the package"


@pytest.mark.usefixtures("cache_aside")
def test_a_training_needs_no_extra(tmp_path, story_teacher, story_trajectories):
    script = f"""
import sys
# None: as if the package were not installed
sys.modules |= dict.fromkeys(("deepspeed", "flash_attn", "lm_eval", "sglang", "tensorboard", "wandb"))
from t3d.common.options import load
from t3d.training.loop import train
from t3d.training.settings import TrainConfig
overrides = [
    "experiment.output_root={tmp_path}", "model.pretrained_model={story_teacher}", "training.max_steps=1",
    "dataset.optimization_data={story_trajectories}", "training.batch_size_lm=2",
    "training.gradient_accumulation_steps=1", "training.mixed_precision=no",
]
print("trained:", train(load(TrainConfig, overrides)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "trained: " in done.stdout and list(tmp_path.rglob("log.jsonl"))

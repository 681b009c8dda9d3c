"""The built wheel in an environment of its own: every stage from an empty folder, with what ships and nothing else."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `bin` folder of an environment with the wheel and this environment's other packages."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"  # a build leaves folders behind
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file() and not name.startswith(("docs/", "models/", "tests/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(home), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = home.glob("t3d-*.whl")
    venv.create(home / "venv", system_site_packages=True)
    place = {"base": str(home / "venv"), "platbase": str(home / "venv")}
    packages = Path(sysconfig.get_path("purelib", vars=place))
    (packages / "reused.pth").write_text(
        "\n".join(dict.fromkeys(sysconfig.get_path(p) for p in ("purelib", "platlib")))
    )
    python = home / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return python.parent


@pytest.fixture
def start(installed, tmp_path, monkeypatch, cache_aside):
    """Run a command of the installed package from an empty folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"

    def call(command: str, *arguments: str) -> str:
        line = [installed / command, *arguments]
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    call.folder = folder
    return call


def package_files(start) -> dict[str, int]:
    where = start("python", "-c", "import t3d; print(t3d.__path__[0])").strip()
    assert ROOT not in Path(where).parents
    files = (path for path in Path(where).parent.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_every_stage_runs_in_an_empty_folder(start, story_teacher, story_questions):
    before = package_files(start)
    assert not any("/studies/" in name or "/tests/" in name for name in before)
    assert any(name.endswith("/playground/page.js") for name in before)
    assert start("t3d", "--help") == start("python", "-m", "t3d", "--help")

    start("t3d", "download", "--dataset", "GSM8K", "--from", str(story_questions))
    start(
        *("t3d", "rollout", "config=configs/demo/sample.yaml", f"evaluation.checkpoint_path={story_teacher}"),
        *("evaluation.eval_dataset=GSM8K", "evaluation.limit=8", "rollout.max_token=16", "experiment.project=mine"),
    )
    start(
        *("t3d", "prepare", "--model_name", "tiny-teacher", "--dataset", "GSM8K", "--project", "mine"),
    )
    start(
        *("t3d", "train", f"model.pretrained_model={story_teacher}", "training.max_steps=2"),
        *("dataset.optimization_data=tiny-teacher-GSM8K_renamed", "experiment.run_name=run"),
        "training.gradient_accumulation_steps=4",
    )
    student = "experiments/tiny-teacher/math/ddo_sdar_full_self/run/ckpt/optimized"
    start(
        *("t3d", "eval", f"evaluation.checkpoint_path={student}", "evaluation.eval_dataset=GSM8K"),
        *("evaluation.limit=8", "rollout.max_token=16", "evaluation.method=t3d"),
    )
    assert "| T3D |" in start("t3d", "report", "eval/results")
    start("t3d", "card", student)
    assert "| T3D | GSM8K |" in (start.folder / student / "README.md").read_text()

    written = {str(path.relative_to(start.folder)) for path in start.folder.rglob("*") if path.is_file()}
    assert {name.split("/")[0] for name in written} == {"data", "mine", "experiments", "eval"}
    assert {"data/GSM8K.json", "data/tiny-teacher-GSM8K_renamed.json", f"{student}/model.safetensors"} <= written
    (row,) = json.loads(next((start.folder / "eval" / "results").glob("*.json")).read_text())
    assert row["n"] == 8 and row["tokens_per_step"] == 4
    assert package_files(start) == before

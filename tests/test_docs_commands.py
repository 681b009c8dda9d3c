"""Every command of the documentation is run in small, page by page, or says to its reader what it needs.

The ```bash blocks of a page are one script. It runs in a folder of its own, in which small models and question sets
lie under the names that the pages use. tests/docs_shims.py adds the limits. `# needs ...` at a command's end leaves
that command out; on a line of its own it leaves out the rest of its block.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from studies.domains import DOMAINS, initial_model
from t3d.common.options import load
from t3d.data.release import prepare_training_file
from t3d.rollout.run import roll_out
from t3d.rollout.settings import SampleConfig
from t3d.training.loop import train
from t3d.training.settings import TrainConfig
from tests import docs_shims
from tests.conftest import ROOT, reset_accelerator
from tests.test_docs import FENCE, PAGES

NEEDED = ("the network", "weights", "a GPU", "several machines", "an idle machine", "hours", "minutes")
MARK = re.compile(r"# needs (.*)")
COMMAND = re.compile(r"(t3d|python3?|accelerate|pip|make|git|conda|sglang|srun|export|for|if) ")
QUICK = {"index.md", "OBJECTIVE.md", "SHARING.md"}  # the others: make test-slow


def blocks(page: Path) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language == "bash"]


def commands(block: str) -> str:
    """A block without the commands that need more than a test has."""
    lines = re.sub(r" *\\\n *", " ", block).splitlines()
    own = next((i for i, line in enumerate(lines) if line.startswith("# needs ")), len(lines))
    return "\n".join(line for line in lines[:own] if not MARK.search(line)).strip()


def script(page: Path) -> str:
    return "\n".join(filter(None, map(commands, blocks(page))))


def files(page: Path) -> dict[str, str]:
    """The files that a page prints whole: ```python title=NAME."""
    titled = re.compile(r"^```python title=(\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return dict(titled.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_shell_blocks_and_say_what_they_need(page):
    text = page.read_text(encoding="utf-8")
    others = [body for language, body in FENCE.findall(text) if language != "bash"]
    indented = re.findall(r"^ {4,}(.*)$", FENCE.sub("", text), re.MULTILINE)
    for line in [line for body in others for line in body.splitlines()] + indented:
        assert not COMMAND.match(line) or line.endswith(":"), f"{page.name}: put this into a bash block: {line}"
    written = subprocess.run(["bash", "-n"], input="\n".join(blocks(page)), capture_output=True, text=True)
    assert written.returncode == 0, f"{page.name}: {written.stderr}"
    for need in MARK.findall("\n".join(blocks(page))):
        assert any(word in need for word in NEEDED), f"{page.name}: # needs {need}: name one of {NEEDED}"


@pytest.fixture(scope="session")
def workshop(tmp_path_factory, cache_aside) -> Path:
    """A folder in which a user has done all that the pages speak of: models, questions, trajectories, a student."""
    home = tmp_path_factory.mktemp("workshop")
    for name in ("configs", "accelerate_configs", "sample", "train", "tests", "eval.py"):
        (home / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "models", home / "models")
    (home / "JetLM").mkdir()
    teacher, student = home / "models" / "embedded-teacher", home / "models" / "embedded-student"
    for stand_in in ("JetLM/SDAR-1.7B-Chat", "JetLM/SDAR-4B-Chat", "models/my-teacher"):
        (home / stand_in).symlink_to(teacher)
    for stand_in in ("STUDENT", "DIR"):
        (home / stand_in).symlink_to(student)
    initial_model(DOMAINS["StoryMath"], home / "Qwen" / "Qwen3-0.6B", block_size=1, seed=0)
    demo = home / "experiments" / "demo"
    write_questions(home / "data", demo / "data")
    reset_accelerator()
    made = {"JetLM/SDAR-4B-Chat": "data/SDAR-4B-Chat-MATH_train_renamed", teacher: demo / "data" / "trajectories"}
    for model, file in made.items():
        line = [f"experiment.project={home}", f"evaluation.checkpoint_path={home / model}"]
        line += [f"evaluation.eval_dataset={home / 'data' / 'MATH_train.json'}", *docs_shims.DECODE]
        shards = roll_out(load(SampleConfig, line))
        prepare_training_file([shards], home / f"{file}.json")
    shutil.copytree(shards.with_suffix(""), home / "trajectories")
    line = ["config=configs/demo/best.yaml", f"model.pretrained_model={teacher}", f"dataset.optimization_data={shards}"]
    line += [f"experiment.output_root={home / 'experiments'}", "experiment.project=run", "experiment.run_name=run"]
    run = train(load(TrainConfig, [*line, *docs_shims.SMALL["train"]]))
    (demo / "embedded-teacher" / "math" / "demo").mkdir(parents=True)
    (demo / "embedded-teacher" / "math" / "demo" / "run").symlink_to(run)
    return home


def write_questions(*folders: Path) -> None:
    """The question sets of the pages, eight rows each, and answers to grade."""
    rows = DOMAINS["StoryMath"].build_splits()["StoryMath_val"][:8]
    program = {
        "question": "Write add(a, b).",
        "prefix": "",
        "test_method": "function",
        "test_list": ["assert add(1, 2) == 3"],
    }
    for folder in folders:
        folder.mkdir(parents=True)
        for name in ("MATH_train", "MATH500", "GSM8K", "StoryMath_train", "StoryMath_test", "StoryMath_val"):
            (folder / f"{name}.json").write_text(json.dumps(rows))
        for name in ("MBPP", "HumanEval"):
            (folder / f"{name}.json").write_text(json.dumps([program]))
    home = folders[0].parent
    (home / "P.json").write_text(json.dumps([program]))
    answer = "```python\ndef add(a, b):\n    return a + b\n```"
    (home / "A.jsonl").write_text(json.dumps({"index": 0, "text": answer}) + "\n")


@pytest.fixture
def shell(workshop, tmp_path):
    """Runs a script in a copy of the workshop; the folder."""
    home, tools = tmp_path / "home", tmp_path / "tools"
    shutil.copytree(workshop, home, symlinks=True)
    tools.mkdir()
    for name in ("t3d", "python", "accelerate", "scontrol", "srun"):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{docs_shims.__file__}" {name} "$@"\n')
        (tools / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_NODELIST": "node[1-2]", "FREE_PORT": port}
    env = {**os.environ, **slurm, "PATH": f"{tools}:/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{home}"}

    def call(text: str) -> subprocess.CompletedProcess:
        line = ["bash", "-euxo", "pipefail", "-c", text]
        return subprocess.run(line, cwd=home, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    call.home = home
    return call


def two_machines(home: Path) -> None:
    """The Slurm script's two machines took every step together."""
    log = home / "experiments" / "SDAR-4B-Chat" / "math" / "best" / "first" / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["sequences"] for row in rows] == [32, 32], "16 of each machine"


AFTERWARDS = {"MACHINES.md": two_machines}  # page -> a look at its folder
RUNNABLE = [page for page in PAGES if script(page)]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page.name in QUICK else pytest.mark.slow) for page in RUNNABLE],
    ids=lambda page: page.name,
)
def test_the_commands_of_a_page_run(page, shell):
    for name, text in files(page).items():
        (shell.home / name).write_text(text)
    done = shell(script(page))
    assert done.returncode == 0, f"{page.name}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    AFTERWARDS.get(page.name, lambda home: None)(shell.home)


def test_a_page_with_a_wrong_command_fails(shell):
    assert shell("t3d grade --data_type code --problems P.json --answers A.jsonl --out O.jsonl").returncode == 0
    for wrong in ("t3d grade --answers none", "t3d eval no.key=1", "pipp install t3d"):
        assert shell(wrong).returncode != 0


def test_marks_leave_commands_out():
    block = (
        "pip install x  # needs the network\nt3d a \\\n  b=1\nt3d c \\\n  d  # needs a GPU\n# needs hours\nmake all\n"
    )
    assert commands(block) == "t3d a b=1"

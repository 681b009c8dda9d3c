"""The five commands: help from everywhere, and a mistake is one clear line with exit code 2 before a model loads."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SAMPLE, TRAIN, EVAL = "sample/sdar_sample.py", "train/self_ddo_sdar_full.py", "eval.py"
DOWNLOAD, RENAME = "data/download_data.py", "data/rename_key.py"


def start(script: str, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, script, *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "script, said",
    [
        (SAMPLE, "rollout.denoising_steps_per_block=4"),
        (TRAIN, "training.objective=t3d"),
        (EVAL, "evaluation.method=null"),
        (DOWNLOAD, "--dataset"),
        (RENAME, "--model_name"),
    ],
)
def test_help_from_the_root_and_from_the_scripts_folder(script, said):
    from_root = start(script, "--help")
    assert from_root.returncode == 0 and said in from_root.stdout and not from_root.stderr
    path = ROOT / script
    if path.parent != ROOT:
        assert start(path.name, "--help", folder=path.parent).stdout == from_root.stdout.replace(script, path.name)


def test_an_error_is_one_line_and_exit_code_2_from_the_scripts_folder():
    done = start("self_ddo_sdar_full.py", "training.block_siz=8", folder=ROOT / "train")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: training.block_siz=8: unknown key; did you mean training.block_size?\n"


def test_what_a_project_writes_is_not_gits():
    written = ("your_project/temp_data/x/shard-00000.jsonl", "your_project/results/a.json", "eval/results/a/b.jsonl")
    written += ("experiments/a/log.jsonl", "data/MATH500.json", "data/.x_renamed.origin")
    ours = ("docs/results/demo-seed1.json", "docs/results/performance/loop.json", "configs/eval.yaml")
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *written, *ours], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 128:
        pytest.skip("not a checkout of git")
    assert set(done.stdout.splitlines()) == set(written)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script's main in this process, where loading a model is a failure; what stands on stderr."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", loaded)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # caches are set up there

    def call(script: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return left.value.code, capsys.readouterr().err

    return call


DECODING = [
    ("rollout.block_siz=4", "rollout.block_siz=4: unknown key; did you mean rollout.block_size?"),
    ("rollout.max_token=many", "rollout.max_token=many: expected a whole number, for example rollout.max_token=2000"),
    ("rollout.block_size=0", "rollout.block_size=0: must be at least 1"),
    (
        "rollout.denoising_steps_per_block=5",
        "rollout.denoising_steps_per_block=5: more steps than the block has positions; at most block_size=4",
    ),
    ("rollout.temperature=-0.1", "rollout.temperature=-0.1: must be at least 0"),
    ("rollout.remasking_strategy=low_confidence", "rollout.remasking_strategy=low_confidence: must be one of "),
    ("config=configs/none.yaml", "config=configs/none.yaml: no such file"),
    ("evaluation.eval_dataset=None_such", "None_such.json: no such file; give a file, or the name of a set"),
    (
        "evaluation.checkpoint_path=/none/such",
        "evaluation.checkpoint_path=/none/such: no such folder; give a model folder or a hub id",
    ),
    ("evaluation.node_index=1", "evaluation.node_index=1: nodes count from 0; must be below evaluation.num_node=1"),
    ("rollout.tensor_parallel_size=2", "rollout.tensor_parallel_size=2: "),
    ("evaluation.data_type=poem", "evaluation.data_type=poem: must be one of math, code, option, text"),
    ("nonsense", "nonsense: not understood; write key=value"),
]
TRAINING = [
    ("training.block_size=0", "training.block_size=0: must be at least 1"),
    ("training.batch_size_lm=1.5", "training.batch_size_lm=1.5: expected a whole number"),
    ("model.random_ratio=2", "model.random_ratio=2"),
    (
        "training.preset=releas",
        "training.preset=releas: must be one of t3d, algorithm1, release; did you mean release?",
    ),
    ("training.mask_ratios=[0.5,2]", "training.mask_ratios"),
    ("optimizer.name=sgd", "optimizer.name=sgd: "),
    ("config=configs/none.yaml", "config=configs/none.yaml: no such file"),
    ("dataset.optimization_data=None_such", "None_such.json does not exist"),
    ("model.pretrained_model=/none/such", "model.pretrained_model=/none/such: no such folder"),
    ("experiment.start_from_scratch=false", "experiment.start_from_scratch=false: there is nothing to resume"),
    ("tracker=wandb", "tracker=wandb: unknown key; did you mean experiment.tracker?"),
]
CASES = [(script, *case) for script in (SAMPLE, EVAL) for case in DECODING]
CASES += [(EVAL, "evaluation.data_type=code", "row 0: field 'test_method' is missing")]
CASES += [(EVAL, "evaluation.seeds=[1,1]", "evaluation.seeds=[1, 1]: give each seed once")]
CASES += [(EVAL, "evaluation.protocol=fast", "evaluation.protocol=fast: must be one of few_step, full_step, dynamic")]
CASES += [(EVAL, "evaluation.eval_dataset=A,B/A", "evaluation.eval_dataset=A,B/A: give each data set once")]
CASES += [(EVAL, "model_base=lada", "model_base=lada: ")]
CASES += [(TRAIN, *case) for case in TRAINING]


@pytest.mark.parametrize("script, override, said", CASES, ids=[f"{script}-{override}" for script, override, _ in CASES])
def test_a_mistake_is_one_line_before_a_model_loads(
    command, tmp_path, story_teacher, story_questions, script, override, said
):
    sound = [f"evaluation.checkpoint_path={story_teacher}", f"evaluation.eval_dataset={story_questions}"]
    sound += [f"experiment.project={tmp_path}"]
    if script == TRAIN:
        sound = [f"model.pretrained_model={story_teacher}", f"dataset.optimization_data={story_questions}"]
        sound += [f"experiment.output_root={tmp_path}"]
    code, stderr = command(script, *sound, override)
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n")
    assert said in stderr
    assert not list(tmp_path.rglob("shard-*")) and not list(tmp_path.rglob("log.jsonl"))


@pytest.mark.parametrize("script", [SAMPLE, EVAL])
def test_a_missing_model_leaves_no_folder_behind(command, tmp_path, story_questions, script):
    """The next, correct, call in the same project must not meet the settings of this one."""
    line = ("evaluation.checkpoint_path=/none/such", f"evaluation.eval_dataset={story_questions}")
    assert command(script, *line, f"experiment.project={tmp_path / 'project'}")[0] == 2
    assert not (tmp_path / "project").exists()

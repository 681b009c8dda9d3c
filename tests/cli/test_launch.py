"""`t3d ... --launch FILE`: one line for a mistake, the exit code of the processes, Ctrl-C in good order."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from t3d.cli import dispatch
from tests.conftest import ROOT, raises_key
from tests.training.conftest import log_of, overrides  # noqa: F401 - a fixture


def t3d(*arguments: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "t3d", *arguments]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    "arguments", [["train", "--launch"], ["grade", "--launch", "x.yaml"], ["train", "--launch", "none.yaml"]]
)
def test_a_wrong_launch_is_refused(arguments):
    with raises_key("--launch"):
        dispatch(arguments)


@pytest.mark.parametrize("config", ["cpu.yaml", "2_cpu_processes.yaml"])
def test_a_mistake_prints_once_and_nothing_else(tmp_path, config):
    """From any folder, with a configuration that ships."""
    process = t3d("train", "--launch", f"accelerate_configs/{config}", "training.block_siz=8", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    said = [line for line in err.splitlines() if "OMP_NUM_THREADS" not in line and "******" not in line]
    assert process.returncode == 2 and not out
    assert [line.split(":")[:2] for line in said if "error" in line] == [["error", " training.block_siz=8"]]
    assert not any("Traceback" in line for line in said) and len(said) <= 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("by", "config"), [("t3d", "1_node_8_gpus"), ("accelerate", "deepspeed_zero1")])
def test_gpu_processes_are_refused_where_there_are_no_gpus(overrides, tmp_path, config, by):  # noqa: F811
    """accelerate does not hand the processes of such a launch ``use_cpu``."""
    text = (ROOT / "accelerate_configs" / f"{config}.yaml").read_text()
    (tmp_path / "two.yaml").write_text(text.replace("num_processes: 8", "num_processes: 2"))
    command = ["-m", "t3d", "train", "--launch", "two.yaml"]
    if by == "accelerate":
        command = ["-m", "accelerate.commands.launch", "--config_file", "two.yaml", "-m", "t3d", "train"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *command, *overrides("refused")]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode and done.stderr.count("error: use_cpu=false") == 1
    assert by == "accelerate" or "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_stops_in_good_order_with_130(overrides, tmp_path):  # noqa: F811
    line = overrides("stopped", "training.max_steps=500", "experiment.save_every_steps=500")
    process = t3d("train", "--launch", "accelerate_configs/cpu.yaml", *line, process_group=0, cwd=tmp_path)
    log = tmp_path / "tiny-teacher" / "math" / "p" / "stopped" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped: after step" in err and "Traceback" not in err
    assert len(log_of(log.parent)) < 500 and any((log.parent / "checkpoints").iterdir())

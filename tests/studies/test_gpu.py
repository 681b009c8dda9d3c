"""`make gpu-report` in small: its parts on a CPU, their limits, what is left of a part that fails, and its page."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

from studies.gpu import decode, machine, train
from studies.gpu.__main__ import PARTS, arguments, environment, run_part
from studies.gpu.report import Outcome, read_rows, write
from tests.conftest import ROOT

COLUMNS = {"case", "metric", "value", "baseline", "ratio"}


def test_the_parts_rows_on_a_cpu():
    for part, metrics in (
        (machine, {"fact"}),
        (decode, {"tokens_per_second", "peak_memory_MiB", "model_share", "failed"}),
        (train, {"tokens_per_second", "mfu", "peak_memory_MiB"}),
    ):
        found = list(part.rows("cpu"))
        assert {row["metric"] for row in found} == metrics and all(row.keys() == COLUMNS for row in found)
        failed = [row["case"] for row in found if row["metric"] == "failed"]
        assert all(decode.FLASH in case for case in failed), found
        json.dumps(found)
    shares = [row["value"] for row in decode.rows("cpu") if row["metric"] == "model_share"]
    assert all(0 < share < 1.5 for share in shares)


def test_a_part_that_fails_or_takes_too_long_is_told_and_keeps_its_rows(tmp_path):
    failing, endless = Outcome("no_such_part", limit=60), Outcome("machine", limit=0.05)
    run_part(failing, "cpu", None)
    run_part(endless, "cpu", None)
    assert (failing.state, endless.state) == ("failed", "out of time")
    assert "no_such_part" in failing.reason and endless.seconds < 30
    rows = tmp_path / "rows"
    rows.write_text('{"case": "a", "metric": "m", "value": 1.0, "baseline": null, "ratio": null}\n{"case": "b", "me')
    endless.rows = read_rows(rows)
    write(tmp_path, [failing, endless], minutes=8)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [part["state"] for part in report["parts"]] == ["failed", "out of time"]
    assert report["parts"][1]["rows"][0]["value"] == 1.0 and report["context"] == {"minutes": 8}
    page = (tmp_path / "report.md").read_text()
    assert "| a | m | 1 |" in page and "no_such_part" in page


def test_the_command_line_and_carried_wheels(tmp_path):
    args = arguments([])
    assert (args.minutes, args.device, tuple(args.part)) == (8.0, "cuda", tuple(PARTS))
    assert sum(PARTS.values()) == pytest.approx(1)
    (tmp_path / "omegaconf-2.3-py3-none-any.whl").touch()
    path = environment("cpu", tmp_path)
    assert str(tmp_path / "omegaconf-2.3-py3-none-any.whl") in path["PYTHONPATH"] and not path["CUDA_VISIBLE_DEVICES"]


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.17"), reason="older transformers want scipy beside scikit-learn"
)
def test_training_and_decoding_start_without_the_optional_packages():
    """As on a machine with torch, transformers, accelerate, peft and carried pure-Python wheels only."""
    absent = "datasets pyarrow pandas matplotlib rich math_verify latex2sympy2_extended deepspeed wandb scipy"
    code = f"import sys\nfor n in {absent.split()}: sys.modules[n] = None\nimport studies.gpu.decode, studies.gpu.train"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "studies.gpu", "--device", "cpu", "--minutes", "20", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert {part["name"]: part["state"] for part in parts} == dict.fromkeys(PARTS, "finished")
    assert all(part["rows"] for part in parts)

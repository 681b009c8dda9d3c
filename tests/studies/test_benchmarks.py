"""`make bench` in small: its parts give rows, finished parts are kept, and the page shows what the files hold."""

import json
import subprocess
import sys

import pytest
import torch

from studies.benchmarks import __main__ as bench
from studies.benchmarks import originals
from studies.benchmarks.measure import row
from studies.benchmarks.page import number, write_page
from tests.conftest import ROOT, raises_key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of three parts in tiny sizes."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("loop", "growth", "share"):
        bench.run_here(name, True, folder)
    return folder


def test_parts_leave_rows_and_conditions(folder):
    for name in ("loop", "growth", "share"):
        part = json.loads((folder / f"{name}.json").read_text())
        assert part["part"] == name and part["quick"] and part["rows"] and part["seconds"] > 0
        assert part["versions"].keys() == {"torch", "transformers", "accelerate"} and part["busy_before"] >= 0
        for found in part["rows"]:
            assert found["value"] > 0
            assert found["ratio"] is None or found["ratio"] == pytest.approx(found["value"] / found["baseline"])
    curves = {point["curve"] for point in json.loads((folder / "growth.json").read_text())["rows"]}
    assert curves == {"lanes", "length", "block"}


def test_the_page_shows_every_figure_and_plot(folder):
    page = folder / "PERFORMANCE.md"
    write_page(folder, page)
    text = page.read_text()
    for name in ("loop", "share", "growth"):
        for found in json.loads((folder / f"{name}.json").read_text())["rows"]:
            assert number(found["value"]) in text, found
    assert "--quick" in text, "figures that mean nothing are not told as such"
    for name in ("lanes", "length", "block"):
        assert f"]({name}.png)" in text and (folder / f"{name}.png").stat().st_size < 100_000
    assert "sequence.png" not in text and "## Self-verification" not in text, "a part without a file has a section"


def test_sections_of_training_dynamic_decoding_and_verification(folder, tmp_path):
    """From figures whose numbers are known."""
    part = json.loads((folder / "loop.json").read_text()) | {"quick": False, "busy_before": 0.0, "busy_after": 0.0}
    run = {"accuracy": 0.5, "ci_low": 0.25, "ci_high": 0.75, "tokens_per_second": 4321.0, "tokens_per_forward": 1.5}
    run |= {"latency_mean": 0.5, "steps_per_answer": 9.0, "mean_length": 31.0, "forwards_per_answer": 10.0}
    run |= {"measured_tokens_per_step": 2.5}
    rows = {
        "train": [
            row("two forwards", "tokens/s", 30.0, 20.0, beside="recipe", table="changes"),
            row("ours", "tokens/s", 200.0, 20.0, beside="recipe", table="recipe"),
        ],
        "dynamic": [row("teacher", "dynamic", 0.0, questions=7, seeds=[1, 2], runs=[run, run | {"accuracy": 0.7}])],
        "verify": [row("on", "verification", 0.0, questions=9, steps=2, verify=True, runs=[run])],
    }
    for name, some in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part | {"part": name, "rows": some}))
    write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| two forwards | tokens/s | 30 | recipe | 20 | 1.50 |" in text
    assert "| ours | tokens/s | 200 | recipe | 20 | 10.00 |" in text
    assert "| teacher | 4,321 | 0.5 | 9 | 31 | 2.5 | 60.0 ± 10.0 |" in text
    assert "| 2 | on | 50.0 (25.0 – 75.0) | 1.5 | 10 | 4,321 |" in text
    assert "--quick" not in text and "was not quiet" not in text
    loud = part | {"part": "train", "rows": rows["train"], "busy_after": 1.0}
    (tmp_path / "train.json").write_text(json.dumps(loud))
    write_page(tmp_path, tmp_path / "page.md")
    assert "was not quiet" in (tmp_path / "page.md").read_text()


def test_no_figures_no_page(tmp_path):
    with raises_key(str(tmp_path)):
        write_page(tmp_path, tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_a_finished_part_is_not_run_again(folder, tmp_path, monkeypatch, capsys):
    quick = tmp_path / "quick"
    quick.mkdir()
    (quick / "loop.json").write_text((folder / "loop.json").read_text())
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--part", "loop", "--folder", str(tmp_path)])
    bench.main()
    assert capsys.readouterr().out.startswith("0 of 1 parts to run")
    assert "## Decoding beside" in (quick / "PERFORMANCE.md").read_text()


def test_an_original_runs_in_its_own_process(tmp_path):
    """From a stand-in for SDAR's generate.py, which another interpreter would run as well."""
    (tmp_path / "SDAR").mkdir()
    (tmp_path / "T3D" / "models" / "sdar").mkdir(parents=True)
    assert not originals.at_hand("sdar", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert originals.at_hand("sdar", tmp_path) and not originals.at_hand("dllm", tmp_path)
    (tmp_path / "SDAR" / "generate.py").write_text(
        "import time\ndef block_diffusion_generate(model, prompt, **settings):\n"
        "    assert settings['mask_id'] == 4 and settings['denoising_steps'] == 1\n"
        "    time.sleep(.05 * prompt['input_ids'].shape[1])\n"
    )
    (tmp_path / "T3D" / "models" / "sdar" / "__init__.py").write_text(
        "import torch\nclass SDARConfig:\n    def __init__(self, **values): vars(self).update(values)\n"
        "class SDARForCausalLM(torch.nn.Module):\n    def __init__(self, config):\n        super().__init__()\n"
        "        self.config = config\n"
    )
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    job = {"model": str(tmp_path / "weights"), "prompts": [[1, 2], [3]], "mask_id": 4, "pad_id": 0, "block_size": 4}
    with originals.running("sdar", job | {"steps": 1, "temperature": 0.1, "max_token": 4}, tmp_path) as run:
        assert 0.15 <= run() < 5 and 0.15 <= run() < 5
    with pytest.raises(RuntimeError, match="generate"):
        (tmp_path / "SDAR" / "generate.py").write_text("")
        with originals.running("sdar", job, tmp_path):
            pass


def test_an_original_on_another_torch_is_refused():
    """Else the ratio would compare two versions of PyTorch as well."""
    originals.refuse_other_torch("sdar", torch.__version__.partition("+")[0])
    with raises_key("originals", "torch 1.0+cpu", "install ours"):
        originals.refuse_other_torch("sdar", "1.0+cpu")


@pytest.mark.slow
def test_the_whole_command_in_tiny_sizes(tmp_path):
    command = [sys.executable, "-m", "studies.benchmarks", "--quick", "--folder", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert {file.stem for file in (tmp_path / "quick").glob("*.json")} == set(bench.PARTS)

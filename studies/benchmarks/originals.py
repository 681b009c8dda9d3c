"""The originals beside us, where a developer has them in ``originals/`` (ignored by git; the page has the recipe).

Every original runs in a process with its own version of transformers (``original_worker``), which waits while ours is
measured. So both sides alternate. Without the folder the part has no rows.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from studies.benchmarks.decode import Case, counted
from studies.benchmarks.measure import Row, alternate, row, seconds
from studies.benchmarks.train_step import BLOCK, CHECKPOINTING, OURS, QUICK_SMALL, SMALL, Bench, write_models
from t3d.blocks.settings import DecodeSettings
from t3d.common.errors import UserError
from t3d.common.paths import ROOT

FOLDER = ROOT / "originals"
WORKER = Path(__file__).with_name("original_worker.py")
COMMITS = {  # repository -> the commit that was read and run
    "Tyrion58/T3D": "330e9c6882217432cac44754b0881b352a577358",
    "JetAstra/SDAR": "c2041a8333333d685f6e15122c84f60f51f85ebd",
    "ZHZisZZ/dllm": "ca176752fbceec49c6b4777a2c18ae88e4eb10ed",
}


class Original(NamedTuple):
    """An original's name on the page, the folders that it needs, and its environment, below ``originals/``."""

    label: str
    folders: tuple[str, ...]
    environment: str = ".venv"


ORIGINALS = {
    "sdar": Original("SDAR's generate.py, one prompt at a time", ("SDAR", "T3D")),
    "dllm": Original("dllm's sampler, all prompts in a batch", ("dllm",), ".venv-dllm"),
    "release": Original("the release's functions", ("T3D",)),
}


def at_hand(name: str, folder: Path = FOLDER) -> bool:
    """Whether a developer has fetched an original and its environment."""
    original = ORIGINALS[name]
    return all((folder / part).exists() for part in (*original.folders, original.environment))


def original_rows(quick: bool) -> Iterator[Row]:
    """Ours beside each original that is at hand, on the same weights and work."""
    if at_hand("sdar"):
        for prompts, looped, steps in ((64, 8, 1), (1, 1, 1), (1, 1, 4)):
            yield decoding("sdar", prompts, looped, steps, quick)
    if at_hand("dllm"):
        for steps in (1, 4):
            yield decoding("dllm", 64, 64, steps, quick)
    if at_hand("release"):
        yield from training(quick)


def decoding(name: str, prompts: int, theirs: int, steps: int, quick: bool) -> Row:
    """tokens/s on the embedded teacher at temperature .1. The original decodes the first ``theirs`` prompts."""
    case = Case.embedded(min(prompts, 4), 16) if quick else Case.embedded(prompts)
    settings = DecodeSettings(denoising_steps_per_block=steps, temperature=0.1)
    job = {
        "model": case.model.name_or_path,
        "prompts": case.prompts[:theirs],
        "mask_id": case.mask_id,
        "pad_id": case.model.config.pad_token_id,
        "block_size": settings.block_size,
        "steps": steps,
        "temperature": settings.temperature,
        "max_token": case.max_token,
    }
    tokens = len(job["prompts"]) * case.max_token
    repeats = 1 if quick else 5 if prompts > 1 else 15
    with running(name, job) as original:
        ours, there = alternate(lambda: case.engine(settings, prompts), lambda: tokens / original(), repeats)
    label = f"decoding: {counted(len(case.prompts), 'prompt')}, {counted(steps, 'step')} per block"
    return row(label, "tokens/s", ours, there, beside=ORIGINALS[name].label)


def training(quick: bool) -> Iterator[Row]:
    """tokens/s of a training step, with checkpointing and without it. The original sees some of its equal sequences."""
    shape, first = (QUICK_SMALL, 1) if quick else (SMALL, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(shape, folder)
        bench = Bench(shape, folder)
        for variant in (OURS, CHECKPOINTING):
            job = {
                **{model: str(folder / model) for model in ("student", "reference")},
                "samples": bench.samples,
                "checkpointing": variant == CHECKPOINTING,
                "block_size": BLOCK,
                "pad_id": bench.trainer.ids.pad_id,
                "mask_id": bench.mask_id,
                "vocab": shape.vocab,
                "first": first,
            }
            with running("release", job) as original:
                ours, theirs = alternate(partial(seconds, partial(bench.step, variant)), original, 1)
            speed, there = bench.tokens / ours, bench.tokens * first / len(bench.samples) / theirs
            yield row(f"training: {shape}, {variant}", "tokens/s", speed, there, beside=ORIGINALS["release"].label)


def refuse_other_torch(name: str, theirs: str) -> None:
    """Raise UserError if an original runs on another PyTorch than ours: the ratio would compare the two as well."""
    if theirs.partition("+")[0] != torch.__version__.partition("+")[0]:
        folder = f"originals/{ORIGINALS[name].environment}"
        raise UserError(f"{folder}: has torch {theirs}, ours is {torch.__version__}; install ours there", "originals")


@contextmanager
def running(name: str, job: dict[str, Any], folder: Path = FOLDER) -> Iterator[Any]:
    """An original in its process; each call runs it once and returns its seconds."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, tempfile.TemporaryFile("w+") as errors:
        file.write(json.dumps(job))
        file.flush()
        python = folder / ORIGINALS[name].environment / "bin" / "python"
        command = [str(python), str(WORKER), name, file.name, str(folder)]
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it has our `train`
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, env=own, text=True, **pipes)
        assert process.stdin and process.stdout

        def answer() -> str:
            assert process.stdout
            if line := process.stdout.readline():
                return line
            errors.seek(0)
            raise RuntimeError(f"{name}: {errors.read().strip().splitlines()[-1]}")

        def run() -> float:
            assert process.stdin
            process.stdin.write("run\n")
            process.stdin.flush()
            return float(answer())

        try:
            while not (said := answer().split()) or said[0] != "ready":  # the original's own imports may print
                pass
            refuse_other_torch(name, said[1])
            yield run
        finally:
            process.kill()
            process.wait()

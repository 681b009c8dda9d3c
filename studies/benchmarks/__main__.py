"""Every figure of docs/PERFORMANCE.md in one command, part by part.

    python -m studies.benchmarks [--part NAME ...] [--again] [--quick] [--folder DIR]

It prints its time first. Every part is a process of its own, and leaves FOLDER/<part>.json. A part whose file is there
is not run again, so a command that was stopped goes on; ``--again`` runs it anew. After every part the page and its
plots are written from all files of the folder. ``--quick`` takes tiny sizes, to check that everything runs; its page
goes to FOLDER/quick.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from studies.benchmarks.measure import Row
from studies.smollm.steps import clock
from t3d.common.errors import run_main
from t3d.common.jsonfiles import atomic_write
from t3d.common.paths import ROOT

RESULTS = ROOT / "docs" / "results" / "performance"


class Part(NamedTuple):
    """A part of the benchmark. rows: module:function below studies.benchmarks; seconds: on two quiet cores."""

    rows: str
    seconds: int


PARTS = {
    "loop": Part("decode:loop_rows", 105),
    "originals": Part("originals:original_rows", 420),
    "changes": Part("decode:change_rows", 150),
    "memory": Part("decode:memory_rows", 75),
    "busy": Part("decode:busy_rows", 50),
    "demo": Part("commands:demo_rows", 900),
    "share": Part("decode:share_rows", 30),
    "commands": Part("commands:command_rows", 75),
    "growth": Part("decode:growth_rows", 140),
    "sequence": Part("train_step:sequence_rows", 55),
    "train": Part("train_step:train_rows", 300),
    "large": Part("train_step:large_rows", 220),
    "dynamic": Part("commands:dynamic_rows", 40),
    "verify": Part("commands:verify_rows", 30),
}


def main() -> None:
    """The command."""
    args = arguments()
    if args.run:
        return run_here(args.run, args.quick, args.folder)
    folder = args.folder / "quick" if args.quick else args.folder
    page = folder / "PERFORMANCE.md" if args.quick else ROOT / "docs" / "PERFORMANCE.md"
    wanted = [name for name in args.part if args.again or not (folder / f"{name}.json").exists()]
    expected = sum(PARTS[name].seconds for name in wanted)
    told = "tiny sizes" if args.quick else f"about {clock(expected)} on two quiet cores"
    print(f"{len(wanted)} of {len(args.part)} parts to run, {told}; figures in {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        line = [sys.executable, "-m", "studies.benchmarks", "--run", name, "--folder", str(folder)]
        began = time.monotonic()
        subprocess.run([*line, *(["--quick"] if args.quick else [])], cwd=ROOT, check=True, env=quiet())
        print(f"{name}: {time.monotonic() - began:.0f} s, expected {PARTS[name].seconds} s", flush=True)
        write(folder, page)
    write(folder, page)
    print(page)


def write(folder: Path, page: Path) -> None:
    """Write the page. matplotlib is loaded here only."""
    from studies.benchmarks.page import write_page

    write_page(folder, page, tuple(PARTS))


def run_here(name: str, quick: bool, folder: Path) -> None:
    """Measure one part in this process and write its file."""
    import torch

    busy, began = others(), time.monotonic()
    module, _, function = PARTS[name].rows.partition(":")
    rows: Iterator[Row] = getattr(import_module(f"studies.benchmarks.{module}"), function)(quick)
    found = list(rows)
    context = {
        "part": name,
        "quick": quick,
        "seconds": round(time.monotonic() - began, 1),
        "busy_before": busy,
        "busy_after": others(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "transformers", "accelerate")},
    }
    with atomic_write(folder / f"{name}.json") as file:
        file.write(json.dumps(context | {"rows": found}, indent=1))


def others() -> float:
    """The cores that other programs keep busy, over one second in which this process sleeps."""
    import psutil

    return round(psutil.cpu_percent(interval=1.0) / 100 * (os.cpu_count() or 1), 2)


def cpu_name() -> str:
    """The processor's name where Linux tells it; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def quiet() -> dict[str, str]:
    """The environment of a part: no progress bars, no hub."""
    return os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="only these, in this order"
    )
    parser.add_argument("--again", action="store_true", help="run parts whose figures are there too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the figures")
    parser.add_argument("--run", choices=tuple(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)

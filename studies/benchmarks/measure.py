"""Side-by-side timing: alternating repeats, medians, peak memory, and the rows of figures."""

import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import torch

from t3d.common.paths import ROOT

Row = dict[str, Any]
Name = TypeVar("Name")


def alternate(first: Callable[[], float], second: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Medians of two figures, measured A B A B ... after one warm-up each, so that drift affects both equally."""
    found = alternate_all({0: first, 1: second}, repeats)
    return found[0], found[1]


def alternate_all(works: Mapping[Name, Callable[[], float]], repeats: int) -> dict[Name, float]:
    """``alternate`` of any number of figures."""
    for work in works.values():
        work()
    found: dict[Name, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(work())
    return {name: statistics.median(values) for name, values in found.items()}


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def endless_loops(count: int) -> Iterator[None]:
    """``count`` processes beside the work, each of which keeps a core busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5)  # they have started
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """The peak memory of ``work`` in bytes, above the memory before it.

    On a GPU the allocator counts it. On a CPU the resident set is read once per millisecond. A heap keeps freed memory,
    so a second measurement in one process would be too low: see ``in_fresh_process``.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def look() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(peak, process.memory_info().rss) - before


def in_fresh_process(function: Callable, *arguments) -> Any:
    """The function's result, computed in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def row(case: str, metric: str, value: float, baseline: float | None = None, **more: Any) -> Row:
    """One measurement, with the ratio to its baseline. ``more``: further entries, see ``studies.benchmarks.page``."""
    return {
        "case": case,
        "metric": metric,
        "value": value,
        "baseline": baseline,
        "ratio": value / baseline if baseline else None,
        **more,
    }


def output_of(command: Sequence[str], **environment: str) -> str:
    """A program's standard output; with another exit code than 0 a RuntimeError with the last line of its errors."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"{' '.join(command)}: {lines[-1] if lines else done.returncode}")
    return done.stdout

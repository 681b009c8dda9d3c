"""Side-by-side timing: alternating repeats of two things, medians, peak memory, and a table written as JSON."""

import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).resolve().parent / "results"


def alternate(first: Callable[[], float], second: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Medians of two figures, measured A B A B ... after one warm-up each, so that drift affects both equally."""
    first(), second()
    pairs = [(first(), second()) for _ in range(repeats)]
    return tuple(statistics.median(side) for side in zip(*pairs, strict=True))


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


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


def row(case: str, metric: str, value: float, baseline: float | None = None) -> dict:
    """One measurement, with the ratio to its baseline."""
    return {
        "case": case,
        "metric": metric,
        "value": value,
        "baseline": baseline,
        "ratio": value / baseline if baseline else None,
    }


def publish(name: str, rows: list[dict], **context) -> None:
    """Print the table; write results/<name>.json (a list of rows) and the conditions to another file next to it."""
    width = max(len(r["case"]) for r in rows)
    print(f"\n{'case':{width}}  {'metric':24} {'value':>12} {'baseline':>12} {'ratio':>7}")
    for r in rows:
        baseline, ratio = (
            f"{r[key]:{form}}" if r[key] else "" for key, form in (("baseline", ".4g"), ("ratio", ".2f"))
        )
        print(f"{r['case']:{width}}  {r['metric']:24} {r['value']:12.4g} {baseline:>12} {ratio:>7}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    if context:
        (RESULTS / f"{name}.context.json").write_text(json.dumps(context, indent=1) + "\n")

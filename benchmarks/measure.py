"""Side-by-side timing: alternating repeats of two things, medians, and a table written as JSON."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def alternate(first: Callable[[], float], second: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Medians of two figures, measured A B A B ... after one unmeasured round each, so that drift hits both alike."""
    first(), second()
    pairs = [(first(), second()) for _ in range(repeats)]
    return tuple(statistics.median(side) for side in zip(*pairs, strict=True))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row(case: str, metric: str, value: float, baseline: float | None = None) -> dict:
    return {
        "case": case,
        "metric": metric,
        "value": value,
        "baseline": baseline,
        "ratio": value / baseline if baseline else None,
    }


def publish(name: str, rows: list[dict], **context) -> None:
    """Print the table and write benchmarks/results/<name>.json (a list of rows) and what it ran on beside it."""
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

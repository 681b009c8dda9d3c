"""docs/PERFORMANCE.md from the parts' files: tables and plots. No sentence contains a figure that is typed by hand.

A row has case, metric, value, baseline and ratio (``measure.row``). Further entries:
- beside: what the baseline is. table: the table of its part to which the row belongs.
- curve, line, x: the plot, the line and the place of a point.
- runs: rows of an evaluation (t3d.evaluation.scoring.summarise).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import fmean, mode, stdev
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from studies.benchmarks.measure import Row
from studies.benchmarks.originals import COMMITS
from studies.smollm.steps import clock
from studies.storymath.plots import save
from t3d.common.errors import UserError
from t3d.common.jsonfiles import atomic_write
from t3d.evaluation.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = Mapping[str, Any]  # a part's file
CURVES = {  # the plots, and their axes
    "lanes": "answers in flight",
    "length": "tokens of an answer",
    "block": "block size",
    "sequence": "tokens of a trained sequence",
}
NOISY = 0.1  # busy cores of others from which the page warns


def write_page(folder: Path, page: Path, every: Sequence[str] = ()) -> None:
    """Write the page and its plots from the parts' files in ``folder``. UserError if there are none.

    every: the names of all parts.
    """
    parts = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    if not parts:
        raise UserError(f"{folder}: no figures yet; run `python -m studies.benchmarks`", str(folder))
    points = [row for part in parts.values() for row in part["rows"] if "curve" in row]
    plots = {}
    for name, axis in CURVES.items():
        if some := [row for row in points if row["curve"] == name]:
            save(folder / f"{name}.png", (6.5, 3.4), partial(draw, rows=some, axis=axis))
            plots[name] = Path(os.path.relpath(folder / f"{name}.png", page.parent)).as_posix()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = environment.get_template("performance.md.j2").render(
        parts=parts,
        plots=plots,
        commits=COMMITS,
        torch=version_of(next(iter(parts.values())), "torch").partition("+")[0],
        points={name: [row for row in points if row["curve"] == name] for name in plots},
        conditions=conditions(list(parts.values())),
        missing=[name for name in every if name not in parts],
        compared=compared,
        alone=alone,
        growth=growth,
        dynamic=dynamic,
        verification=verification,
    )
    with atomic_write(page) as file:
        file.write(text)


def conditions(parts: Sequence[Figures]) -> dict[str, Any]:
    """What was the same for all parts, each value once, and the noise of the machine."""

    def values(get: Callable[[Figures], Any]) -> str:
        return ", ".join(dict.fromkeys(str(get(part)) for part in parts))

    def busy(part: Figures) -> float:
        return max(part["busy_before"], part["busy_after"])

    names, packages = ("cores", "machine", "cpu", "python"), parts[0]["versions"]
    loudest = max(parts, key=busy)
    threads = mode(part["threads"] for part in parts)
    others = [f"{part['threads']} in part {part['part']}" for part in parts if part["threads"] != threads]
    return {
        **{name: values(itemgetter(name)) for name in names},
        "versions": [f"{name} {values(partial(version_of, package=name))}" for name in packages],
        "time": clock(sum(part["seconds"] for part in parts)),
        "threads": "; ".join([str(threads), *others]),
        "busy": f"{busy(loudest):.2f}",
        "loudest": loudest["part"],
        "noisy": [part["part"] for part in parts if busy(part) > NOISY],
        "quick": any(part["quick"] for part in parts),
    }


def version_of(part: Figures, package: str) -> str:
    """The version of a package with which a part ran."""
    return part["versions"][package]


def compared(rows: Sequence[Row], table: str = "") -> str:
    """Rows with a baseline."""
    cells = [
        [r["case"], r["metric"], number(r["value"]), r["beside"], number(r["baseline"]), f"{r['ratio']:.2f}"]
        for r in rows
        if r.get("table", "") == table and r["baseline"]
    ]
    columns = ["case", "unit", "T3D", "beside", "there", "ratio"]
    return Table("", columns, cells, text=("case", "unit", "beside")).markdown()


def alone(rows: Sequence[Row]) -> str:
    """Rows without a baseline."""
    cells = [[row["case"], row["metric"], number(row["value"])] for row in rows]
    return Table("", ["case", "unit", "value"], cells, text=("case", "unit")).markdown()


def growth(rows: Sequence[Row]) -> str:
    """A plot's points: a line of the table for each line of the plot, with the growth from its least point."""
    places = sorted({row["x"] for row in rows})
    cells = []
    for name in dict.fromkeys(row["line"] for row in rows):
        found = {row["x"]: row["value"] for row in rows if row["line"] == name}
        last = found[max(found)] / min(found.values())
        cells.append([name, *(number(found[x]) if x in found else "" for x in places), f"{last:.2f}"])
    return Table("", ["µs per token", *map(str, places), "last / least"], cells, text=("µs per token",)).markdown()


def dynamic(rows: Sequence[Row]) -> str:
    """Dynamic decoding: means over seeds, accuracy with its standard error."""
    heads = {
        "tokens_per_second": "tokens/s",
        "latency_mean": "latency, s",
        "steps_per_answer": "steps",
        "mean_length": "length",
        "measured_tokens_per_step": "tokens per step",
    }
    cells = []
    for row in rows:
        right = [100 * run["accuracy"] for run in row["runs"]]
        error = f" ± {stdev(right) / len(right) ** 0.5:.1f}" if len(right) > 1 else ""
        means = [number(fmean(run[key] for run in row["runs"])) for key in heads]
        cells.append([row["case"], *means, f"{fmean(right):.1f}{error}"])
    return Table("", ["model", *heads.values(), "accuracy, %"], cells, text=("model",)).markdown()


def verification(rows: Sequence[Row]) -> str:
    """Self-verification on and off, each with its accuracy's interval."""
    cells = []
    for row in rows:
        (run,) = row["runs"]
        interval = f" ({100 * run['ci_low']:.1f} – {100 * run['ci_high']:.1f})"
        cells.append(
            [
                str(row["steps"]),
                "on" if row["verify"] else "off",
                f"{100 * run['accuracy']:.1f}{interval}",
                *(number(run[key]) for key in ("tokens_per_forward", "forwards_per_answer", "tokens_per_second")),
            ]
        )
    columns = ["steps per block", "self-verification", "accuracy, %", "tokens per forward", "forwards", "tokens/s"]
    return Table("", columns, cells, text=("self-verification",)).markdown()


def number(value: float) -> str:
    """Three figures, without an exponent: 16,910; 357; 9.41; 0.86."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw(ax: Axes, rows: Sequence[Row], axis: str) -> None:
    """Microseconds per token over the sizes, one line per name; both axes are logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name in dict.fromkeys(row["line"] for row in rows):
        some = [row for row in rows if row["line"] == name]
        ax.plot([row["x"] for row in some], [row["value"] for row in some], marker="o", ms=5, label=name)
    places = sorted({row["x"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(places, [str(x) for x in places])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=axis, ylabel="µs per token")
    ax.legend()

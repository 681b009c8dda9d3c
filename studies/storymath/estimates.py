"""Estimates from the runs of several methods on one benchmark, each with its seeds.

A run is one file of figures, as tables.py writes it:
- method, block_size, seed; config and overrides (training, rollouts, decoding); problems (None: all);
- after a training: steps, questions, learning_rate and tokens;
- `rows`, one per data set and decode setting: accuracy, ci_low and ci_high (95 %), measured speeds, mean_length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t3d.common.errors import UserError
from t3d.evaluation.statistics import mean_and_sem, paired_interval

Run = Mapping[str, Any]
Row = Mapping[str, Any]
Pick = Callable[[Run], Sequence[Row]]  # selects the rows of a run for a mean


def read_figures(file: Path) -> dict[str, Any]:
    """A run's figures. Raises UserError for a file without figures."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(
            f"{file}: no figures of a run ({error}); remove it, and run the method again", str(file)
        ) from error


@dataclass(frozen=True)
class Estimate:
    """error: the mean's standard error, over several seeds or else over questions; None if both are missing. interval:
    95 % over questions, only for one row of one seed.
    """

    mean: float
    error: float | None
    seeds: int
    interval: tuple[float, float] | None = None

    def text(self, digits: int = 1) -> str:
        if self.seeds > 1:
            return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"
        between = f" ({self.interval[0]:.{digits}f}–{self.interval[1]:.{digits}f})" if self.interval else ""
        return f"{self.mean:.{digits}f}{between}"

    def bars(self) -> tuple[float, float]:
        """The lengths of the error bar below and above the mean: one standard error, or a single seed's interval."""
        if self.seeds > 1 or self.interval is None:
            return (self.error or 0.0,) * 2
        return self.mean - self.interval[0], self.interval[1] - self.mean


def at_speed(split: str, *speeds: float) -> Pick:
    """The rows on `split` at these tokens per step, exactly one for each, without dynamic decoding."""

    def pick(run: Run) -> list[Row]:
        rows = []
        for speed in speeds:
            found = [
                row
                for row in run["rows"]
                if (row["dataset"], row["tokens_per_step"]) == (split, speed) and "dynamic" not in row["strategy"]
            ]
            if len(found) != 1:
                who = f"{run['method']}, block {run['block_size']}, seed {run['seed']}"
                raise UserError(
                    f"{who}: {len(found)} figures for {split} at {speed:g} tokens/step; run it again", "rows"
                )
            rows += found
        return rows

    return pick


def dynamic(run: Run) -> list[Row]:
    """The row of dynamic decoding."""
    found = [row for row in run["rows"] if "dynamic" in row["strategy"]]
    if len(found) != 1:
        who = f"{run['method']}, block {run['block_size']}, seed {run['seed']}"
        raise UserError(f"{who}: {len(found)} figures for dynamic decoding; run it again", "rows")
    return found


def estimate(runs: Sequence[Run], pick: Pick, key: str = "accuracy") -> Estimate:
    """The mean of `key` over the picked rows, then over seeds; accuracies in per cent.

    A single seed's error is an upper bound. It treats several rows as fully dependent, because they share questions.
    """
    scale = 100 if key == "accuracy" else 1
    picked = [pick(run) for run in runs]
    mean, error = mean_and_sem([scale * _mean([row[key] for row in rows]) for rows in picked])
    if len(runs) > 1 or key != "accuracy":
        return Estimate(mean, error, len(runs))
    halves = [scale * (row["ci_high"] - row["ci_low"]) / 2 for row in picked[0]]
    only = picked[0][0]
    interval = (scale * only["ci_low"], scale * only["ci_high"]) if len(picked[0]) == 1 else None
    return Estimate(mean, _mean(halves) / 1.959964, 1, interval)


def best(estimates: Sequence[Estimate]) -> int | None:
    """The index of the highest, if it is above the next by more than the standard error of their difference, or None.

    Errors over seeds and over questions are of different kinds, so a mean and a single seed are not compared.
    """
    order = sorted(range(len(estimates)), key=lambda i: estimates[i].mean, reverse=True)[:2]
    if len(order) < 2:
        return None
    first, second = (estimates[i] for i in order)
    if first.error is None or second.error is None or (first.seeds > 1) != (second.seeds > 1):
        return None
    return order[0] if first.mean - second.mean > math.hypot(first.error, second.error) else None


def signed(points: float) -> str:
    """Points with their sign. A value that rounds to 0 is +0.0."""
    return f"{round(points, 1) + 0.0:+.1f}"


@dataclass(frozen=True)
class Difference:
    """mean, in points, and the half-width of its 95 % interval by pairing seeds; None with one pair. other: the other
    method's mean over these seeds.
    """

    mean: float
    half: float | None
    pairs: int
    other: float

    def text(self) -> str:
        return signed(self.mean) + ("" if self.half is None else f" ± {self.half:.1f}")


def difference(runs: Sequence[Run], others: Sequence[Run], pick: Pick) -> Difference | None:
    """Accuracy of `runs` minus accuracy of `others`, seed by seed; None if they share no seed."""
    by_seed = {run["seed"]: run for run in others}
    pairs = [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if not pairs:
        return None
    points = [estimate([one], pick).mean - estimate([other], pick).mean for one, other in pairs]
    other = estimate([other for _, other in pairs], pick).mean
    return Difference(*paired_interval(points), len(pairs), other)


def by_method(figures: Sequence[Run], block: int, names: Sequence[str]) -> dict[str, list[Run]]:
    """The runs of a block size under the names, in that order, seeds ascending; names without a run are left out."""
    runs = sorted((run for run in figures if run["block_size"] == block), key=lambda run: run["seed"])
    found = {name: [run for run in runs if run["method"] == name] for name in names}
    return {name: of_method for name, of_method in found.items() if of_method}


def plain(name: str) -> str:
    """A row's name as a part of file names."""
    return name.replace(", ", "-").replace(" ", "_").replace("=", "")


def family(name: str) -> str:
    """The method of a variant: "t3d, DDO alone" -> "t3d"."""
    return name.partition(", ")[0]


def fast_speeds(block: int) -> list[float]:
    """Tokens per step beyond one: 2, 4, ... up to a whole block."""
    return [2.0**k for k in range(1, block.bit_length())]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

"""The paper's protocol: the decode settings that it compares, and the tables that it prints (arXiv 2602.12262)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from t3d.evaluation.plots import method_name
from t3d.evaluation.results import AVERAGE, Row, average, curves, fullest, method_order, over_seeds
from t3d.evaluation.tables import Table, percent

if TYPE_CHECKING:
    from t3d.rollout.settings import RolloutConfig

STATIC, DYNAMIC = "low_confidence_static", "low_confidence_dynamic"  # the strategies that the paper compares
THRESHOLD = 0.9  # of dynamic decoding


def settings(
    rollout: RolloutConfig, protocol: str, blocks: Sequence[int], thresholds: Sequence[float] = ()
) -> list[RolloutConfig]:
    """The decode settings of a protocol.

    - ``few_step``: static, every block at 2 and at 4 tokens per step.
    - ``full_step``: static, every block at 1 token per step.
    - ``dynamic``: the smallest block, as many steps as positions, all tokens above the threshold.
    - ``paper``: the three above, in this order.
    - ``sweep``: dynamic for every block, at each of the thresholds.
    """

    def at(block: int, steps: int, strategy: str = STATIC, **more) -> RolloutConfig:
        given: dict[str, Any] = {
            "block_size": block,
            "denoising_steps_per_block": steps,
            "remasking_strategy": strategy,
        }
        return replace(rollout, **given, **more)

    def dynamic(block: int, threshold: float) -> RolloutConfig:
        return at(block, block, DYNAMIC, dynamic_threshold=threshold)

    if protocol == "sweep":
        return [dynamic(block, threshold) for block in blocks for threshold in thresholds]
    parts = {
        "few_step": [at(block, block // tokens) for block in blocks for tokens in (2, 4)],
        "full_step": [at(block, block) for block in blocks],
        "dynamic": [dynamic(min(blocks), THRESHOLD)],
    }
    return [setting for name, part in parts.items() if protocol in (name, "paper") for setting in part]


def paper_tables(rows: Sequence[Row]) -> list[Table]:
    """The three tables of the given rows; a table without rows is left out.

    rows: results as evaluation writes them, of all seeds and methods. This function averages over data sets.
    """
    rows = fullest(rows)
    static = [row for row in rows if row["strategy"].partition("+energy")[0] == STATIC]
    few = [row for row in static if row["tokens_per_step"] > 1]
    full = [row for row in static if row["tokens_per_step"] == 1]
    dynamic = [
        row
        for row in rows
        if row["strategy"].startswith(DYNAMIC)
        and row.get("decode", {}).get("dynamic_threshold", THRESHOLD) == THRESHOLD
    ]
    tables = [
        _accuracy_table("Table 1: few-step decoding, accuracy in %", few),
        _accuracy_table("Table 2: full-step decoding, accuracy in %", full),
        _speed_table("Table 3: dynamic decoding", dynamic),
    ]
    return [table for table in tables if table.cells]


def aup_tables(rows: Sequence[Row]) -> list[Table]:
    """AUP (t3d.evaluation.statistics.aup) of every method's sweep of a threshold. There is one line per method, block
    size and strategy, one column per data set, and their mean. Without a sweep there is no table.
    """
    areas: dict[tuple[int, str, str], dict[str, float]] = {}
    for row, *_ in curves(rows):
        areas.setdefault((row["block_size"], row["strategy"], row["method"]), {})[row["dataset"]] = row["aup"]
    datasets = list(dict.fromkeys(dataset for found in areas.values() for dataset in found))
    cells = []
    for (block, strategy, method), found in sorted(
        areas.items(), key=lambda line: (*line[0][:2], method_order(line[0][2]))
    ):
        mean = f"{fmean(found.values()):.1f}" if len(found) == len(datasets) > 1 else ""
        values = (f"{found[dataset]:.1f}" if dataset in found else "" for dataset in datasets)
        cells.append([str(block), method_name(method), strategy.removeprefix("low_confidence_"), *values, mean])
    columns = ["Block", "Method", "Strategy", *datasets, "Average"]
    title = "AUP: accuracy under parallelism over a sweep of the threshold"
    return [Table(title, columns, cells, text=("Method", "Strategy")).without_empty("Average")] if cells else []


def _accuracy_table(title: str, rows: Sequence[Row]) -> Table:
    """One line per block size, tokens per step and method. The columns are the data sets, the average, and its gain
    over the original at the same setting. The gain is in per cent of the original's average, as in the paper.
    """
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    shown = [*datasets, AVERAGE] if len(datasets) > 1 else datasets
    lines: dict[tuple, dict[str, Row]] = {}
    for row in over_seeds([*rows, *average(rows)]):
        rest = (row.get("temperature"), json.dumps(row.get("decode"), sort_keys=True))  # each has its own lines
        lines.setdefault((row["block_size"], row["tokens_per_step"], rest, row["method"]), {})[row["dataset"]] = row
    cells = []
    for (block, tokens, rest, method), found in sorted(
        lines.items(), key=lambda line: (*line[0][:3], method_order(line[0][3]))
    ):
        original = lines.get((block, tokens, rest, "original"), {}).get(shown[-1])
        gain = ""
        same = original and shown[-1] in found and original.get("datasets") == found[shown[-1]].get("datasets")
        if original and method != "original" and same and original["accuracy"]:
            gain = f"{100 * (found[shown[-1]]['accuracy'] / original['accuracy'] - 1):+.1f}"
        scores = [percent(found[name]) if name in found else "" for name in shown]
        cells.append([str(block), f"{tokens:g}", method_name(method), *scores, gain])
    heads = [*datasets, "Average"] if len(datasets) > 1 else datasets
    columns = ["Block", "Tokens/step", "Method", *heads, "Gain, %"]
    return Table(title, columns, cells, text=("Method",)).without_empty("Gain, %")


def _speed_table(title: str, rows: Sequence[Row]) -> Table:
    """One line per data set and method. Latency is defined as in the paper: average length / tokens per second. (In all
    20 rows of its Table 3 tokens/s x latency is the length.) Another column has the time of one answer among all
    answers in flight.
    """

    def texts(row: Row) -> list[str]:
        rate, length = row.get("tokens_per_second"), row.get("mean_length")
        latency = length / rate if rate and length else None
        values = (rate, latency, row.get("latency_mean"), row.get("steps_per_answer"), length, row["tokens_per_step"])
        return ["" if v is None else f"{v:.{digits}f}" for v, digits in zip(values, (0, 2, 2, 1, 1, 2), strict=True)]

    cells = [
        [row["dataset"], method_name(row["method"]), str(row["block_size"]), *texts(row), percent(row)]
        for row in sorted(over_seeds(rows), key=lambda row: (row["dataset"], method_order(row["method"])))
    ]
    columns = ["Data set", "Method", "Block", "Tokens/s", "Latency, s", "In flight, s", "Steps", "Length"]
    return Table(title, [*columns, "Tokens/step", "Accuracy, %"], cells, text=("Data set", "Method"))

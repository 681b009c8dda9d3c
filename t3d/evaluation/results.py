"""Rows of results: reading them back, averaging over seeds and data sets, comparing two sets of answers.

A row is the measurement of one method on one data set under one decode setting with one seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t3d.blocks.strategy import names, strategy_named
from t3d.common.errors import UserError
from t3d.evaluation.statistics import aup, difference_interval, mcnemar_exact, mean_and_sem, wilson_interval

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]
AVERAGE = "average"  # the data set's name in averages over data sets
_OF_A_SETTING = ("run", "method", "dataset", "datasets", "n", "block_size", "strategy", "temperature", "decode")


MEASURES = {"accuracy": ("ci_low", "ci_high"), "nll": ("nll_low", "nll_high")}  # of a row -> the ends of its interval


def fixed_steps(strategy: str) -> bool:
    """Whether tokens per step = block size / steps. An energy changes the drawn tokens and not their number."""
    name = strategy.partition("+energy")[0]
    return name in names() and strategy_named(name).fixed_steps


def strategy_label(strategy: str) -> str:
    """A row's strategy in the form for tables."""
    name, plus, rest = strategy.partition("+")
    return ((name in names() and strategy_named(name).label) or name) + plus + rest


# --- reading ---------------------------------------------------------------------------------------------------------


def result_files(folder: Path) -> list[Path]:
    """The results files below a folder, or the file itself, the oldest first."""
    found = [folder] if folder.is_file() else [path for path in folder.rglob("*.json") if _holds_results(path)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path))


def _holds_results(path: Path) -> bool:
    """Whether a file holds results, judged by its beginning: rollouts lie in the same folders and may be large."""
    with open(path, encoding="utf-8", errors="replace") as file:
        head = file.read(4096)
    return head.lstrip().startswith("[") and '"method"' in head and '"tokens_per_step"' in head


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """`find_results`. Raises UserError if there are none."""
    if not (rows := find_results(folder)):
        raise UserError(f"{folder}: no results here or below; run eval.py first", str(folder))
    return rows


def find_results(folder: str | Path) -> list[dict[str, Any]]:
    """All rows below a folder, or of one file, without averages over data sets. A row may be in its own file and in the
    file of its whole command; the newest counts.
    """
    folder = Path(folder)
    rows: dict[str, dict[str, Any]] = {}
    for path in result_files(folder) if folder.exists() else []:
        rows |= {_identity(row): row for row in rows_of_file(path) if row["dataset"] != AVERAGE}
    return list(rows.values())


def rows_of_file(path: Path) -> list[dict[str, Any]]:
    """The rows of one results file, with averages over data sets. Raises UserError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); evaluate again", str(path)) from error
    if not (isinstance(found, list) and all(isinstance(row, dict) for row in found)):
        raise UserError(f"{path}: no list of rows; give a results file of eval.py, or a folder with results", str(path))
    rows = [_with_todays_settings(row) for row in found]
    for index, row in enumerate(rows):
        if missing := {"method", "dataset", "block_size", "tokens_per_step", "strategy"} - row.keys():
            raise UserError(
                f"{path}: row {index}: field {min(missing)!r} is missing; this is no results file", min(missing)
            )
    return rows


def _with_todays_settings(row: Row) -> dict[str, Any]:
    """The row, with the defaults of decode settings that did not exist when it was written."""
    from t3d.blocks.settings import DecodeSettings

    known = isinstance(row.get("decode"), Mapping)
    return {**row, "decode": asdict(DecodeSettings()) | row["decode"]} if known else dict(row)


def _identity(row: Row, *without: str) -> str:
    """The fields that identify a row, as text. `tokens_per_step` is one of them only if it is set, not measured."""
    speed = "tokens_per_step" if fixed_steps(row["strategy"]) else "denoising_steps_per_block"
    keys = ("model", "seed", "node", *_OF_A_SETTING, speed)
    return json.dumps([row.get(key) for key in keys if key not in without], sort_keys=True)


def _groups(rows: Iterable[Row], *without: str) -> list[list[Row]]:
    """Groups of rows that differ only in the keys `without`."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_identity(row, *without), []).append(row)
    return list(groups.values())


# --- averages --------------------------------------------------------------------------------------------------------


def over_seeds(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One row per setting: the mean over its seeds, with `accuracy_sem`, the standard error of the mean accuracy, and
    `nll_sem` likewise.

    A row without other seeds keeps its interval. Means have no interval over questions, so `ci_low` and `ci_high` are
    removed. Rows that share a seed are different runs (see `tell_apart`) and stay unchanged.
    """
    merged: list[dict[str, Any]] = []
    for group in _groups(rows, "model", "seed", "node"):
        if len(group) == 1 or not _seeds_differ(group):
            merged += map(dict, group)
            continue
        measured = [name for name in MEASURES if all(name in row for row in group)]
        sems = {f"{name}_sem": mean_and_sem([row[name] for row in group])[1] for name in measured}
        merged.append(_mean(group) | sems | {"seeds": [row.get("seed") for row in group]})
    return merged


def _seeds_differ(group: Sequence[Row]) -> bool:
    return len({row.get("seed") for row in group}) == len(group)


def tell_apart(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows ready for averaging over seeds. Two rows with the same setting and seed are different runs. If their folders
    (`run`) differ, the rows keep `run`; otherwise the model's name is added to their method.
    """

    def alike(rows: Sequence[Row]) -> list[list[Row]]:
        return [group for group in _groups(rows, "model", "seed", "node") if not _seeds_differ(group)]

    kept = [dict(row) for row in rows]
    plain = [{key: value for key, value in row.items() if key != "run"} for row in rows]
    if not alike(plain) or not alike(kept):
        return kept if alike(plain) else plain
    several = {row["method"] for group in alike(kept) for row in group}
    names = _names({row.get("model", "") for row in rows if row["method"] in several})
    return [
        row | {"method": f"{row['method']} ({names[row.get('model', '')]})"} if row["method"] in several else row
        for row in kept
    ]


def _names(models: Collection[str]) -> dict[str, str]:
    """The last part of each model's path. If paths end alike, the parts that differ, such as a student's run."""
    names = {model: Path(model).name for model in models}
    parts = [Path(model).parts for model in models]
    if len(set(names.values())) < len(names) and len(set(map(len, parts))) == 1:
        differing = [i for i, part in enumerate(zip(*parts, strict=True)) if len(set(part)) > 1]
        return {model: "/".join(Path(model).parts[i] for i in differing) for model in models}
    return names


def fullest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ only in their number of questions, the one with most: the others are trial runs."""
    return [max(group, key=lambda row: row.get("n", 0)) for group in _groups(rows, "n")]


def average(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The unweighted mean over data sets, for each method, setting and seed with several (of each set the `fullest`).

    Its 95 % interval treats the data sets as independent, and their half-widths as 1.96 standard errors.
    """
    averages = []
    for group in _groups(fullest(rows), "dataset", "n"):
        if len(group) == 1:
            continue
        row = _mean(group) | {"dataset": AVERAGE, "datasets": [row["dataset"] for row in group]}
        if all("ci_low" in part for part in group):
            half = math.hypot(*((part["ci_high"] - part["ci_low"]) / 2 for part in group)) / len(group)
            row |= {"ci_low": max(0.0, row["accuracy"] - half), "ci_high": min(1.0, row["accuracy"] + half)}
        averages.append(row | {"n": sum(part.get("n", 0) for part in group)})
    return averages


def pool_nodes(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows in which the parts of several machines (`node`, "index/machines") are merged into one."""
    rows = list(rows)
    parts = fullest(row for row in rows if "node" in row)
    return [dict(row) for row in rows if "node" not in row] + [_pooled(g) for g in _groups(parts, "node", "n", "run")]


def _pooled(parts: Sequence[Row]) -> dict[str, Any]:
    nodes = sorted(part["node"] for part in parts)
    machines = int(nodes[0].partition("/")[2])
    if nodes != sorted(f"{index}/{machines}" for index in range(machines)):
        mixed = len({node.partition("/")[2] for node in nodes}) > 1
        remedy = "delete the -node files of another number of nodes" if mixed else "give each node's results once"
        where = f"{parts[0]['method']} on {parts[0]['dataset']}"
        raise UserError(f"{where}: found nodes {', '.join(nodes)}; {remedy}", key="node")
    import pandas as pd

    frame = pd.DataFrame(parts)
    n, per_answer = int(frame["n"].sum()), ["accuracy", "steps_per_answer", "forwards_per_answer", "mean_length"]
    means = frame[[*per_answer, "latency_mean"]].mul(frame["n"], axis=0).sum() / n
    row = {key: value for key, value in _mean(parts).items() if key not in ("node", "latency_median", "pass_at_k")}
    row |= means.to_dict() | {"n": n, "questions": int(frame["questions"].sum()), "seconds": frame["seconds"].max()}
    row["tokens_per_forward"] = row["mean_length"] / row["forwards_per_answer"]
    row["measured_tokens_per_step"] = row["mean_length"] / row["steps_per_answer"]
    if not fixed_steps(row["strategy"]):
        row["tokens_per_step"] = row["measured_tokens_per_step"]
    rates = [part["tokens_per_second"] for part in parts]
    row["tokens_per_second"] = math.fsum(rates) if all(rates) else None
    if row["questions"] == n:  # for several answers per question the interval would need the records
        row["ci_low"], row["ci_high"] = wilson_interval(round(row["accuracy"] * n), n)
    return row


THRESHOLDS = {"low_confidence_dynamic": "dynamic_threshold", "entropy_bounded": "eb_threshold"}


def curves(rows: Iterable[Row]) -> list[list[dict[str, Any]]]:
    """Curves of rows that differ only in the threshold, as means over seeds, in order of tokens per forward.

    Each row has `aup`, the curve's. A single point is no curve. `best` of `aup` is the data set's best accuracy here.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in over_seeds(rows):
        key = THRESHOLDS.get(row["strategy"].partition("+")[0])
        known = {"tokens_per_forward", "accuracy"} <= row.keys()
        if key in row.get("decode", {}) and row["dataset"] != AVERAGE and known:
            decode = row["decode"] | {key: None}
            found.setdefault(_identity(row | {"decode": decode}, "model", "seed", "node", "n"), []).append(row)
    every = [sorted(curve, key=lambda row: row["tokens_per_forward"]) for curve in found.values() if len(curve) > 1]
    best: dict[str, float] = {}
    for row in (row for curve in every for row in curve):
        best[row["dataset"]] = max(100 * row["accuracy"], best.get(row["dataset"], 0.0))
    for curve in every:
        points = [(row["tokens_per_forward"], 100 * row["accuracy"]) for row in curve]
        area = aup(points, best[curve[0]["dataset"]])
        curve[:] = [row | {"aup": area} for row in curve]
    return every


def for_people(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of a table: means over seeds, then the averages over data sets.

    They are ordered by data set and block. Slower settings come first, and the original before other methods. Rows of
    a threshold's curve carry its `aup`.
    """
    areas = {_identity(row): row["aup"] for curve in curves(rows) for row in curve}
    shown = over_seeds([*rows, *average(rows)])
    shown = [row | ({"aup": areas[_identity(row)]} if _identity(row) in areas else {}) for row in shown]
    datasets = list(dict.fromkeys(row["dataset"] for row in shown))

    def place(row: Row) -> tuple:
        setting = (row["block_size"], not fixed_steps(row["strategy"]), row["strategy"], row["tokens_per_step"])
        return str(row.get("run", "")), datasets.index(row["dataset"]), *setting, method_order(row["method"])

    return sorted(shown, key=place)


def method_order(method: str) -> tuple[bool, str]:
    """A sort key: the original comes first, the others by name."""
    return method != "original", method


def _mean(group: Sequence[Row]) -> dict[str, Any]:
    """The mean of rows: numbers are averaged, equal values kept, and all others, seeds and intervals left out."""
    mean = {}
    for key in group[0].keys() - {end for ends in MEASURES.values() for end in ends}:
        values: list[Any] = [row.get(key) for row in group]
        if all(value == values[0] for value in values):
            mean[key] = values[0]
        elif all(isinstance(value, int | float) for value in values) and key != "seed":
            mean[key] = math.fsum(values) / len(values)
        elif key == "pass_at_k" and len({len(value or ()) for value in values}) == 1:
            import pandas as pd

            every = pd.DataFrame([at for value in values for at in value])
            mean[key] = every.groupby("k", as_index=False)["estimate"].mean().to_dict("records")
    return {key: mean[key] for key in group[0] if key in mean}


# --- two sets of answers to the same questions -----------------------------------------------------------------------


def records_file(path: str | Path) -> Path:
    """The records.jsonl of a results file or of its folder."""
    path = Path(path)
    path = path.with_name(path.name.removesuffix(".json")) if path.suffix == ".json" and path.is_file() else path
    return path if path.suffix == ".jsonl" else path / "records.jsonl"


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a unit's records.jsonl, one per answer. Raises UserError if there is no such file."""
    file = records_file(path)
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a results file of eval.py, or its folder", str(file))
    lines = filter(None, file.read_text(encoding="utf-8").split("\n"))  # splitlines() would cut texts at U+2028
    return list(map(json.loads, lines))


def by_question(path: str | Path) -> pd.DataFrame:
    """The answers of `read_records` by the question's id: `question`, the `share` of right answers, and the number of
    `samples`.
    """
    import pandas as pd

    records = pd.DataFrame(read_records(path), columns=["id", "question", "correct"])
    by_question = records.groupby([id.rpartition("/")[0] for id in records["id"]], sort=False)
    return by_question.agg(question=("question", "first"), share=("correct", "mean"), samples=("correct", "size"))


def compare(first: str | Path, second: str | Path) -> dict[str, Any]:
    """Compares two sets of answers on their common questions. `first` and `second` are inputs of `read_records`.

    Returns:
        A dictionary. n: number of common questions. left_out: number of questions in only one set. first, second:
        accuracy on the common questions. difference: second - first, with its 95 % interval (`difference_interval`).
        With one answer per question also first_only and second_only, the questions that only one gets right, and p,
        McNemar's exact two-sided p-value.
    """
    one, other = by_question(first), by_question(second)
    both = one.merge(other, left_index=True, right_index=True, suffixes=("_1", "_2"))
    if both.empty:
        raise UserError(
            f"{first} and {second} have no question in common; compare runs on the same data set", str(second)
        )
    if len(unlike := both.index[both["question_1"] != both["question_2"]]):
        raise UserError(f"{first} and {second}: {unlike[0]} differs; compare runs on the same data set", "question")
    differences = both["share_2"] - both["share_1"]
    low, high = difference_interval(differences.tolist())
    result = {
        "n": len(both),
        "left_out": len(one) + len(other) - 2 * len(both),
        "first": both["share_1"].mean(),
        "second": both["share_2"].mean(),
        "difference": differences.mean(),
        "ci_low": low,
        "ci_high": high,
    }
    if (both[["samples_1", "samples_2"]] == 1).all(axis=None):
        first_only, second_only = int((differences == -1).sum()), int((differences == 1).sum())
        p = mcnemar_exact(first_only, second_only)
        result |= {"first_only": first_only, "second_only": second_only, "p": p}
    return result

"""Rows of results: reading them back, averaging over seeds and data sets, comparing two sets of answers.

A row is what evaluation measured for one method on one data set under one decode setting with one seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from t3d.blocks.strategy import names, strategy_named
from t3d.common.errors import UserError
from t3d.evaluation.statistics import bootstrap_interval, mcnemar_exact, mean_and_sem, wilson_interval

Row = Mapping[str, Any]
AVERAGE = "average"  # the name that averages over data sets carry in place of a data set's


def fixed_steps(strategy: str) -> bool:
    """Whether block size / steps says the tokens per step. An energy changes what is drawn, not how much."""
    name = strategy.partition("+energy")[0]
    return name in names() and strategy_named(name).fixed_steps


def strategy_label(strategy: str) -> str:
    """The strategy of a row as tables show it."""
    name, plus, rest = strategy.partition("+")
    return ((name in names() and strategy_named(name).label) or name) + plus + rest


# --- reading ---------------------------------------------------------------------------------------------------------


def result_files(folder: Path) -> list[Path]:
    """The results files below a folder, or the file itself, the oldest first."""
    found = [folder] if folder.is_file() else [path for path in folder.rglob("*.json") if _holds_results(path)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path))


def _holds_results(path: Path) -> bool:
    """By the file's beginning: rollouts lie below the same folders and may be large."""
    with open(path, encoding="utf-8", errors="replace") as file:
        head = file.read(4096)
    return head.lstrip().startswith("[") and '"method"' in head and '"accuracy"' in head


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """`find_results`, and a UserError where there are none."""
    if not (rows := find_results(folder)):
        raise UserError(f"{folder}: no results here or below; run eval.py first")
    return rows


def find_results(folder: str | Path) -> list[dict[str, Any]]:
    """All rows below a folder, or of one file. A run may stand in several files, its own and that of a whole set:
    the newest counts. Averages over data sets are left out: they can be made again.
    """
    folder, rows = Path(folder), {}
    for path in result_files(folder) if folder.exists() else []:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not readable as JSON ({error}); evaluate again") from error
        if not (isinstance(found, list) and all(isinstance(row, dict) for row in found)):
            raise UserError(f"{path}: no list of rows; give a results file of eval.py, or a folder with some")
        for index, row in enumerate(map(_with_todays_settings, found)):
            missing = {"method", "dataset", "block_size", "tokens_per_step", "strategy", "accuracy"} - row.keys()
            if missing:
                raise UserError(f"{path}: row {index}: field {min(missing)!r} is missing; this is no results file")
            if row["dataset"] != AVERAGE:
                rows[(row.get("model"), row.get("seed"), row.get("node"), _setting(row))] = row
    return list(rows.values())


def _with_todays_settings(row: Row) -> Row:
    """Decode settings that were not known when the row was written had their defaults."""
    from t3d.blocks.settings import DecodeSettings

    known = isinstance(row, Mapping) and isinstance(row.get("decode"), Mapping)
    return {**row, "decode": asdict(DecodeSettings()) | row["decode"]} if known else row


def _setting(row: Row, *without: str) -> str:
    """Everything but model and seed that tells rows apart, as text. `tokens_per_step` does only where it is set."""
    keys = ["run", "method", "dataset", "datasets", "n", "block_size", "strategy", "temperature", "decode"]
    keys.append("tokens_per_step" if fixed_steps(row["strategy"]) else "denoising_steps_per_block")
    return json.dumps([row.get(key) for key in keys if key not in without], sort_keys=True)


# --- averages --------------------------------------------------------------------------------------------------------


def over_seeds(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One row per setting: the mean over its seeds, with `accuracy_sem`, the standard error of the mean accuracy.

    A row without other seeds stays as it is, with its interval. Means have no interval over questions: `ci_low` and
    `ci_high` are gone. Rows that share a seed are no seeds of one run (see `tell_apart`) and stay as they are.
    """
    merged = []
    for group in _groups(rows, _setting):
        merged += [_merge(group)] if len(group) > 1 and _seeds_differ(group) else map(dict, group)
    return merged


def _seeds_differ(group: Sequence[Row]) -> bool:
    return len({row.get("seed") for row in group}) == len(group)


def tell_apart(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows fit for averaging over seeds. Two rows of one setting with one seed are runs of their own: the rows then
    keep `run`, the folder that they are from, if that tells them apart; else their method carries the model's name.
    """
    plain = [{key: value for key, value in row.items() if key != "run"} for row in rows]
    named = [dict(row, method=f"{row['method']} ({Path(row.get('model', '')).name})") for row in rows]
    for labelled in (plain, [dict(row) for row in rows], named):
        if all(map(_seeds_differ, _groups(labelled, _setting))):
            break
    return labelled


def fullest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ in their number of questions only, the one with most: a trial run stands beside the real."""

    def all_but_n(row: Row) -> str:
        return json.dumps([row.get("model"), row.get("seed"), row.get("node"), _setting(row, "n")])

    return [max(group, key=lambda row: row.get("n", 0)) for group in _groups(rows, all_but_n)]


def average(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The unweighted mean over data sets, per method, setting and seed that has several (of each set the `fullest`).

    Its 95 % interval takes the data sets as independent and their half-widths as 1.96 standard errors.
    """

    def setting(row: Row) -> str:
        return json.dumps([row.get("model"), row.get("seed"), row.get("node"), _setting(row, "dataset", "n")])

    averages = []
    for group in _groups(fullest(rows), setting):
        if len(group) > 1:
            row = _mean(group) | {"dataset": AVERAGE, "datasets": [row["dataset"] for row in group]}
            if all("ci_low" in part for part in group):
                half = math.hypot(*((part["ci_high"] - part["ci_low"]) / 2 for part in group)) / len(group)
                row |= {"ci_low": max(0.0, row["accuracy"] - half), "ci_high": min(1.0, row["accuracy"] + half)}
            averages.append(row | {"n": sum(part.get("n", 0) for part in group)})
    return averages


def pool_nodes(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows in which the parts that several machines evaluated (`node`, "index/machines") have become one."""

    def all_but_node(row: Row) -> str:
        return json.dumps([row.get("model"), row.get("seed"), _setting(row, "n", "run")])

    rows = list(rows)
    pooled = [dict(row) for row in rows if "node" not in row]
    for group in _groups(fullest(row for row in rows if "node" in row), all_but_node):
        nodes = sorted(row["node"] for row in group)
        machines = int(nodes[0].partition("/")[2])
        if nodes != sorted(f"{index}/{machines}" for index in range(machines)):
            mixed = len({node.partition("/")[2] for node in nodes}) > 1
            remedy = "delete the -node files of another number of nodes" if mixed else "give each node's results once"
            raise UserError(f"{group[0]['method']} on {group[0]['dataset']}: found nodes {', '.join(nodes)}; {remedy}")
        n = sum(row["n"] for row in group)
        row = {key: value for key, value in _mean(group).items() if key not in ("node", "latency_median", "pass_at_k")}
        per_answer = ("accuracy", "steps_per_answer", "forwards_per_answer", "mean_length", "latency_mean")
        row |= {key: math.fsum(part[key] * part["n"] for part in group) / n for key in per_answer}
        row |= {"n": n, "questions": sum(part["questions"] for part in group)}
        row["tokens_per_forward"] = row["mean_length"] / row["forwards_per_answer"]
        row["measured_tokens_per_step"] = row["mean_length"] / row["steps_per_answer"]
        if not fixed_steps(row["strategy"]):
            row["tokens_per_step"] = row["measured_tokens_per_step"]
        row["seconds"] = max(part["seconds"] for part in group)
        rates = [part["tokens_per_second"] for part in group]
        row["tokens_per_second"] = math.fsum(rates) if all(rates) else None
        if row["questions"] == n:  # several answers per question would need the records for their interval
            row["ci_low"], row["ci_high"] = wilson_interval(round(row["accuracy"] * n), n)
        pooled.append(row)
    return pooled


def for_people(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What a table shows of rows: means over seeds, then the averages; data set by data set, block by block, the
    slower settings first, the original before other methods.
    """
    shown = over_seeds([*rows, *average(rows)])
    datasets = list(dict.fromkeys(row["dataset"] for row in shown))

    def place(row: Row) -> tuple:
        setting = (row["block_size"], not fixed_steps(row["strategy"]), row["strategy"], row["tokens_per_step"])
        return str(row.get("run", "")), datasets.index(row["dataset"]), *setting, method_order(row["method"])

    return sorted(shown, key=place)


def method_order(method: str) -> tuple[bool, str]:
    """The original stands first, the others by name."""
    return method != "original", method


def _groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _merge(group: Sequence[Row]) -> dict[str, Any]:
    return _mean(group) | {
        "accuracy_sem": mean_and_sem([row["accuracy"] for row in group])[1],
        "seeds": [row.get("seed") for row in group],
        "n": group[0].get("n"),
    }


def _mean(group: Sequence[Row]) -> dict[str, Any]:
    """Numbers averaged, equal values kept, all else left out. Seeds and intervals are no quantities to average."""
    mean = {}
    for key in group[0]:
        values = [row.get(key) for row in group]
        if all(value == values[0] for value in values):
            mean[key] = values[0]
        elif all(isinstance(value, int | float) for value in values) and key != "seed":
            mean[key] = math.fsum(values) / len(values)
        elif key == "pass_at_k" and len({len(value or ()) for value in values}) == 1:
            mean[key] = [
                {"k": at[0]["k"], "estimate": math.fsum(part["estimate"] for part in at) / len(at)}
                for at in zip(*values, strict=True)
            ]
    return {key: value for key, value in mean.items() if key not in ("ci_low", "ci_high", "ci")}


# --- two sets of answers to the same questions -----------------------------------------------------------------------


def read_records(path: str | Path) -> dict[str, dict[str, Any]]:
    """Question id -> {"question", "share" right, "samples"}, from records.jsonl of a results file or of its folder."""
    path = Path(path)
    path = path.with_name(path.name.removesuffix(".json")) if path.suffix == ".json" and path.is_file() else path
    file = path if path.suffix == ".jsonl" else path / "records.jsonl"
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a results file of eval.py, or the folder beside it")
    found: dict[str, dict[str, Any]] = {}
    for line in filter(None, file.read_text(encoding="utf-8").split("\n")):  # splitlines() would cut texts at U+2028
        record = json.loads(line)
        entry = found.setdefault(record["id"].rpartition("/")[0], {"question": record["question"], "correct": []})
        entry["correct"].append(record["correct"])
    for entry in found.values():
        entry["samples"] = len(entry["correct"])
        entry["share"] = sum(entry.pop("correct")) / entry["samples"]
    return found


def compare(first: str | Path, second: str | Path) -> dict[str, Any]:
    """How two sets of answers differ on the questions that both have; `first` and `second` as `read_records` takes.

    n: common questions; left_out: those that only one has. first, second: accuracy on the common ones; difference:
    second - first, with the 95 % interval of the paired bootstrap over questions. With one answer per question also
    first_only and second_only, the questions that one alone gets right, and p, McNemar's exact two-sided p-value.
    """
    one, other = read_records(first), read_records(second)
    common = [id for id in one if id in other]
    if not common:
        raise UserError(f"{first} and {second} have no question in common; compare runs on the same data set")
    for id in common:
        if one[id]["question"] != other[id]["question"]:
            raise UserError(f"{first} and {second}: {id} differs; compare runs on the same data set")
    differences = [other[id]["share"] - one[id]["share"] for id in common]
    low, high = bootstrap_interval(differences)
    result = {
        "n": len(common),
        "left_out": len(one) + len(other) - 2 * len(common),
        "first": math.fsum(one[id]["share"] for id in common) / len(common),
        "second": math.fsum(other[id]["share"] for id in common) / len(common),
        "difference": math.fsum(differences) / len(common),
        "ci_low": low,
        "ci_high": high,
    }
    if all(answers[id]["samples"] == 1 for answers in (one, other) for id in common):
        first_only, second_only = differences.count(-1.0), differences.count(1.0)
        p = mcnemar_exact(first_only, second_only)
        result |= {"first_only": first_only, "second_only": second_only, "p": p}
    return result

"""Results for people: a table on the terminal, Markdown, and one self-contained HTML file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t3d.common.errors import UserError, run_main
from t3d.common.jsonfiles import atomic_write
from t3d.evaluation.answers import AnswerSet, find_answers, pack
from t3d.evaluation.plots import (
    Row,
    forward_charts,
    method_colours,
    method_name,
    out_of_reach,
    speed_charts,
    step_colour,
    training_charts,
)
from t3d.evaluation.protocol import aup_tables, paper_tables
from t3d.evaluation.results import (
    AVERAGE,
    compare,
    find_results,
    for_people,
    pool_nodes,
    read_records,
    strategy_label,
    tell_apart,
)
from t3d.evaluation.tables import Table, percent

# The columns of a table of results: key of a row -> head, and the text of a cell
_COLUMNS = {
    "run": ("Run", "{run}"),
    "method": ("Method", lambda row: method_name(row["method"])),
    "dataset": ("Data set", "{dataset}"),
    "tokens_per_step": ("Tokens/step", lambda row: f"{row['tokens_per_step']:.2f}".rstrip("0").rstrip(".")),
    "accuracy": ("Accuracy", lambda row: f"{percent(row)} %"),
    "ci_low": ("95 % interval", lambda row: f"{100 * row['ci_low']:.1f} – {100 * row['ci_high']:.1f}"),
    "seeds": ("Seeds", lambda row: str(len(row["seeds"]))),
    "pass_at_k": (
        "pass@k",
        lambda row: ", ".join(f"{at['k']}: {100 * at['estimate']:.1f} %" for at in row["pass_at_k"]),
    ),
    "nll": ("NLL/token", lambda row: f"{row['nll']:.3f}" + (f" ± {row['nll_sem']:.3f}" if row.get("nll_sem") else "")),
    "nll_low": ("95 % interval of NLL", "{nll_low:.3f} – {nll_high:.3f}"),
    "distinct_2": ("Distinct 2-grams", lambda row: f"{100 * row['distinct_2']:.1f} %"),
    "repetition": ("Repeated 4-grams", lambda row: f"{100 * row['repetition']:.1f} %"),
    "mean_length": ("Tokens", lambda row: f"{row['mean_length']:.1f}" if "distinct_2" in row or "nll" in row else ""),
    "tokens_per_forward": ("Tokens/forward", "{tokens_per_forward:.2f}"),
    "block_size": ("Block", "{block_size}"),
    "strategy": ("Strategy", lambda row: strategy_label(row["strategy"])),
    "n": ("Problems", "{n}"),
    "seconds": ("Seconds", "{seconds:.1f}"),
}

# --- tables ----------------------------------------------------------------------------------------------------------


def result_table(rows: Sequence[Row], more: Mapping[str, tuple[str, Any]] | None = None) -> Table:
    """Result rows as texts; columns that no row has are left out.

    Args:
        more: further columns: key of a row -> its head, and the text of a cell (a format, or a function of the row).
    """
    every = _COLUMNS | dict(more or {})
    columns = [(key, *told) for key, told in every.items() if any(row.get(key) is not None for row in rows)]

    def cell(row: Row, key: str, text: Any) -> str:
        if row.get(key) is None:
            return ""
        return text.format(**row) if isinstance(text, str) else text(row)

    cells = [[cell(row, key, text) for key, _, text in columns] for row in rows]
    table = Table("", [head for _, head, _ in columns], cells, text=("Run", "Method", "Data set", "Strategy"))
    return table.without_empty("Tokens")


def print_table(rows: Sequence[Row]) -> None:
    """Result rows on standard output, in aligned columns."""
    print(result_table(rows).plain())


def markdown_table(rows: Sequence[Row]) -> str:
    """The table of results as Markdown."""
    return result_table(rows).markdown()


# --- the walk through one answer -------------------------------------------------------------------------------------


def split_blocks(n: int, block_size: int, offset: int) -> list[range]:
    """The response positions of each block on the absolute grid. The prompt fills `offset` positions of the first."""
    starts = [0, *range(block_size - offset, n, block_size)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True) if a < b]


def walk(entry: Row) -> Iterator[list[dict[str, Any]]]:
    """The tokens of each block of an answer: text, step in the answer, rank of the step in the block, and a hint."""
    steps = entry["unmask_step"]
    assert len(steps) == len(entry["tokens"]), "a walkthrough needs one unmask step per token"
    for number, block in enumerate(split_blocks(len(steps), entry["block_size"], entry["offset"]), start=1):
        order = sorted({steps[i] for i in block})
        yield [
            {
                "text": _visible(entry["tokens"][i]),
                "step": steps[i],
                "rank": (rank := order.index(steps[i]) + 1),
                "hint": f"block {number}, step {rank} of {len(order)} in it, step {steps[i]} of the answer",
            }
            for i in block
        ]


def _visible(token: str) -> str:
    """The token with visible signs for line ends, and for blanks if it has nothing else."""
    token = token.replace("\n", "↵").replace("\t", "⇥")
    return token if token.strip() else "␣" * len(token) or "∅"


# --- the page --------------------------------------------------------------------------------------------------------


def _lead(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The effect on each data set: the original and T3D at their highest common number of tokens per step."""
    settings: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        setting = (row["dataset"], row["block_size"], row["strategy"], round(row["tokens_per_step"], 1))
        settings.setdefault(setting, {})[row["method"]] = row
    graded = {setting: found for setting, found in settings.items() if all("accuracy" in row for row in found.values())}
    both = [setting for setting, found in graded.items() if {"original", "t3d"} <= found.keys()]
    fastest = {setting[0]: setting for setting in sorted(both, key=lambda setting: setting[-1])}
    return [
        {
            "dataset": dataset,
            "speed": f"{setting[-1]:g} token{'s' * (setting[-1] != 1)} per step",
            **{method: f"{percent(settings[setting][method])} %" for method in ("original", "t3d")},
        }
        for dataset, setting in fastest.items()
    ]


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Sequence[Row],
    training_logs: Mapping[str, str | Path | Sequence[Row]] | None = None,
    walkthrough: Sequence[Row] = (),
    tables: Sequence[Table] = (),
    answers: Sequence[AnswerSet] = (),
    comparison: str = "",
) -> Path:
    """Write one self-contained HTML file; returns its path. With 1,000 questions it stays below 2 MB.

    Parts without input are left out.

    Args:
        results: rows of results.json.
        training_logs: name of the run ("" for the only one) -> a training log's JSONL file or its records.
        walkthrough: answers to show; entries of one question stand side by side. Each has title, question,
            ground_truth, prompt, tokens, unmask_step, block_size, offset (prompt length mod block size), correct,
            steps, forwards.
        tables: more tables, shown above the table of all results.
        answers: answers to browse; the first set is the reference of the others.
        comparison: two runs compared, in words.
    """
    measured = [row for row in results if row["dataset"] != AVERAGE]
    size = max((entry["block_size"] for entry in walkthrough), default=1)
    logs = {name: read_log(log) if isinstance(log, str | Path) else log for name, log in (training_logs or {}).items()}
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        title=title,
        lead=_lead(measured),
        charts=[*forward_charts(measured), *speed_charts(measured)],
        out_of_reach=out_of_reach(measured),
        comparison=comparison,
        answers=pack(answers) if any(one.records for one in answers) else None,
        tables=tables,
        results=results,
        table=result_table(results),
        colours=method_colours(results),
        walkthrough=list(_by_question(walkthrough).values()),
        blocks_of=walk,
        step_colours=[(rank, step_colour(rank, size)) for rank in range(1, size + 1)],
        training=training_charts(logs),
    )
    with atomic_write(path) as file:
        file.write(page)
    return Path(path)


def _by_question(entries: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for entry in entries:
        groups.setdefault(entry["question"], []).append(entry)
    return groups


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a training log, one JSON object per line. A torn last line is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


# --- t3d report DIR... ------------------------------------------------------------------------------------------------


def collect(folders: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all folders. Rows that would look equal get `run`, their folder.

    Raises:
        UserError: a folder with neither results nor training logs.
    """
    rows = [{"run": folder, **row} for folder in folders for row in _rows(folder)]
    return tell_apart(pool_nodes(rows))


def _rows(folder: str) -> list[dict[str, Any]]:
    rows = find_results(folder)
    if not rows and not _logs(folder):
        raise UserError(f"{folder}: no results here or below; run eval.py first", folder)
    return rows


def _logs(folder: str) -> list[Path]:
    """The training logs below a folder. An exported model may hold a copy of its run's log, which is left out."""
    found = Path(folder).rglob("log.jsonl") if Path(folder).is_dir() else []
    return sorted(path for path in found if "ckpt" not in path.relative_to(folder).parts)


def training_logs(folders: Sequence[str]) -> dict[str, Path]:
    """Name of the run -> its training log, of all runs below the folders. Its name is the part of the path that differs
    from the other runs' paths.
    """
    logs = list(dict.fromkeys(path.resolve() for folder in folders for path in _logs(folder)))
    if len(logs) < 2:
        return dict(zip([""], logs, strict=False))
    begin = len(Path(os.path.commonpath(logs)).parts)
    paths = [log.parent.parts[begin:] for log in logs]
    end = len(os.path.commonprefix([path[::-1] for path in paths]))
    return {"/".join(path[: len(path) - end]): log for path, log in zip(paths, logs, strict=True)}


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Every key of the rows as a column, in full precision; lists and objects as JSON."""
    import pandas as pd

    texts = [{k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows]
    with atomic_write(path) as file:
        pd.DataFrame(texts, dtype=object).to_csv(file, index=False)


def comparison(first: str, second: str) -> str:
    """The result of `compare` as text."""
    found = compare(first, second)
    low, high = 100 * found["ci_low"], 100 * found["ci_high"]
    left_out = f" ({found['left_out']} questions of only one run are left out)" if found["left_out"] else ""
    lines = [
        f"A: {first}",
        f"B: {second}",
        f"questions in common: {found['n']}{left_out}",
        f"accuracy: A {100 * found['first']:.1f} %, B {100 * found['second']:.1f} %",
        f"B - A: {100 * found['difference']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} (paired bootstrap)",
    ]
    if "p" in found:
        split = f"right in A only {found['first_only']}, in B only {found['second_only']}"
        lines.append(f"{split}; McNemar's exact p = {found['p']:.3g}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Write a report. ``argv``: None = the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog="t3d report",
        description="Show all results below the given folders (or in the given files) as one table: Markdown on "
        "standard output. Runs that differ only in the seed are averaged, with the standard error.",
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help="a folder with results or runs, or a results file")
    parser.add_argument("--csv", metavar="FILE", help="write the table's rows, with all their numbers")
    parser.add_argument("--html", metavar="FILE", help="write a page: plots, answers, training curves")
    parser.add_argument(
        "--paper", action="store_true", help="add the tables of the paper: few-step, full-step, dynamic"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="compare two results files (or their folders) on the questions that both answered",
    )
    args = parser.parse_args(argv)
    if not args.folders and not args.compare:
        parser.error("give a folder with results, or --compare A B")
    told = comparison(*args.compare) if args.compare else ""
    rows = collect(args.folders)
    shown = for_people(rows)
    tables = [*(paper_tables(rows) if args.paper else []), *aup_tables(rows)]
    if args.csv:
        write_csv(args.csv, shown)
    if args.html:
        compared = [AnswerSet(path, "", read_records(path)) for path in args.compare or ()]
        write_report(
            args.html,
            title="Results",
            results=shown,
            tables=tables,
            training_logs=training_logs(args.folders),
            answers=compared or find_answers(args.folders),
            comparison=told,
        )
    parts = [told, markdown_table(shown) if shown else "", *(table.markdown() for table in tables)]
    print("\n\n".join(filter(None, parts)))


if __name__ == "__main__":
    run_main(main)

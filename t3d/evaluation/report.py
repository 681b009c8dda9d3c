"""What came out, for people: a table on the terminal, Markdown, and one HTML file that needs nothing else."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from t3d.common.errors import run_main
from t3d.common.jsonfiles import atomic_write
from t3d.evaluation.plots import (
    METHOD_COLOURS,
    Chart,
    Row,
    accuracy_charts,
    method_colours,
    method_name,
    step_colour,
    training_charts,
)
from t3d.evaluation.protocol import paper_tables
from t3d.evaluation.results import AVERAGE, compare, for_people, pool_nodes, read_results, tell_apart
from t3d.evaluation.tables import Table, percent

_COLUMNS = {
    "run": "Run",
    "method": "Method",
    "dataset": "Data set",
    "tokens_per_step": "Tokens/step",
    "accuracy": "Accuracy",
    "ci": "95 % interval",
    "seeds": "Seeds",
    "pass_at_k": "pass@k",
    "tokens_per_forward": "Tokens/forward",
    "block_size": "Block",
    "strategy": "Strategy",
    "n": "Problems",
    "seconds": "Seconds",
}
_TEXT = {"run", "method", "dataset", "strategy"}

# --- tables ----------------------------------------------------------------------------------------------------------


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column keys and text cells for result rows; columns that no row has are left out."""
    keys = [key for key in _COLUMNS if any(("ci_low" if key == "ci" else key) in row for row in rows)]
    return keys, [[_cell(row, key) for key in keys] for row in rows]


def _cell(row: Row, key: str) -> str:
    if key == "ci":
        return f"{100 * row['ci_low']:.1f} – {100 * row['ci_high']:.1f}" if "ci_low" in row else ""
    value = row.get(key)
    if value is None:
        return ""
    if key == "method":
        return method_name(value)
    if key == "strategy":
        return value.removeprefix("low_confidence_")
    if key == "accuracy":
        return f"{percent(row)} %"
    if key == "seeds":
        return str(len(value))
    if key == "pass_at_k":
        return ", ".join(f"{at['k']}: {100 * at['estimate']:.1f} %" for at in value)
    if key == "tokens_per_step":
        return f"{value:.2f}".rstrip("0").rstrip(".")
    if isinstance(value, float):
        return f"{value:.2f}" if key == "tokens_per_forward" else f"{value:.1f}"
    return str(value)


def result_table(rows: Sequence[Row]) -> Table:
    keys, cells = table_cells(rows)
    return Table("", [_COLUMNS[key] for key in keys], cells, text=[_COLUMNS[key] for key in keys if key in _TEXT])


def print_table(rows: Sequence[Row]) -> None:
    """Result rows on standard output, in aligned columns."""
    print(result_table(rows).plain())


def markdown_table(rows: Sequence[Row]) -> str:
    return result_table(rows).markdown()


def _html_table(rows: Sequence[Row]) -> str:
    keys, cells = table_cells(rows)
    colours = method_colours(rows)
    align = ["" if key in _TEXT else " class=num" for key in keys]
    head = "".join(f"<th{side}>{_COLUMNS[key]}</th>" for key, side in zip(keys, align, strict=True))
    body = []
    for before, row, line in zip([rows[0], *rows], rows, cells, strict=False):
        inner = dict(zip(keys, map(escape, line), strict=True))
        inner["method"] = f"<i class=dot></i>{inner['method']}"
        inner["accuracy"] = f'<b>{inner["accuracy"]}</b><i class=bar style="width:{100 * row["accuracy"]:.1f}%"></i>'
        # A rule where the data set or the block changes.
        new = " class=new" if any(row[key] != before[key] for key in ("dataset", "block_size")) else ""
        tds = "".join(f"<td{side}>{inner[key]}</td>" for key, side in zip(keys, align, strict=True))
        body.append(f'<tr{new} style="--k:{colours[row["method"]]}">{tds}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


# --- the walk through one answer -------------------------------------------------------------------------------------


def split_blocks(n: int, block_size: int, offset: int) -> list[range]:
    """The response positions of each block on the absolute grid, where the prompt already fills `offset` of the
    first.
    """
    starts = [0, *range(block_size - offset, n, block_size)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True) if a < b]


def _walk(entry: Row) -> str:
    steps, size = entry["unmask_step"], entry["block_size"]
    assert len(steps) == len(entry["tokens"]), "a walkthrough needs one unmask step per token"
    blocks = []
    for number, block in enumerate(split_blocks(len(steps), size, entry["offset"]), start=1):
        order = sorted({steps[i] for i in block})
        chips = []
        for i in block:
            rank = order.index(steps[i]) + 1
            hint = f"block {number}, step {rank} of {len(order)} in it, step {steps[i]} of the answer"
            token = escape(_visible(entry["tokens"][i]))
            chips.append(f'<span class="tok r{rank}" title="{hint}">{token}<small>{steps[i]}</small></span>')
        blocks.append(f'<span class="block">{"".join(chips)}</span>')
    verdict = '<b class="yes">✓ right</b>' if entry["correct"] else '<b class="no">✗ wrong</b>'
    facts = f"{entry['steps']} steps · {entry['forwards']} forwards · {len(steps)} tokens"
    return (
        f'<article><h3>{escape(entry["title"])}</h3><p class="facts">{verdict} · {facts}</p>'
        f'<div class="answer">{"".join(blocks)}</div></article>'
    )


def _visible(token: str) -> str:
    """Blanks that are the whole token, and line ends, get a sign of their own."""
    token = token.replace("\n", "↵").replace("\t", "⇥")
    return token if token.strip() else "␣" * len(token) or "∅"


def _walkthrough(entries: Sequence[Row]) -> str:
    size = max(entry["block_size"] for entry in entries)
    keys = "".join(f'<span class="tok r{i}">{i}</span>' for i in range(1, size + 1))
    parts = [
        "<p>Each box is a block. The colour says in which step of its block a token was unmasked, the small number in "
        "which step of the whole answer. Tokens of one colour in one box were drawn at once, blind to each other.</p>"
        f'<p class="legend">step within the block {keys}</p>'
    ]
    # Entries on the same problem stand side by side under it.
    for question in dict.fromkeys(entry["question"] for entry in entries):
        group = [entry for entry in entries if entry["question"] == question]
        truth, prompt = escape(str(group[0]["ground_truth"])), escape(group[0]["prompt"])
        parts += [
            f"<blockquote>{escape(question)}<footer>right answer: <b>{truth}</b></footer></blockquote>",
            f'<div class="walks">{"".join(map(_walk, group))}</div>',
            f"<details><summary>The prompt as the model reads it</summary><pre>{prompt}</pre></details>",
        ]
    return "".join(parts)


# --- the page --------------------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2128;--soft:#5b6470;--rule:#d9dee4;--panel:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--bg:#12161b;--fg:#e4e9ee;--soft:#9aa5b1;--rule:#333b45;--panel:#1b2128}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 18px 48px}
h1{font-size:1.7rem;margin:0 0 6px;line-height:1.2}h2{font-size:1.2rem;margin:40px 0 10px}h3{font-size:1rem;margin:0}
p{margin:6px 0 10px;max-width:48em}
.lead{font-size:1.15rem}.lead b{white-space:nowrap;color:var(--k)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;width:100%}
th{font-weight:600;color:var(--soft);text-align:left;font-size:.82rem}
th,td{padding:7px 9px;white-space:nowrap}
tbody tr{border-top:1px solid var(--rule)}tbody tr.new{border-top:2px solid var(--soft)}.num{text-align:right}
.dot{display:inline-block;width:10px;height:10px;border-radius:5px;background:var(--k);margin-right:7px}
.bar{display:block;height:3px;border-radius:2px;background:var(--k);margin:2px 0 0 auto}
.plots,.walks{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,var(--least)),1fr));gap:18px}
.plots{--least:330px}.plots.few{grid-template-columns:minmax(0,640px)}.walks{--least:380px}
figure,article{margin:0;background:var(--panel);border-radius:10px;padding:14px;min-width:0}
figcaption{font-weight:600;margin-bottom:6px}
svg{display:block;width:100%;height:auto}svg text{font-family:inherit!important}
.legend,.facts,footer,summary{font-size:.88rem;color:var(--soft)}
blockquote{margin:14px 0;padding:10px 16px;border-left:4px solid var(--rule);background:var(--panel);
white-space:pre-wrap}
.yes{color:#2a9a4b}.no{color:#dd6b0d}
.answer{display:flex;flex-wrap:wrap;gap:6px}
.block{display:inline-flex;flex-wrap:wrap;gap:2px;border:1.5px solid var(--soft);border-radius:7px;padding:2px;
max-width:100%}
.tok{display:inline-flex;flex-direction:column;align-items:center;border-radius:4px;padding:2px 5px;line-height:1.25;
font-family:ui-monospace,monospace;font-size:.86rem;white-space:pre-wrap;overflow-wrap:anywhere;min-width:1.5em}
.tok small{font-size:.66rem;opacity:.85}.legend .tok{margin:0 2px;display:inline-block}
details{margin:10px 0;font-size:.9rem}summary{cursor:pointer}
pre{background:var(--panel);padding:12px;border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:600px){table,th{font-size:.78rem}th,td{padding:7px 4px}th{white-space:normal}.lead{font-size:1.05rem}}
"""


def _figure(chart: Chart) -> str:
    title, svg = chart
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _lead(rows: Sequence[Row]) -> str:
    """The effect in a sentence per data set: the original and T3D at the most tokens per step that both were run at."""
    settings: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        setting = (row["dataset"], row["block_size"], row["strategy"], round(row["tokens_per_step"], 1))
        settings.setdefault(setting, {})[row["method"]] = row
    both = [setting for setting, found in settings.items() if {"original", "t3d"} <= found.keys()]
    fastest = {setting[0]: setting for setting in sorted(both, key=lambda setting: setting[-1])}
    sentences = []
    for dataset, setting in fastest.items():
        original, t3d = (
            f'<b style="--k:{METHOD_COLOURS[method]}">{_cell(settings[setting][method], "accuracy")}</b>'
            for method in ("original", "t3d")
        )
        speed = f"{setting[-1]:g} token{'s' * (setting[-1] != 1)} per step"
        where = f"At {speed} on {escape(dataset)}"
        sentences.append(f"<p class=lead>{where}, the original model answers {original} right, T3D {t3d}.</p>")
    return "".join(sentences)


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Sequence[Row],
    training_logs: Mapping[str, str | Path | Sequence[Row]] | None = None,
    walkthrough: Sequence[Row] = (),
    tables: Sequence[Table] = (),
) -> Path:
    """Write one self-contained HTML file; returns its path.

    results: rows of results.json. training_logs: by name of the run ("" for the only one), a training log's JSONL file
    or its records. walkthrough: answers to look at, entries on one question side by side, each {title, question,
    ground_truth, prompt, tokens, unmask_step, block_size, offset (prompt length mod block size), correct, steps,
    forwards}. tables: more tables, shown above that of all results. Parts without input are left out.
    """
    colours = "".join(
        ".r{}{{background:{};color:{}}}".format(rank, *step_colour(rank, size))
        for size in [max((entry["block_size"] for entry in walkthrough), default=1)]
        for rank in range(1, size + 1)
    )
    parts = [f"<h1>{escape(title)}</h1>"]
    if results:
        measured = [row for row in results if row["dataset"] != AVERAGE]
        plots = [_figure(chart) for chart in accuracy_charts(measured)]
        few = " few" if len(plots) == 1 else ""
        parts += [_lead(measured), f'<div class="plots{few}">{"".join(plots)}</div>']
        bars = "Bars are 95 % intervals; for means over seeds they are one standard error."
        parts.append(f"<p class=legend>{bars}</p>")
    parts += [table.html() for table in tables]
    if results:
        parts += ["<h2>All results</h2>" if tables else "<h2>Results</h2>", _html_table(results)]
    if walkthrough:
        parts += ["<h2>In which order the tokens appear</h2>", _walkthrough(walkthrough)]
    logs = {
        name: log if isinstance(log, list | tuple) else read_log(log) for name, log in (training_logs or {}).items()
    }
    figures = [_figure(chart) for name, records in logs.items() for chart in training_charts(name, records)]
    if figures:
        parts += ["<h2>Training</h2>", f'<div class="plots">{"".join(figures)}</div>']
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{colours}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>"
    )
    with atomic_write(path) as file:
        file.write(page)
    return Path(path)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a training log, one JSON object per line. A last line cut off by a killed run is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


# --- t3d report DIR... ------------------------------------------------------------------------------------------------


def collect(folders: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all folders, each with `run`, its folder, where that is needed to tell them apart."""
    return tell_apart(pool_nodes({"run": folder, **row} for folder in folders for row in read_results(folder)))


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Every key of the rows as a column, in full precision; lists and objects as JSON."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(keys)
        for row in rows:
            values = [row.get(key, "") for key in keys]
            writer.writerow([json.dumps(value) if isinstance(value, list | dict) else value for value in values])


def comparison(first: str, second: str) -> str:
    """`compare` in words."""
    found = compare(first, second)
    low, high = 100 * found["ci_low"], 100 * found["ci_high"]
    left_out = f" ({found['left_out']} that only one has are left out)" if found["left_out"] else ""
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
    """Report as ``argv`` (None: the process's own arguments) says."""
    parser = argparse.ArgumentParser(
        prog="t3d report",
        description="All results below the given folders (or in the given files) as one table: Markdown on standard "
        "output. Runs that differ in the seed only become their mean, with its standard error.",
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help="a folder with results, or a results file")
    parser.add_argument("--csv", metavar="FILE", help="write the table's rows, with all their numbers")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots")
    parser.add_argument(
        "--paper", action="store_true", help="also the tables of the paper: few-step, full-step, dynamic"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="paired comparison of two results files (or their folders) on the questions that both answered",
    )
    args = parser.parse_args(argv)
    if not args.folders and not args.compare:
        parser.error("give a folder with results, or --compare A B")
    parts = [comparison(*args.compare)] if args.compare else []
    if args.folders:
        rows = collect(args.folders)
        shown = for_people(rows)
        tables = paper_tables(rows) if args.paper else []
        parts += [markdown_table(shown), *(table.markdown() for table in tables)]
        if args.csv:
            write_csv(args.csv, shown)
        if args.html:
            write_report(args.html, title="Results", results=shown, tables=tables)
    print("\n\n".join(parts))


if __name__ == "__main__":
    run_main(main)

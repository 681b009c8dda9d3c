"""What came out, for people: a table on the terminal, Markdown, and one HTML file that needs nothing else.

The HTML report draws its plots as inline SVG coloured by the page's style sheet, so they are sharp at any size, follow
the reader's light or dark mode, and cost no plotting library.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TextIO

from t3d.errors import UserError

Row = Mapping[str, Any]
Point = tuple[float, float]

METHOD_NAMES = {"original": "Original", "t3d": "T3D"}
_COLUMNS = {
    "run": "Run",
    "method": "Method",
    "dataset": "Data set",
    "tokens_per_step": "Tokens/step",
    "accuracy": "Accuracy",
    "ci": "95 % interval",
    "tokens_per_forward": "Tokens/forward",
    "block_size": "Block",
    "strategy": "Strategy",
    "n": "Problems",
    "seconds": "Seconds",
}
_TEXT_COLUMNS = {"run", "method", "dataset", "strategy"}

# --- tables ----------------------------------------------------------------------------------------------------------


def method_name(method: str) -> str:
    return METHOD_NAMES.get(method, method)


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column keys and text cells for result rows; columns that no row has are left out. The two intervals' ends are
    one.
    """
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
        return f"{100 * value:.1f} %"
    if key == "tokens_per_step":
        return f"{value:.2f}".rstrip("0").rstrip(".")
    if isinstance(value, float):
        return f"{value:.2f}" if key == "tokens_per_forward" else f"{value:.1f}"
    return str(value)


def print_table(rows: Sequence[Row], file: TextIO | None = None) -> None:
    """Result rows as an aligned text table, on standard output unless `file` says otherwise."""
    keys, cells = table_cells(rows)
    lines = [[_COLUMNS[key] for key in keys], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        aligned = [
            cell.ljust(width) if key in _TEXT_COLUMNS else cell.rjust(width)
            for key, cell, width in zip(keys, line, widths, strict=True)
        ]
        print("  ".join(aligned).rstrip(), file=file or sys.stdout)


def markdown_table(rows: Sequence[Row]) -> str:
    keys, cells = table_cells(rows)
    rule = ["---" if key in _TEXT_COLUMNS else "---:" for key in keys]
    lines = [[_COLUMNS[key] for key in keys], rule, *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _html_table(rows: Sequence[Row]) -> str:
    keys, cells = table_cells(rows)
    head = "".join(f"<th{_align(key)}>{_COLUMNS[key]}</th>" for key in keys)
    body = []
    for i, (row, line) in enumerate(zip(rows, cells, strict=True)):
        tds = []
        for key, cell in zip(keys, line, strict=True):
            inner = escape(cell)
            if key == "method":
                inner = f'<i class="dot {_method_class(row["method"], rows)}"></i>{inner}'
            if key == "accuracy" and cell:
                width = 100 * min(max(row["accuracy"], 0), 1)
                bar = f'<i class="bar {_method_class(row["method"], rows)}" style="width:{width:.1f}%"></i>'
                inner = f"<b>{inner}</b>{bar}"
            tds.append(f"<td{_align(key)}>{inner}</td>")
        # A rule where the data set or the block changes.
        new = i and any(row.get(key) != rows[i - 1].get(key) for key in ("dataset", "block_size"))
        body.append(f"<tr{' class=new' if new else ''}>{''.join(tds)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _align(key: str) -> str:
    return "" if key in _TEXT_COLUMNS else ' class="num"'


def _method_class(method: str, rows: Sequence[Row]) -> str:
    """Colours belong to methods: fixed for the two that every report has, by order of appearance for others."""
    if method in METHOD_NAMES:
        return f"m-{method}"
    others = [name for name in dict.fromkeys(row["method"] for row in rows) if name not in METHOD_NAMES]
    return f"m-{others.index(method) % 4}"


# --- plots -----------------------------------------------------------------------------------------------------------

_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 270, 54, 14, 18, 44


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them."""
    if high - low < 1e-6:  # a constant needs an axis too
        low, high = low - 0.5, high + 0.5
    span = high - low
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class _Chart:
    """Axes and marks of one plot, gathered as SVG elements."""

    def __init__(
        self,
        label: str,
        x_label: str,
        x: tuple[float, float],
        y_ticks: list[float],
        x_ticks: Mapping[float, str],
        y_unit: str = "",
        room_below: float = 0.0,
    ):
        self.x, self.y = x, (y_ticks[0] - room_below, y_ticks[-1])
        self.parts = [f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(label)}">']
        for tick in y_ticks:
            y = self.py(tick)
            self.parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}{y_unit}</text>')
        for tick, text in x_ticks.items():
            at = f'x="{self.px(tick):.1f}" y="{_H - _BOTTOM + 18}"'
            self.parts.append(f'<text {at} text-anchor="middle">{escape(text)}</text>')
        at = f'x="{(_LEFT + _W - _RIGHT) / 2}" y="{_H - 6}"'
        self.parts.append(f'<text class="label" {at} text-anchor="middle">{escape(x_label)}</text>')

    def px(self, x: float) -> float:
        return _LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (_W - _LEFT - _RIGHT)

    def py(self, y: float) -> float:
        return _H - _BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (_H - _TOP - _BOTTOM)

    def line(self, points: Iterable[Point], style: str) -> None:
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="line {style}" points="{path}"/>')

    def interval(self, x: float, low: float, high: float, style: str) -> None:
        px, top, bottom = self.px(x), self.py(high), self.py(low)
        d = f"M{px:.1f} {top:.1f}V{bottom:.1f}M{px - 4:.1f} {top:.1f}h8M{px - 4:.1f} {bottom:.1f}h8"
        self.parts.append(f'<path class="interval {style}" d="{d}"/>')

    def mark(self, x: float, y: float, style: str, title: str) -> None:
        circle = f'<circle class="mark {style}" cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="4.5">'
        self.parts.append(f"{circle}<title>{escape(title)}</title></circle>")

    def text(self, x: float, y: float, text: str, style: str, above: bool) -> None:
        # At the ends of the axis a centred number would leave the plot.
        px = min(max(self.px(x), _LEFT + 16), _W - _RIGHT - 16)
        at = f'x="{px:.1f}" y="{self.py(y) + (-9 if above else 18):.1f}"'
        self.parts.append(f'<text class="value {style}" {at} text-anchor="middle">{escape(text)}</text>')

    def svg(self) -> str:
        return "".join([*self.parts, "</svg>"])


def _figure(title: str, legend: Iterable[tuple[str, str]], svg: str) -> str:
    keys = "".join(f'<span><i class="key {style}"></i>{escape(name)}</span>' for style, name in legend)
    return f'<figure><figcaption>{escape(title)}<div class="legend">{keys}</div></figcaption>{svg}</figure>'


def _accuracy_figures(rows: Sequence[Row]) -> list[str]:
    """One plot for each data set and block size: accuracy against tokens per step, one line per method and strategy."""
    figures = []
    for dataset, block in dict.fromkeys((row["dataset"], row["block_size"]) for row in rows):
        here = [row for row in rows if (row["dataset"], row["block_size"]) == (dataset, block)]
        lines = dict.fromkeys((row["method"], row["strategy"]) for row in here)
        one_strategy = len({strategy for _, strategy in lines}) == 1
        speeds = [max(row["tokens_per_step"], 1e-3) for row in here]
        ends = (math.log2(min(speeds)), math.log2(max(speeds)))
        powers = range(math.floor(ends[0] + 0.1), math.ceil(ends[1] - 0.1) + 1)
        chart = _Chart(
            f"Accuracy against tokens per step on {dataset}",
            "tokens per step (more is faster)",
            (min(powers[0], ends[0]) - 0.2, max(powers[-1], ends[1]) + 0.2),
            [0, 20, 40, 60, 80, 100],
            {power: f"{2.0**power:g}" for power in powers},
            y_unit=" %",
            room_below=9,  # for the number under a point near 0
        )
        legend = []
        marks: dict[tuple[str, str], list[Row]] = {
            line: sorted((row for row in here if (row["method"], row["strategy"]) == line), key=_speed)
            for line in lines
        }
        for i, ((method, strategy), points) in enumerate(marks.items()):
            style = _method_class(method, rows) + ("" if one_strategy or "static" in strategy else " dashed")
            legend.append((style, method_name(method) + ("" if one_strategy else f", {strategy}")))
            # Lines stand slightly apart, so that intervals at the same speed do not cover each other.
            shift = 0.04 * (i - (len(marks) - 1) / 2)
            at = [(math.log2(max(_speed(row), 1e-3)) + shift, 100 * row["accuracy"]) for row in points]
            chart.line(at, style)
            for (x, y), row in zip(at, points, strict=True):
                chart.interval(x, 100 * row["ci_low"], 100 * row["ci_high"], style)
                chart.mark(x, y, style, f"{method_name(method)}, {strategy}: {_cell(row, 'accuracy')} of {row['n']}")
        if len(marks) == 2:  # numbers at the points stay readable with two lines only: the upper above, the lower below
            _value_labels(chart, list(marks.values()), rows)
        figures.append(_figure(f"{dataset}, block size {block}", legend, chart.svg()))
    return figures


def _speed(row: Row) -> float:
    return row["tokens_per_step"]


def _value_labels(chart: _Chart, lines: list[list[Row]], rows: Sequence[Row]) -> None:
    for mine, other in (lines, lines[::-1]):
        for row in mine:
            nearest = min(other, key=lambda there: abs(math.log2(_speed(there) / _speed(row))))
            above = (row["accuracy"], row["method"]) >= (nearest["accuracy"], nearest["method"])
            y = row["ci_high"] if above else row["ci_low"]
            style = _method_class(row["method"], rows)
            chart.text(math.log2(_speed(row)), 100 * y, f"{100 * row['accuracy']:.0f}", style, above)


_LOSS_LINES = {"loss": "total", "ddo_real": "DDO, real", "ddo_fake": "DDO, fake", "path": "path"}


def _training_figures(name: str, records: Sequence[Row]) -> list[str]:
    prefix = f"{name}: " if name else ""
    panels = [
        (f"{prefix}loss and its terms", _LOSS_LINES, 0.0, None),
        (f"{prefix}reward margin", {"reward_margin": "real − fake"}, None, None),
        (f"{prefix}DDO accuracy", {"ddo_accuracy": "share of real > fake"}, 0.0, 1.0),
    ]
    figures = []
    for title, lines, low, high in panels:
        curves = {key: _thin([(r["step"], r[key]) for r in records if _is_number(r.get(key))]) for key in lines}
        curves = {key: curve for key, curve in curves.items() if curve}
        if not curves:
            continue
        steps = [x for curve in curves.values() for x, _ in curve]
        values = [y for curve in curves.values() for _, y in curve]
        x_ends = (min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1)
        y_ticks = _ticks(min(values) if low is None else min(low, *values), max(values) if high is None else high)
        x_ticks = {tick: f"{tick:g}" for tick in _ticks(*x_ends) if x_ends[0] <= tick <= x_ends[1]}
        chart = _Chart(title, "optimizer step", x_ends, y_ticks, x_ticks)
        for key, curve in curves.items():
            chart.line(curve, f"c-{key}")
        figures.append(_figure(title, [(f"c-{key}", lines[key]) for key in curves], chart.svg()))
    return figures


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thin(points: list[Point], bins: int = 150) -> list[Point]:
    """At most `bins` points, each the mean of its neighbourhood: noise is smoothed, the file stays small."""
    size = math.ceil(len(points) / bins) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


# --- the walk through one answer -------------------------------------------------------------------------------------

# Perceptually ordered, dark to light (points of the viridis map).
_PALETTE = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]


def step_colour(rank: int, block_size: int) -> tuple[str, str]:
    """(background, text) for a token unmasked in the rank-th step of its block, 1..block_size: the earlier, the
    darker.
    """
    place = (rank - 1) / max(block_size - 1, 1) * (len(_PALETTE) - 1)
    i = min(int(place), len(_PALETTE) - 2)
    rgb = [round(a + (b - a) * (place - i)) for a, b in zip(_PALETTE[i], _PALETTE[i + 1], strict=True)]
    luminance = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]
    return "#{:02x}{:02x}{:02x}".format(*rgb), "#fff" if luminance < 140 else "#000"


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
    names = [f"{i}{'st' if i == 1 else 'nd' if i == 2 else 'rd' if i == 3 else 'th'}" for i in range(1, size + 1)]
    keys = "".join(f'<span class="tok r{i}">{name}</span>' for i, name in enumerate(names, start=1))
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
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2128;--soft:#5b6470;--rule:#d9dee4;--panel:#f5f7f9;
--original:#c75000;--t3d:#0969da;--a:#8250df;--b:#1a7f37;--c:#bf3989;--d:#7d6200}
@media(prefers-color-scheme:dark){:root{--bg:#12161b;--fg:#e4e9ee;--soft:#9aa5b1;--rule:#333b45;--panel:#1b2128;
--original:#ff9a4d;--t3d:#58a6ff;--a:#bc8cff;--b:#56d364;--c:#ff7eb8;--d:#d9b62b}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 18px 48px}h1{font-size:1.7rem;margin:0 0 6px;line-height:1.2}
h2{font-size:1.2rem;margin:40px 0 10px}h3{font-size:1rem;margin:0}p{margin:6px 0 10px;max-width:48em}
.lead{font-size:1.15rem}.lead b{white-space:nowrap}.scroll{overflow-x:auto}
.m-original{--k:var(--original)}.m-t3d,.c-loss,.c-reward_margin,.c-ddo_accuracy{--k:var(--t3d)}
.m-0,.c-ddo_fake{--k:var(--a)}.m-1,.c-path{--k:var(--b)}.m-2{--k:var(--c)}.m-3{--k:var(--d)}.c-ddo_real{--k:var(--original)}
b[class^=m-]{color:var(--k)}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;width:100%}
th{font-weight:600;color:var(--soft);text-align:left;font-size:.82rem}th,td{padding:7px 9px;white-space:nowrap} tbody
tr{border-top:1px solid var(--rule)}tbody tr.new{border-top:2px solid var(--soft)}.num{text-align:right}
.dot,.key{display:inline-block;width:10px;height:10px;border-radius:5px;background:var(--k);margin-right:7px}
.key{width:16px;height:3px;border-radius:0;vertical-align:middle}
.key.dashed{background:repeating-linear-gradient(90deg,var(--k) 0 5px,transparent 5px 8px)}
.bar{display:block;height:3px;border-radius:2px;background:var(--k);margin:2px 0 0 auto}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:18px}
.plots.few{grid-template-columns:minmax(0,640px)}
figure{margin:0;background:var(--panel);border-radius:10px;padding:14px 14px 8px;min-width:0}
figcaption{font-weight:600;margin-bottom:6px}.legend{font-weight:400;font-size:.85rem;color:var(--soft)} .legend
span{margin-right:14px;display:inline-block} svg{display:block;width:100%;height:auto}svg
text{font-size:12px;fill:var(--soft)}svg text.label{font-size:12.5px} svg
text.value{fill:var(--k);font-weight:700;font-size:13px}
.grid{stroke:var(--rule);stroke-width:1}.line{fill:none;stroke:var(--k);stroke-width:2;stroke-linejoin:round}
.line.dashed{stroke-dasharray:6 4}.interval{stroke:var(--k);stroke-width:1.3;fill:none}
.mark{fill:var(--k);stroke:var(--panel);stroke-width:1.5} blockquote{margin:14px 0;padding:10px 16px;border-left:4px
solid var(--t3d);background:var(--panel);white-space:pre-wrap} blockquote
footer{color:var(--soft);font-size:.9rem;margin-top:4px}
.walks{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:18px}
article{background:var(--panel);border-radius:10px;padding:14px;min-width:0}.facts{font-size:.88rem;color:var(--soft)}
.yes{color:var(--b)}.no{color:var(--original)}.answer{display:flex;flex-wrap:wrap;gap:6px}
.block{display:inline-flex;flex-wrap:wrap;gap:2px;border:1.5px solid
var(--soft);border-radius:7px;padding:2px;max-width:100%}
.tok{display:inline-flex;flex-direction:column;align-items:center;border-radius:4px;padding:2px 5px;line-height:1.25;
font-family:ui-monospace,monospace;font-size:.86rem;white-space:pre-wrap;overflow-wrap:anywhere;min-width:1.5em} .tok
small{font-size:.66rem;opacity:.85}.legend .tok{margin:0 2px;display:inline-block} details{margin:10px
0;font-size:.9rem}summary{cursor:pointer;color:var(--soft)}
@media(max-width:600px){svg text,svg text.label,svg text.value{font-size:15px}
th,td{padding:7px 5px}th{white-space:normal}.lead{font-size:1.05rem}}
pre{background:var(--panel);padding:12px;border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere}
"""


def _lead(rows: Sequence[Row]) -> str:
    """The effect in a sentence per data set: the original and T3D at the most tokens per step that both were run at."""
    sentences = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        by_speed: dict[tuple, dict[str, Row]] = {}
        for row in rows:
            if row["dataset"] == dataset:
                key = (round(row["tokens_per_step"], 1), -row["block_size"], row["strategy"])
                by_speed.setdefault(key, {})[row["method"]] = row
        both = {key: found for key, found in by_speed.items() if {"original", "t3d"} <= found.keys()}
        if not both:
            continue
        key = max(both)
        original, t3d = (
            f'<b class="m-{method}">{_cell(both[key][method], "accuracy")}</b>' for method in ("original", "t3d")
        )
        speed = "1 token" if key[0] == 1 else f"{key[0]:g} tokens"
        sentences.append(
            f'<p class="lead">At {speed} per step on {escape(dataset)}, the original model answers {original} right, '
            f"T3D {t3d}.</p>"
        )
    return "".join(sentences)


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Sequence[Row],
    training_logs: Mapping[str, str | Path | Sequence[Row]] | None = None,
    walkthrough: Sequence[Row] = (),
) -> Path:
    """Write one self-contained HTML file; returns its path.

    results: rows of results.json. training_logs: by name of the run ("" for the only one), a training log's JSONL file
    or its records. walkthrough: answers to look at, entries on one question side by side, each {title, question,
    ground_truth, prompt, tokens, unmask_step, block_size, offset (prompt length mod block size), correct, steps,
    forwards}. Parts without input are left out.
    """
    colours = "".join(
        ".r{}{{background:{};color:{}}}".format(rank, *step_colour(rank, size))
        for size in [max((entry["block_size"] for entry in walkthrough), default=1)]
        for rank in range(1, size + 1)
    )
    parts = [f"<h1>{escape(title)}</h1>"]
    if results:
        plots = _accuracy_figures(results)
        few = " few" if len(plots) == 1 else ""
        parts += [_lead(results), f'<div class="plots{few}">{"".join(plots)}</div>']
        parts += ["<p class=legend>Bars are 95 % Wilson intervals.</p>", "<h2>Results</h2>", _html_table(results)]
    if walkthrough:
        parts += ["<h2>In which order the tokens appear</h2>", _walkthrough(walkthrough)]
    logs = {
        name: log if isinstance(log, list | tuple) else read_log(log) for name, log in (training_logs or {}).items()
    }
    figures = [figure for name, records in logs.items() for figure in _training_figures(name, records)]
    if figures:
        parts += ["<h2>Training</h2>", f'<div class="plots">{"".join(figures)}</div>']
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{colours}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a training log, one JSON object per line. A last line cut off by a killed run is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


# --- python -m t3d.report DIR... -------------------------------------------------------------------------------------


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's results.json. Raises UserError where there is none or it is not a list of rows."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give folders that hold a results.json")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); write it again") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "method" in row for row in rows):
        raise UserError(f"{path}: expected a list of rows with a method each; write it again")
    return rows


def main(folders: Sequence[str]) -> int:
    if not folders or folders[0] in ("-h", "--help"):
        print("usage: python -m t3d.report DIR...\n\nThe results.json of each folder, as one Markdown table.")
        return 0 if folders else 2
    try:
        named = {folder: read_results(folder) for folder in folders}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    many = len(named) > 1
    print(markdown_table([{"run": folder, **row} if many else row for folder, rows in named.items() for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

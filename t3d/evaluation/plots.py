"""The report's charts. matplotlib draws them as SVG for a page, which gives them its font and text colour."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from t3d.evaluation.results import MEASURES, strategy_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
LEAST = 0.02  # accuracy that a data set's best row needs for a plot


class Chart(NamedTuple):
    """A chart of the page; note: a sentence under it."""

    title: str
    svg: str
    note: str = ""


# Metrics of a training log, in the page's order: title, and how to read it. Others follow under their own names.
TRAINING = {
    "loss": (
        "Loss",
        "It falls and then levels off. If it rises or jumps, lower the learning rate. Rewards have no such loss.",
    ),
    "reward_margin": (
        "Reward margin",
        "Above 0 the student prefers the trajectory more than its reference does. Every refresh of the reference "
        "brings it back to 0, so it stays small while the student learns.",
    ),
    "ddo_accuracy": (
        "DDO accuracy",
        "The share of sequences whose trajectory beats the reference's guess. Right after a refresh no sequence can.",
    ),
    "ddo_real": (
        "DDO, real",
        "It begins at ln 2 times its weight, and every refresh of the reference brings it back there. A flat line is "
        "normal; accuracy at few steps tells whether the student learns.",
    ),
    "ddo_fake": ("DDO, fake", "As DDO, real: ln 2 times its weight at every refresh of the reference."),
    "path": ("Path consistency", "It falls most in the first steps. A flat line from the start means no learning."),
    "cross_entropy": ("Cross-entropy", "It falls towards the teacher's own uncertainty, and not to 0."),
    "certainty_entropy": ("Entropy where right", "It falls as the model becomes certain of tokens that it has right."),
    "correct": ("Right tokens", "The share of tokens that the model has right. It rises."),
    "kl": (
        "KL",
        "To a teacher: it falls, and near 0 the student has the teacher's distributions. With rewards: the "
        "distance to the weights that drew the answers, or to the first ones; it stays small.",
    ),
    "reward": ("Reward", "The mean of a round's answers. It rises; held-out accuracy tells whether that is real."),
    "heldout_accuracy": ("Held-out accuracy", "Questions that no round draws from. It rises with the reward."),
    "drawn_entropy": (
        "Entropy of the drawn tokens",
        "A mean of a round, in nats. It falls slowly. Near 0 all samples of a question are equal: nothing is learnt.",
    ),
    "entropy": ("Entropy in the loss", "Of the tokens that a step learns from, in nats. It falls slowly, as above."),
    "dropped_groups": (
        "Dropped questions",
        "The share whose answers were equally good. Near 1 nothing is learnt: the questions are too hard or too easy.",
    ),
    "clip_share": (
        "Clipped actions",
        "The share whose gradient the clip takes. If it keeps growing, lower the learning rate.",
    ),
    "length": (
        "Length",
        "Tokens of an answer. A fast fall or growth means that the reward can be had without an answer.",
    ),
    "cut_share": ("Cut answers", "The share without an end. It stays near 0; cut answers have no reward."),
    "tokens_per_forward": ("Tokens per forward", "Of a round's answers. It rises only if speed is rewarded."),
    "grad_norm": ("Gradient norm", "Single peaks are normal. Steady growth comes before a loss that diverges."),
}
NOT_DRAWN = {
    "step",
    "epoch",
    "tokens",
    "round",
    "sequences",
    "skipped",
    "stale_steps",
    "tokens_per_second",
    "lr",
    "ddo",
}
NOT_DRAWN |= {f"logp_{model}_{side}" for model in ("student", "reference") for side in ("real", "fake")}

# Middle tones, visible on white and on black.
METHOD_COLOURS = {"original": "#dd6b0d", "t3d": "#2b85ef"}
OTHER_COLOURS = ("#9b6bea", "#2a9a4b", "#d3509b", "#9c8416", "#12a5b5", "#cc3d3d", "#8f5e3b", "#7d8792")
METHOD_NAMES = {"original": "Original", "t3d": "T3D"}
_DASHES = ("-", "--", ":", "-.")
_INK = "#010203"  # a placeholder for the page's text colour
STYLE: dict[Any, Any] = {  # matplotlib's own type lists every key
    "font.size": 12,
    "font.sans-serif": ["DejaVu Sans"],  # used to measure the text; the page then shows it in its own font
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
    "lines.linewidth": 2.0,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "t3d",  # the same input gives the same file
}
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color", "xtick.color", "ytick.color")


def method_name(method: str) -> str:
    """A method as tables and plots write it."""
    return METHOD_NAMES.get(method, method)


def method_colours(rows: Sequence[Row]) -> dict[str, str]:
    """Method -> colour. Two methods have fixed colours; the others get theirs by order of appearance."""
    others = [method for method in dict.fromkeys(row["method"] for row in rows) if method not in METHOD_COLOURS]
    return METHOD_COLOURS | dict(zip(others, cycle(OTHER_COLOURS), strict=False))


def step_colour(rank: int, block_size: int) -> tuple[str, str]:
    """(background, text) of a token unmasked in step `rank` (from 1) of its block. An earlier step is darker."""
    from matplotlib import colormaps, colors

    rgb = colormaps["viridis"]((rank - 1) / max(block_size - 1, 1))[:3]
    return colors.to_hex(rgb), "#fff" if np.dot(rgb, (0.2126, 0.7152, 0.0722)) < 0.55 else "#000"


def speed_charts(rows: Sequence[Row]) -> list[Chart]:
    """One chart per data set, block size and measure (accuracy, or NLL per token of free text) against tokens per step.

    It has one line per method and strategy. Bars are the rows' intervals. A mean over seeds has no interval; its bar is
    one standard error. The autoregressive model, of block size 1, stands in every chart of its data set.
    """
    mark = [row for row in rows if row["method"] == "autoregressive"]
    hopeless = out_of_reach(rows)
    panels: dict[tuple[str, int, str], list[Row]] = {}
    for row in [row for row in rows if row not in mark] or mark:
        for measure in (name for name in MEASURES if name in row):
            if measure == "accuracy" and row["dataset"] in hopeless:
                continue
            panels.setdefault((row["dataset"], row["block_size"], measure), []).append(row)
    for (dataset, _, measure), here in panels.items():
        here += [row for row in mark if row["dataset"] == dataset and measure in row and row not in here]
    draw = partial(partial, _draw_speed, colours=method_colours(rows))
    return [
        _chart(f"{dataset}, block size {size}", draw(rows=here, measure=measure))
        for (dataset, size, measure), here in panels.items()
    ]


def _number(ax: Axes, text: str, place: tuple[float, float], above: bool, colour: str) -> None:
    """A point's number, above the upper end of its interval or below the lower one."""
    side: dict[str, Any] = {"xytext": (0, 4 if above else -4), "va": "bottom" if above else "top", "ha": "center"}
    ax.annotate(text, place, textcoords="offset points", color=colour, weight="bold", **side)


def _draw_speed(ax: Axes, rows: Sequence[Row], measure: str, colours: Mapping[str, str]) -> None:
    scale = 100 if measure == "accuracy" else 1
    rows = sorted(rows, key=lambda row: row["tokens_per_step"])
    lines = sorted({(row["method"], row["strategy"]) for row in rows})
    one_strategy = len({strategy for _, strategy in lines}) == 1
    for i, (method, strategy) in enumerate(lines):
        points = [row for row in rows if (row["method"], row["strategy"]) == (method, strategy)]
        colour = colours[method]
        # Lines are shifted slightly, so that intervals at the same speed do not cover each other.
        x = [row["tokens_per_step"] * 1.04 ** (i - (len(lines) - 1) / 2) for row in points]
        y, low, high = scale * np.array([_with_ends(row, measure) for row in points]).T
        name = method_name(method) + ("" if one_strategy else f", {strategy_label(strategy)}")
        line, mark = ("-", "o") if one_strategy or "static" in strategy else ("--", "D")
        bars = (y - low, high - y)
        ax.errorbar(x, y, bars, color=colour, label=name, ls=line, marker=mark, capsize=4, elinewidth=1.5)
        if (
            len(lines) == 2
        ):  # numbers are readable only with two lines: the higher point's above, the lower point's below
            others = {row["tokens_per_step"]: row[measure] for row in rows if row not in points}
            for row, at, *ends in zip(points, x, low, high, strict=True):
                other = others.get(row["tokens_per_step"])
                above = bool(i) if other in (None, row[measure]) else row[measure] > other
                number = f"{100 * row[measure]:.0f}" if scale > 1 else f"{row[measure]:.2f}"
                _number(ax, number, (at, ends[above]), above, colour)
    speeds = [math.log2(row["tokens_per_step"]) for row in rows]
    powers = range(math.floor(min(speeds)), math.ceil(max(speeds)) + 1)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="tokens per step (more is faster)", xlim=(2 ** (powers[0] - 0.2), 2 ** (powers[-1] + 0.2)))
    ax.set_xticks([2.0**power for power in powers], [f"{2.0**power:g}" for power in powers])
    if measure == "accuracy":
        ax.set(ylabel="right answers", ylim=(-8, 104), yticks=range(0, 101, 20))
        ax.yaxis.set_major_formatter("{x:.0f} %")
    else:
        ax.set(ylabel="NLL per token, nats (less is better)")
    ax.legend(loc="best")


def forward_charts(rows: Sequence[Row]) -> list[Chart]:
    """One chart per data set: accuracy against tokens per forward, with every forward counted.

    A curve joins rows that differ in their speed only. Colours show methods; dashes show block sizes and strategies.
    The curve of a threshold is named with its AUP.
    """
    colours = method_colours(rows)
    panels: dict[str, dict[tuple, list[Row]]] = {}
    for row in rows:
        if {"accuracy", "tokens_per_forward"} <= row.keys():
            curve = (row["method"], row["block_size"], row["strategy"], row.get("temperature"), row.get("run"))
            panels.setdefault(row["dataset"], {}).setdefault(curve, []).append(row)
    draw = partial(partial, _draw_forwards, colours=colours)
    return [
        _chart(f"{name}: accuracy against tokens per forward", draw(curves=list(curves.values())))
        for name, curves in panels.items()
        if name not in out_of_reach(rows)
    ]


def out_of_reach(rows: Sequence[Row]) -> list[str]:
    """The data sets on which no row has 2 % right answers: a plot of them shows nothing."""
    best: dict[str, float] = {}
    for row in rows:
        if "accuracy" in row:
            best[row["dataset"]] = max(row["accuracy"], best.get(row["dataset"], 0.0))
    return [name for name, accuracy in best.items() if accuracy < LEAST]


def _draw_forwards(ax: Axes, curves: Sequence[Sequence[Row]], colours: Mapping[str, str]) -> None:
    kinds = list(dict.fromkeys((curve[0]["block_size"], curve[0]["strategy"]) for curve in curves))
    for curve in curves:
        curve = sorted(curve, key=lambda row: row["tokens_per_forward"])
        row, kind = curve[0], (curve[0]["block_size"], curve[0]["strategy"])
        rest = f", block {kind[0]}, {kind[1].removeprefix('low_confidence_')}" if len(kinds) > 1 else ""
        x = [point["tokens_per_forward"] for point in curve]
        y, low, high = 100 * np.array([_with_ends(point) for point in curve]).T
        look: dict[str, Any] = {
            "color": colours[row["method"]],
            "ls": _DASHES[kinds.index(kind) % len(_DASHES)],
            "marker": "o",
        }
        name = method_name(row["method"]) + rest + (f", AUP {row['aup']:.1f}" if "aup" in row else "")
        ax.errorbar(x, y, (y - low, high - y), label=name, capsize=3, elinewidth=1.2, **look)
    ax.set(xlabel="tokens per forward (more is faster)", ylabel="right answers", ylim=(-8, 104))
    ax.yaxis.set_major_formatter("{x:.0f} %")
    ax.legend(loc="best")


def _with_ends(row: Row, measure: str = "accuracy") -> tuple[float, float, float]:
    """A measure of a row, and the ends of its bar."""
    mean, error = row[measure], row.get(f"{measure}_sem") or 0.0
    low, high = MEASURES[measure]
    return mean, row.get(low, mean - error), row.get(high, mean + error)


def training_charts(logs: Mapping[str, Sequence[Row]]) -> list[Chart]:
    """One chart per metric of the training logs over steps, one line per run, all with the same axis of steps.

    A note says how to read the metric. The vertical axis follows the values: a term that moves little shows how it
    moves.
    """
    keys = dict.fromkeys(key for records in logs.values() for record in records for key in record)
    shown = [key for key in TRAINING if key in keys] + [key for key in keys if key not in {*TRAINING, *NOT_DRAWN}]
    last = max((record["step"] for records in logs.values() for record in records), default=0)
    charts = []
    for key in shown:
        curves = {name: curve for name, records in logs.items() if len(curve := _curve(records, key))}
        if curves and (key == "loss" or not _equals_loss(logs, key)):
            title, note = TRAINING.get(key, (key.replace("_", " "), ""))
            charts.append(_chart(title, partial(_draw_curves, curves=curves, names=list(logs), last=last), note))
    return charts


def _equals_loss(logs: Mapping[str, Sequence[Row]], key: str) -> bool:
    """Whether a metric is the loss itself under another name."""
    pairs = [(record[key], record.get("loss")) for records in logs.values() for record in records if key in record]
    return all(value is not None and loss is not None and math.isclose(value, loss) for value, loss in pairs)


def _curve(records: Sequence[Row], key: str, points: int = 150) -> np.ndarray:
    """(step, value) pairs, at most `points`, each the mean of its neighbourhood: less noise and a smaller file."""
    logged = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    finite = np.array([pair for pair in logged if math.isfinite(pair[1])])
    return np.array([np.mean(part, axis=0) for part in np.array_split(finite, points) if len(part)])


def _draw_curves(ax: Axes, curves: Mapping[str, np.ndarray], names: Sequence[str], last: int) -> None:
    colours = dict(zip(names, cycle((METHOD_COLOURS["t3d"], METHOD_COLOURS["original"], *OTHER_COLOURS)), strict=False))
    for name, curve in curves.items():
        ax.plot(*curve.T, color=colours[name], label=name)
    ax.set(xlabel="optimizer step", xlim=(0, last * 1.02))
    ax.ticklabel_format(axis="y", useOffset=False, style="plain")
    values = np.concatenate([curve[:, 1] for curve in curves.values()])
    if 0 <= values.min() and values.max() > 100 * (middle := float(np.median(values))) > 0:
        ax.set_yscale("symlog", linthresh=middle)  # else a single peak would flatten all the rest
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylim(bottom=0)
    if len(names) > 1:
        ax.legend(loc="best")


def _chart(title: str, draw: Callable[[Axes], None], note: str = "") -> Chart:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.StringIO()
    with rc_context(STYLE | dict.fromkeys(_INKED, _INK)):
        figure = Figure(figsize=(5, 3.3), layout="constrained")
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # One page holds many charts, so every id is made unique.
    own = "c" + hashlib.sha1((title + svg).encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return Chart(title, svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1), note)


def loss_plot(*axes: Axes, models: Mapping[str, Mapping], styles: Mapping[str, dict]) -> None:
    """The three panels of an analysis, several models in each; bars are standard errors over answers."""
    panels = (
        ("per_block", "tokens_per_step", "correlation", "tokens per step", "correlation lost, nats a block"),
        ("states", "visible", "cross_entropy", "tokens of the block visible", "cross-entropy, nats a masked token"),
        ("states", "visible", "entropy", "tokens of the block visible", "entropy, nats a masked token"),
    )
    for ax, (table, x, y, x_label, y_label) in zip(axes, panels, strict=True):
        for name, model in models.items():
            rows = sorted(model[table], key=lambda row: row[x])
            if not rows:
                continue
            at, value, error = ([row[key] for row in rows] for key in (x, y, f"{y}_error"))
            bars = None if None in error else error  # a single answer has no error
            ax.errorbar(at, value, bars, label=name, capsize=2.5, elinewidth=1.2, ms=5, **styles[name])
            ax.set_xticks(at)
        ax.set(xlabel=x_label, ylabel=y_label)
        ax.set_ylim(bottom=0)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3)

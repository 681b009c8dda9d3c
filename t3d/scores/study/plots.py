"""The plots of a study, as PNG: accuracy against speed, few-step against full-step accuracy, the ablations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t3d.scores.plots import STYLE, method_colours
from t3d.scores.study.estimates import Run, at_speed, estimate, family, fast_speeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Runs = Mapping[str, Sequence[Run]]  # method -> its seeds
_DASHES = ("-", "--", ":", "-.")
_MARKS = ("o", "D", "s", "^")


def save(path: Path, size: tuple[float, float], draw: Callable[[Axes], None]) -> None:
    """One chart on white, with the reports' style; the same figures give the same file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE | {"font.size": 11, "legend.labelcolor": "#222222"}):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        draw(figure.add_subplot())
        figure.savefig(path, dpi=150, metadata={"Software": None})


def looks(names: Sequence[str]) -> dict[str, dict]:
    """A colour for each method, from its place among the names; its variants share it, with other dashes and marks."""
    colours = method_colours([{"method": family(name)} for name in names])
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family(name), []).append(name)
    found = {}
    for name in names:
        variant = families[family(name)].index(name) % len(_MARKS)
        found[name] = {"color": colours[family(name)], "ls": _DASHES[variant], "marker": _MARKS[variant]}
        found[name] |= {"mfc": "white"} if variant else {}
    return found


def accuracy_plot(ax: Axes, runs: Runs, styles: Mapping[str, dict], split: str, block: int) -> None:
    """Accuracy against tokens per step, one line a method. Bars: one standard error, or a single seed's interval."""
    speeds = [1.0, *fast_speeds(block)]
    for i, (name, of_method) in enumerate(runs.items()):
        points = [estimate(of_method, at_speed(split, speed)) for speed in speeds]
        # Lines stand slightly apart, so that bars at the same speed do not cover each other.
        x = [speed * 1.15 ** ((i + 0.5) / len(runs) - 0.5) for speed in speeds]
        bars = list(zip(*(point.bars() for point in points), strict=True))
        y = [point.mean for point in points]
        ax.errorbar(x, y, bars, label=name, capsize=2.5, elinewidth=1.2, ms=5.5, **styles[name])
    ax.set_xscale("log", base=2)
    ax.set_xticks(speeds, [f"{speed:g}" for speed in speeds])
    ax.set(xlabel="tokens per step", ylabel=f"right answers, {split}", ylim=(-2, 102))
    ax.yaxis.set_major_formatter("{x:.0f} %")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3)


def both_plot(ax: Axes, runs: Runs, styles: Mapping[str, dict], split: str, block: int) -> None:
    """Few-step average against full-step accuracy: who keeps both stands at the top right. Logit axes: the difference
    of 95 and 97 % counts for as much as that of 50 and 62 %.
    """
    names, boxes = list(runs), []
    for name in names:
        few = estimate(runs[name], at_speed(split, *fast_speeds(block)))
        full = estimate(runs[name], at_speed(split, 1.0))
        (x, *along), (y, *up) = (
            _shares(one.mean, one.mean - one.bars()[0], one.mean + one.bars()[1]) for one in (few, full)
        )
        bars = [[[abs(end - middle)] for end in ends] for middle, ends in ((y, up), (x, along))]
        ax.errorbar(x, y, *bars, capsize=2.5, elinewidth=1.0, ms=7, **styles[name] | {"ls": "none"})
        boxes.append(((x, y), (along[0], up[0]), (along[1], up[1])))
    speeds = ", ".join(f"{speed:g}" for speed in fast_speeds(block))
    for axis, scale, label in (
        (ax.xaxis, ax.set_xscale, f"few-step accuracy: mean over {speeds} tokens per step"),
        (ax.yaxis, ax.set_yscale, "full-step accuracy: 1 token per step"),
    ):
        scale("logit")
        axis.set_label_text(label)
        axis.set_ticks(_TICKS, [f"{100 * tick:g} %" for tick in _TICKS])
        axis.set_ticks([], minor=True)
    for side, limits in ((0, ax.set_xlim), (1, ax.set_ylim)):
        odds = [math.log(end[side] / (1 - end[side])) for _, *ends in boxes for end in ends]
        ends = min(odds) - 0.4, max(odds) + 0.4
        limits(*(1 / (1 + math.exp(-end)) for end in ends))
    ax.grid(axis="both")
    _label(ax, names, boxes, [styles[name]["color"] for name in names])


_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


def _shares(*percent: float) -> list[float]:
    """As shares within the open interval that a logit takes."""
    return [min(max(value / 100, 0.004), 0.996) for value in percent]


def _label(ax: Axes, names: Sequence[str], boxes: Sequence[tuple], colours: Sequence[str]) -> None:
    """A name at each point, at the nearest place where it covers neither a point, nor a bar, nor another name.

    boxes: for each point (where it is, lower left and upper right end of its bars).
    """
    from matplotlib.transforms import Bbox

    ax.figure.draw_without_rendering()  # settles the layout, so that places on the canvas are final
    taken = []
    for (x, y), low, high in boxes:  # each bar apart: the rectangle around both is mostly empty
        for ends in ([(low[0], y), (high[0], y)], [(x, low[1]), (x, high[1])]):
            taken.append(Bbox(ax.transData.transform(ends)).padded(6))
    frame = ax.get_window_extent()
    sides = [(9, 0, "left"), (-9, 0, "right"), (0, 13, "center"), (0, -13, "center")]
    for reach in (16, 30, 44, 58):
        sides += [(dx, dy, ha) for dy in (reach, -reach) for dx, ha in ((12, "left"), (-12, "right"), (0, "center"))]
    longest_first = sorted(zip(names, boxes, colours, strict=True), key=lambda one: -len(one[0]))
    for name, (point, *_), colour in longest_first:
        look = {"color": colour, "fontsize": 10, "va": "center", "in_layout": False, "textcoords": "offset points"}
        places = []
        for rank, (dx, dy, ha) in enumerate(sides):
            trial = ax.annotate(name, point, (dx, dy), ha=ha, **look)
            box = trial.get_window_extent()
            trial.remove()
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            places.append((sum(box.overlaps(other) for other in taken) + outside, rank, box))
        _, rank, box = min(places, key=lambda place: place[:2])
        dx, dy, ha = sides[rank]
        line = {"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 0} if abs(dy) > 13 else None
        ax.annotate(name, point, (dx, dy), ha=ha, arrowprops=line, **look)
        taken.append(box)


def ablation_plot(ax: Axes, runs: Runs, split: str, block: int) -> None:
    """A line of dots for each row, from the first at the top: accuracy at every speed, the darker the faster."""
    from matplotlib import colormaps

    speeds = [1.0, *fast_speeds(block)]
    for rank, speed in enumerate(speeds):
        points = [estimate(of_method, at_speed(split, speed)) for of_method in runs.values()]
        bars = list(zip(*(point.bars() for point in points), strict=True))
        colour = colormaps["viridis"](0.85 - 0.75 * rank / (len(speeds) - 1))
        x, look = [point.mean for point in points], {"ls": "none", "marker": "o", "ms": 7}
        ax.errorbar(x, range(len(x)), xerr=bars, label=f"{speed:g}", color=colour, capsize=2.5, elinewidth=1.2, **look)
    ax.set_yticks(range(len(runs)), list(runs))
    for tick, name in zip(ax.get_yticklabels(), runs, strict=True):
        tick.set_fontweight("bold" if family(name) == name else "normal")
    ax.invert_yaxis()
    ax.set(xlabel=f"right answers, {split}", xlim=(-2, 102))
    ax.xaxis.set_major_formatter("{x:.0f} %")
    ax.grid(axis="both")
    ax.legend(title="tokens per step", ncols=len(speeds), loc="lower left", bbox_to_anchor=(0, 1.0))

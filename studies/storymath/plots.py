"""The plots of a study, as PNG: accuracy against speed, the ablations, the loss of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.storymath.estimates import Run, at_speed, estimate, family, fast_speeds
from t3d.evaluation.plots import STYLE, method_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Runs = Mapping[str, Sequence[Run]]  # method -> its seeds
_DASHES = ("-", "--", ":", "-.")
_MARKS = ("o", "D", "s", "^")


def save(path: Path, size: tuple[float, float], draw: Callable[..., None], panels: int = 1) -> None:
    """Save a chart of some panels on white, in the reports' style. The same figures give the same file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE | {"font.size": 11, "legend.labelcolor": "#222222"}):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        draw(*figure.subplots(1, panels, squeeze=False)[0])
        figure.savefig(path, dpi=150, metadata={"Software": None})


def looks(names: Sequence[str]) -> dict[str, dict]:
    """A colour for each method, from its place among the names. Its variants share it, with other dashes and marks."""
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
    """Accuracy against tokens per step, one line per method. Bars: one standard error, or a single seed's interval."""
    speeds = [1.0, *fast_speeds(block)]
    for i, (name, of_method) in enumerate(runs.items()):
        points = [estimate(of_method, at_speed(split, speed)) for speed in speeds]
        # Lines are shifted slightly, so that bars at the same speed do not cover each other.
        x = [speed * 1.15 ** ((i + 0.5) / len(runs) - 0.5) for speed in speeds]
        bars = list(zip(*(point.bars() for point in points), strict=True))
        y = [point.mean for point in points]
        ax.errorbar(x, y, bars, label=name, capsize=2.5, elinewidth=1.2, ms=5.5, **styles[name])
    ax.set_xscale("log", base=2)
    ax.set_xticks(speeds, [f"{speed:g}" for speed in speeds])
    ax.set(xlabel="tokens per step", ylabel=f"right answers, {split}", ylim=(-2, 102))
    ax.yaxis.set_major_formatter("{x:.0f} %")
    drawn: list[Any] = ax.containers
    lines = sorted(drawn, key=lambda bars: -bars.lines[0].get_ydata()[-1])  # as they end, from the top
    ax.legend(handles=lines, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3)


def ablation_plot(ax: Axes, runs: Runs, split: str, block: int) -> None:
    """A line of dots for each row, the first at the top: accuracy at every speed; a faster speed is darker."""
    from matplotlib import colormaps

    speeds = [1.0, *fast_speeds(block)]
    for rank, speed in enumerate(speeds):
        points = [estimate(of_method, at_speed(split, speed)) for of_method in runs.values()]
        bars = list(zip(*(point.bars() for point in points), strict=True))
        colour = colormaps["viridis"](0.85 - 0.75 * rank / (len(speeds) - 1))
        x = [point.mean for point in points]
        look: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 7}
        ax.errorbar(x, range(len(x)), xerr=bars, label=f"{speed:g}", color=colour, capsize=2.5, elinewidth=1.2, **look)
    ax.set_yticks(range(len(runs)), list(runs))
    for tick, name in zip(ax.get_yticklabels(), runs, strict=True):
        tick.set_fontweight("bold" if family(name) == name else "normal")
    ax.invert_yaxis()
    ax.set(xlabel=f"right answers, {split}")
    ax.xaxis.set_major_formatter("{x:.0f} %")
    ax.grid(axis="both")
    ax.legend(title="tokens per step", ncols=len(speeds), loc="lower left", bbox_to_anchor=(0, 1.0))

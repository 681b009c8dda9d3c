"""docs/SMOLLM.md: the study's figures as tables and plots. No sentence contains a result that is typed by hand."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from studies.smollm.stages import STUDENTS
from studies.smollm.steps import clock
from studies.storymath.plots import save
from t3d.common.errors import UserError
from t3d.common.jsonfiles import atomic_write
from t3d.evaluation.plots import method_colours
from t3d.evaluation.results import strategy_label
from t3d.evaluation.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
STATIC = "low_confidence_static"
ORDER = ("autoregressive", "teacher", *STUDENTS)
KEEPS, LOSES = 0.85, 1 / 3  # the study's targets: share of accuracy that stays; share of the teacher's loss in NLL
MEASURE = {"storymath": "accuracy", "text": "nll"}


def write_page(results: Path, page: Path) -> None:
    """Write the page from all figures in `results`. The plots go there too. UserError if there are none."""
    files = sorted(results.glob("*.json"))
    if not files:
        raise UserError(f"{results}: no figures yet; run `python -m studies.smollm` without --page first", str(results))
    folder = Path(os.path.relpath(results, page.parent)).as_posix()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    sections = [section(json.loads(file.read_text()), file.stem, results, folder) for file in files]
    text = environment.get_template("smollm.md.j2").render(sections=sections)
    with atomic_write(page) as file:
        file.write(text)
    print(f"{page}: {len(files)} of the study's parts", flush=True)


def section(figures: Mapping[str, Any], stem: str, results: Path, folder: str) -> dict[str, Any]:
    """The values of a part's section. Draws its plots."""
    measure, rows = MEASURE[figures["part"]], mean_rows(figures["rows"])
    colours = method_colours(rows)
    save(results / f"{stem}.png", (7.5, 4.2), partial(draw_speed, rows=rows, measure=measure, colours=colours))
    curves = {name: points for name, points in figures["curves"].items() if points}
    save(results / f"{stem}-loss.png", (7.5, 3.4), partial(draw_curves, curves=curves))
    return {
        **{key: figures[key] for key in ("part", "size", "settings")},
        "image": f"{folder}/{stem}.png",
        "losses": f"{folder}/{stem}-loss.png",
        "table": table(rows, measure),
        "kept": kept(rows, measure),
        "stages": [(s["name"], clock(s["seconds"])) for s in figures["stages"]],
        "total": clock(sum(s["seconds"] for s in figures["stages"])),
        "commands": [shlex.join(s["command"]) for s in figures["stages"]],
        "examples": figures["examples"],
        "figures": f"docs/results/smollm/{stem}.json",
    }


def mean_rows(rows: Sequence[Row]) -> list[Row]:
    """Means over seeds, in the order of methods and speeds. The interval of a single seed stays."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        speed = row["tokens_per_step"] if row["strategy"] == STATIC else float("inf")  # the dynamic one is measured
        place = ORDER.index(row["method"]) if row["method"] in ORDER else len(ORDER)
        groups.setdefault((place, row["method"], speed, row["strategy"]), []).append(row)
    return [_mean(some) for _, some in sorted(groups.items())]


def _mean(rows: Sequence[Row]) -> Row:
    numbers = {key for key, value in rows[0].items() if isinstance(value, int | float)}
    mean = {key: fmean(row[key] for row in rows) if key in numbers else value for key, value in rows[0].items()}
    if len(rows) > 1:
        mean = {key: value for key, value in mean.items() if not key.endswith(("_low", "_high"))}
    return mean | {"seeds": len(rows), "n": sum(row["n"] for row in rows)}


def table(rows: Sequence[Row], measure: str) -> str:
    """Every method at every speed."""
    heads = {"tokens_per_forward": "tokens/forward", "mean_length": "tokens/answer"}
    if measure == "nll":
        heads |= {"distinct_2": "distinct 2-grams", "repetition": "repeated 4-grams"}
    first = "right answers, %" if measure == "accuracy" else "NLL per token, nats"
    cells = [
        [row["method"], speed_of(row), told(row, measure), *(f"{row[key]:.2f}" for key in heads), str(row["n"])]
        for row in rows
    ]
    columns = ["model", "tokens/step", first, *heads.values(), "answers"]
    return Table("", columns, cells, text=columns[:1]).markdown()


def speed_of(row: Row) -> str:
    """Tokens per step; with the strategy where it is not the static one."""
    speed = f"{row['tokens_per_step']:.2f}".rstrip("0").rstrip(".")
    return speed if row["strategy"] == STATIC else f"{speed} ({strategy_label(row['strategy'])})"


def told(row: Row, measure: str) -> str:
    """A measure, with the 95 % interval of a single seed."""
    scale, digits, low = (100, 1, "ci") if measure == "accuracy" else (1, 2, "nll")
    value = f"{scale * row[measure]:.{digits}f}"
    if f"{low}_low" not in row:
        return value
    return f"{value} ({scale * row[f'{low}_low']:.{digits}f}–{scale * row[f'{low}_high']:.{digits}f})"


def kept(rows: Sequence[Row], measure: str) -> list[str]:
    """Sentences: the share of each model that stays at 4 tokens per step, against the study's target.

    Text that is likely because it repeats itself does not reach it.
    """
    of_speed = {(row["method"], row["tokens_per_step"]): row for row in rows if row["strategy"] == STATIC}
    found = {key: row[measure] for key, row in of_speed.items()}
    sentences = []
    for name in ORDER[1:]:
        one, four = found.get((name, 1.0)), found.get((name, 4.0))
        if one is None or four is None:
            continue
        if measure == "accuracy":
            share = f"{four / one:.2f}" if one else "no share, as it is right nowhere,"
            reached = one and four / one >= KEEPS
            sentence = f"`{name}` keeps {share} of its own full-step accuracy at 4 tokens per step (target {KEEPS})"
            if name != "teacher" and (mark := found.get(("teacher", 1.0))):
                sentence += f", which is {four / mark:.2f} of the teacher's"
        elif name == "teacher":
            sentences.append(f"`teacher` loses {four - one:.2f} nats per token at 4 tokens per step.")
            continue
        else:
            full, fast = found["teacher", 1.0], found["teacher", 4.0]
            share = f"{(four - full) / (fast - full):.2f}" if fast > full else "no share"
            repeats, allowed = of_speed[name, 4.0]["repetition"], of_speed["teacher", 1.0]["repetition"]
            reached = fast > full and (four - full) / (fast - full) <= LOSES and repeats <= allowed
            sentence = (
                f"`{name}` loses {share} of the teacher's loss against its full steps (target {LOSES:.2f}). Of its "
                f"groups of four tokens {100 * repeats:.0f} % repeat (target {100 * allowed:.0f} %, the teacher's)"
            )
        sentences.append(f"{sentence}: {'reached' if reached else 'not reached'}.")
    return sentences


def draw_speed(ax: Axes, rows: Sequence[Row], measure: str, colours: Mapping[str, str]) -> None:
    """The measure against tokens per forward. Lines join the static speeds; a diamond is dynamic decoding."""
    scale = 100 if measure == "accuracy" else 1
    for name in dict.fromkeys(row["method"] for row in rows):
        for strategy in dict.fromkeys(row["strategy"] for row in rows if row["method"] == name):
            some = [row for row in rows if (row["method"], row["strategy"]) == (name, strategy)]
            x, y = [row["tokens_per_forward"] for row in some], [scale * row[measure] for row in some]
            look: dict[str, Any] = {"ls": "-", "marker": "o"} if strategy == STATIC else {"ls": "", "marker": "D"}
            label = name if strategy == STATIC else f"{name}, {strategy_label(strategy)}"
            ax.plot(x, y, label=label, color=colours[name], ms=6, **look)
    ax.set(xlabel="tokens per forward (more is faster)")
    if measure == "accuracy":
        ax.set(ylabel="right answers", ylim=(-2, 102))
        ax.yaxis.set_major_formatter("{x:.0f} %")
    else:
        ax.set(ylabel="NLL per token, nats (less is better)")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_curves(ax: Axes, curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The loss of every training over its share of the steps. Losses of two objectives are not comparable."""
    for name, points in curves.items():
        last = points[-1][0]
        ax.plot([step / last for step, _ in points], [loss for _, loss in points], label=f"{name}, {last} steps")
    ax.set(xlabel="share of the training", ylabel="loss")
    if curves:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

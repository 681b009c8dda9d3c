"""docs/RESULTS.md: every method on the embedded benchmark, from the figures of finished runs, beside the paper's own.

No result stands in a sentence here: all are computed from the figures, or read from docs/results/paper.json.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from t3d.data.jsonfiles import atomic_write
from t3d.errors import UserError
from t3d.paths import ROOT
from t3d.scores.study import paper, plots
from t3d.scores.study.estimates import (
    Estimate,
    Pick,
    Run,
    at_speed,
    best,
    by_method,
    difference,
    dynamic,
    estimate,
    family,
    fast_speeds,
    signed,
)
from t3d.scores.tables import Table

# name -> (training config, None: the teacher as it is; overrides of training, of rollouts, of decoding)
Methods = Mapping[str, tuple[str | None, Sequence[str], Sequence[str], Sequence[str]]]
Runs = dict[str, list[Run]]

PAPER = ROOT / "docs" / "results" / "paper.json"
TEACHER_BLOCK = 4


def write_page(
    figures: Path, analyses: Path, page: Path, methods: Methods, ablations: Methods, splits: tuple[str, str], batch: int
) -> None:
    """Write the page from all runs below `figures`, with the plots beside them, and from what t3d.analysis left in
    `analyses`.

    splits: the test set and the harder one; batch: sequences of an optimizer step.
    """
    runs = [json.loads(path.read_text()) | {"file": path.name} for path in sorted(figures.glob("*.json"))]
    if not runs:
        raise UserError(f"{figures} has no figures yet; run `python tables.py` without --page first")
    folder = Path(os.path.relpath(figures, page.parent)).as_posix()
    parts = [introduction(methods, splits[0]), commands(runs, figures), settings(runs, methods | ablations, batch)]
    for block in sorted({run["block_size"] for run in runs if run["method"] in methods | ablations}):
        drawn = draw(runs, block, methods, ablations, splits[0], figures)
        images = {name: f"![{told}]({folder}/{file})" for name, (file, told) in drawn.items()}
        parts.append(block_part(runs, block, methods, ablations, splits, images))
    if found := sorted(analyses.glob("*.json")):
        parts.append(step_losses(found, page))
    parts.append(paper.section(json.loads(PAPER.read_text())))
    with atomic_write(page) as file:
        file.write("\n\n".join(parts) + "\n")
    print(f"{page}: {len(runs)} runs")


# ---------------------------------------------------------------------------------------------------------------------
# What it is, and how it was made


def introduction(methods: Methods, test: str) -> str:
    name = test.partition("_")[0]
    edlm = "" if any(family(method) == "edlm" for method in methods) else " EDLM is not among the rows."
    return f"""# Results on the embedded benchmark

Written by `python tables.py` from the figures that each finished run left; no result below is typed by hand.

**What this is.** The methods of the paper's tables, and what came after, from one teacher, with the same questions,
optimizer steps and batch, scored on {name}: short generated word problems, and a teacher small enough to train on a
laptop. It shows what drawing several tokens at once breaks, and what each method repairs.

**What this is not.** {name} is not MATH500 and its teacher is not SDAR: neither the size of a difference nor the order
of the methods is a measurement on a real model. [What the paper reports](#what-the-paper-reports) for SDAR-1.7B-Chat
and SDAR-4B-Chat stands at the end; the two are no columns of one table.

Equal steps are not equal cost: dParallel makes two forwards a training step, T3D one of the student and one of its
reference, the others one; on-policy rows also decode. EDLM trains nothing and pays when it decodes: 1 +
energy_candidates forwards a step, at a temperature of its own (tokens/forward). ReDi with an all-mask x_T is SFT on
the teacher's own text.{edlm}

**How to read it.** Accuracies in per cent. `a ± b`: mean over seeds and its standard error. `a (b–c)`: one seed, with
the 95 % interval over its questions; a mean over speeds has none. **Bold**: the best of its column, where it is above
the next by more than the standard error of their difference (of a single seed: over its questions). gain: over the
teacher as it is, in points and in per cent of it. In tables of differences, which pair seeds, `a ± b` is the mean and
its 95 % interval (Student's t), more being better than the other method; one pair has none. All seeds answer the same
questions: ± over seeds says how training and sampling vary, not what other questions would give. Error bars: one
standard error, or the interval of a single seed."""


def commands(runs: Sequence[Run], figures: Path) -> str:
    """How to make it all, the page alone, and one run again."""
    run = next((run for run in runs if run["method"] == "t3d"), runs[0])
    recipe = re.search(r"^tables:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    lines = [line.strip().replace("$(PY)", "python") for line in recipe[1].splitlines()]
    shown, stem = os.path.relpath(figures, ROOT), Path(run["file"]).stem
    where = f"--blocks {run['block_size']} --seeds {run['seed']}"
    return "\n".join(
        [
            "## The commands\n",
            "```bash",
            f"make tables   # all without figures (rm -rf {shown} experiments/tables: from nothing). It runs:",
            *lines,
            "",
            f"rm -rf {shown}/{run['file']} experiments/tables/{stem}   # one run again, from its training on",
            f'python tables.py --methods "{run["method"]}" {where}',
            "",
            "python tables.py --page   # this page and its plots alone, from the figures",
            "```\n",
            "Each command that a run consists of is printed when it starts, and can be given by hand.",
        ]
    )


def settings(runs: Sequence[Run], named: Methods, batch: int) -> str:
    """One line a method: its config, what differs from it, and the budget that its runs had."""
    rows = []
    for name, (config, *stages) in named.items():
        found = [run for run in runs if run["method"] == name]
        if not found:
            continue
        changed = [
            f"{stage}: " * (stage != "training") + " ".join(f"`{override}`" for override in overrides)
            for stage, overrides in zip(("training", "rollouts", "decoding"), stages, strict=True)
            if overrides
        ]
        told = "; ".join([f"`{config}`" if config else "the teacher as it is", *changed])
        steps, questions = (_values(run[key] for run in found) for key in ("steps", "rollouts"))
        budget = [steps, learning_rate(config, stages[0]), questions, _tokens(found)] if config else [""] * 4
        rows.append([name, told, *budget])
    columns = ["method", "config; overrides", "steps", "learning rate", "questions", "tokens seen"]
    told = ["## Settings", Table("", columns, rows, text=columns[:2]).without_empty("tokens seen").markdown()]
    told.append(
        f"Every optimizer step takes {batch} sequences. questions: those that training draws from; the answers are the "
        "teacher's own at full steps, for SFT the worked solutions; with training.refresh_rollouts, after so many "
        "steps the student's, or its teacher's completions of them. tokens seen: in training, clean and noisy copies. "
        f"{temperatures()}"
    )
    if strange := sorted({run["method"] for run in runs} - set(named)):
        told.append(f"Left out, for tables.py does not name them any more: {', '.join(strange)}.")
    return "\n\n".join(told)


def learning_rate(config: str, overrides: Sequence[str]) -> str:
    from t3d.config import TrainConfig, load

    return f"{load(TrainConfig, [f'config={config}', *overrides]).optimizer.params.learning_rate:g}"


def temperatures() -> str:
    """At which temperature answers and rollouts are drawn, as the configs say."""
    from t3d.config import EvalConfig, SampleConfig, load

    files = {"Answers": (EvalConfig, "configs/demo/eval.yaml"), "rollouts": (SampleConfig, "configs/demo/sample.yaml")}
    told = [
        f"{what} are drawn at temperature {load(schema, [f'config={file}']).rollout.temperature:g} (`{file}`)"
        for what, (schema, file) in files.items()
    ]
    return ", ".join(told) + ", where a row's overrides say nothing else."


def _tokens(runs: Sequence[Run]) -> str:
    """Mean over the runs that say it, in millions; apart for each block size where there are several."""
    runs = [run for run in runs if run.get("tokens")]
    blocks, told = sorted({run["block_size"] for run in runs}), []
    for block in blocks:
        counts = [run["tokens"] for run in runs if run["block_size"] == block]
        told.append(f"{sum(counts) / len(counts) / 1e6:.2f} M" + (f" (block {block})" if len(blocks) > 1 else ""))
    return ", ".join(told)


def _values(values) -> str:
    return ", ".join(map(str, sorted(set(values))))


def step_losses(files: Sequence[Path], page: Path) -> str:
    """Factorisation error, risk and entropy of each student and its teacher, as t3d.analysis measured them."""
    rows: dict[tuple[int, str], list[str]] = {}
    speeds, images = set(), []
    measured = [(path, json.loads(path.read_text())) for path in files]
    for _, found in measured:
        speeds |= {row["tokens_per_step"] for row in found["teacher"]["per_block"]}
    for path, found in measured:
        for who in ("teacher", "student"):
            model = found[who]
            name = "original" if who == "teacher" else path.stem.partition("-block")[0]
            loss = {row["tokens_per_step"]: row for row in model["per_block"]}
            cells = [
                f"{loss[s]['correlation']:.3f} ± {loss[s]['correlation_error']:.3f}" if s in loss else ""
                for s in sorted(speeds)
            ]
            states = model["states"]
            cells += [f"{sum(row[key] for row in states) / len(states):.3f}" for key in ("risk", "entropy")]
            rows.setdefault((model["block_size"], name), [str(model["block_size"]), name, *cells])
        plot = Path(os.path.relpath(path.with_suffix(".svg"), page.parent)).as_posix()
        images.append(f"![Teacher and {path.stem}: correlation, risk, entropy]({plot})")
    columns = ["block", "model", *(f"{speed} tokens/step" for speed in sorted(speeds)), "risk", "entropy"]
    table = Table("", columns, [rows[key] for key in sorted(rows, key=lambda key: key[0])], text=["model"])
    return "\n\n".join(
        [
            "## What a step loses",
            "`python -m t3d.analysis`: the correlation that a step cannot express as it draws its tokens at once (the "
            "factorisation error of the paper's Theorem 4.5), in nats a block at each speed, mean over answers and its "
            "standard error; and risk (Proposition 4.3) and entropy, in nats a masked token, means over how much of a "
            "block is visible. All at states of the teacher's own answers to questions that no run learns from.",
            table.markdown(),
            *images,
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# One block size


def block_part(
    runs: Sequence[Run],
    block: int,
    methods: Methods,
    ablations: Methods,
    splits: tuple[str, str],
    images: Mapping[str, str],
) -> str:
    test, hard = splits
    main = by_method(runs, block, list(methods))
    every = main | by_method(runs, block, list(ablations))
    fast = fast_speeds(block)
    parts = [f"## Block {block}", " ".join([*seeds_told(main or every), *absent_told(every, methods)])]
    if block != TEACHER_BLOCK:
        parts.append(f"The teacher of this block size is that of block {TEACHER_BLOCK}, converted by SFT.")
    if main:
        parts += [f"### Few-step decoding, {test}", images["accuracy"], few_step(main, test, fast)]
        parts += ["### Full-step decoding: what is kept", full_step(main, test), images["both"]]
        parts += ["### Dynamic decoding, threshold 0.9", dynamic_decoding(main)]
        parts += [f"### The harder split, {hard}", few_step(main, hard, [1.0, *fast], gain=False)]
    if "t3d" in main and len(main) > 1:
        others = {name: of_method for name, of_method in main.items() if name != "t3d"}
        table = differences(others, lambda name: main["t3d"], test, fast)
        parts += ["### Against T3D", table]
    groups = ablation_groups(main, by_method(runs, block, list(ablations)))
    if groups:
        bases = {name: groups.get(family(name)) for name in groups}
        parts += ["### Ablations", images["ablations"], few_step(groups, test, [1.0, *fast], gain=False)]
        varied = {name: of_method for name, of_method in groups.items() if bases[name] and family(name) != name}
        if varied:
            table = differences(varied, lambda name: groups[family(name)], test, fast)
            parts += ["Each against the method that it varies:", table]
    return "\n\n".join(parts)


def seeds_told(runs: Runs) -> list[str]:
    """Seeds and problems, and which seeds a method lacks."""
    every = [run for of_method in runs.values() for run in of_method]
    seeds = {run["seed"] for run in every}
    problems = _values(row["n"] for run in every for row in run["rows"])
    lacking = {name: seeds - {run["seed"] for run in of_method} for name, of_method in runs.items()}
    told = [f"{name} (seed {_values(lacks)})" for name, lacks in lacking.items() if lacks]
    missing = [f"Not run: {'; '.join(told)}."] if told else []
    return [f"Seeds: {_values(seeds)}; problems per evaluation: {problems}.", *missing]


def absent_told(runs: Runs, methods: Methods) -> list[str]:
    absent = [name for name in methods if name not in runs]
    return [f"Without any run: {'; '.join(absent)}."] if absent else []


def few_step(runs: Runs, split: str, speeds: Sequence[float], gain: bool = True) -> str:
    """Accuracy at each speed, their average, and the gain over the teacher."""
    picks = [at_speed(split, speed) for speed in speeds]
    columns = [[estimate(of_method, pick) for of_method in runs.values()] for pick in picks]
    averages = [estimate(of_method, at_speed(split, *speeds)) for of_method in runs.values()]
    base = dict(zip(runs, averages, strict=True)).get("original") if gain else None
    gains = []
    for name, average in zip(runs, averages, strict=True):
        more = average.mean - base.mean if base else 0.0
        share = f" ({100 * more / base.mean:+.0f} %)" if base and base.mean else ""
        gains.append(signed(more) + share if base and name != "original" else "")
    yields = [estimate(of_method, picks[-1], "tokens_per_forward").mean for of_method in runs.values()]
    cells = [*map(_bold, columns), _bold(averages), gains, [f"{value:.2f}" for value in yields]]
    heads = [*map(_head, speeds), "average", "gain", f"tokens/forward at {speeds[-1]:g}"]
    return _table(runs, heads, cells).without_empty("gain").markdown()


def full_step(runs: Runs, split: str) -> str:
    """Accuracy at one token per step, and what is lost of the teacher's."""
    found = [estimate(of_method, at_speed(split, 1.0)) for of_method in runs.values()]
    base = dict(zip(runs, found, strict=True)).get("original")
    lost = [
        "" if base is None or name == "original" else signed(one.mean - base.mean)
        for name, one in zip(runs, found, strict=True)
    ]
    table = _table(runs, [_head(1), "vs teacher"], [_bold(found), lost])
    return table.without_empty("vs teacher").markdown()


def dynamic_decoding(runs: Runs) -> str:
    columns = {
        "accuracy": ("accuracy", 1),
        "tokens/step": ("measured_tokens_per_step", 2),
        "tokens/forward": ("tokens_per_forward", 2),
        "tokens/answer": ("mean_length", 1),
    }
    cells = []
    for key, digits in columns.values():
        found = [estimate(of_method, dynamic, key) for of_method in runs.values()]
        cells.append([one.text(digits) for one in found] if key == "mean_length" else _bold(found, digits))
    return _table(runs, list(columns), cells).markdown()


def differences(runs: Runs, other: Callable[[str], list[Run]], split: str, fast: Sequence[float]) -> str:
    """Each method less another, at every speed and for the few-step average."""
    picks: dict[str, Pick] = {_head(speed): at_speed(split, speed) for speed in [1.0, *fast]}
    picks["few-step average"] = at_speed(split, *fast)
    rows = []
    for name, of_method in runs.items():
        found = [difference(of_method, other(name), pick) for pick in picks.values()]
        pairs = found[0].pairs if found[0] else 0
        rows.append([name, *("" if one is None else one.text() for one in found), str(pairs)])
    return Table("", ["method", *picks, "pairs"], rows, text=["method"]).markdown()


def ablation_groups(main: Runs, varied: Runs) -> Runs:
    """Each varied method, followed by its variants; variants of what has no run of its own stand alone."""
    groups: Runs = {}
    for base in dict.fromkeys(map(family, varied)):
        groups |= {base: main[base]} if base in main else {}
        groups |= {name: of_method for name, of_method in varied.items() if family(name) == base}
    return groups


def _head(speed: float) -> str:
    return f"{speed:g} token{'s' * (speed != 1)}/step"


def _table(runs: Runs, heads: Sequence[str], columns: Sequence[Sequence[str]]) -> Table:
    seeds = [str(len(of_method)) for of_method in runs.values()]
    lines = zip(runs, *columns, seeds, strict=True)
    return Table("", ["method", *heads, "seeds"], [list(line) for line in lines], text=["method"])


def _bold(column: Sequence[Estimate], digits: int = 1) -> list[str]:
    first = best(column)
    return [f"**{one.text(digits)}**" if i == first else one.text(digits) for i, one in enumerate(column)]


def draw(
    runs: Sequence[Run], block: int, methods: Methods, ablations: Methods, test: str, folder: Path
) -> dict[str, tuple[str, str]]:
    """The block's plots into `folder`: name -> (file name, what it shows)."""
    main = by_method(runs, block, list(methods))
    groups = ablation_groups(main, by_method(runs, block, list(ablations)))
    styles = plots.looks(list(methods))
    drawn = {}

    def add(name: str, size: tuple[float, float], told: str, plot: Callable) -> None:
        drawn[name] = (f"{name}-block{block}.png", told)
        plots.save(folder / drawn[name][0], size, plot)

    if main:
        given = {"runs": main, "styles": styles, "split": test, "block": block}
        add("accuracy", (8.5, 4.6), "Accuracy against tokens per step", partial(plots.accuracy_plot, **given))
        add("both", (7.5, 5.2), "Few-step against full-step accuracy", partial(plots.both_plot, **given))
    if groups:
        plot = partial(plots.ablation_plot, runs=groups, split=test, block=block)
        add("ablations", (8.5, 1.4 + 0.36 * len(groups)), "Ablations: accuracy at each speed", plot)
    return drawn

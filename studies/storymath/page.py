"""docs/RESULTS.md: every method on the embedded benchmark, from the figures of finished runs, and the paper's figures.

No sentence here contains a result: all are computed from the figures, or read from docs/results/paper.json.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from studies.domains import Domain
from studies.storymath import paper, plots
from studies.storymath.estimates import (
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
    plain,
    read_figures,
    signed,
)
from t3d.common.errors import UserError
from t3d.common.jsonfiles import atomic_write
from t3d.common.paths import ROOT
from t3d.evaluation.plots import loss_plot
from t3d.evaluation.tables import Table

Methods = Mapping[str, str]  # name -> description
Runs = dict[str, list[Run]]

PAPER = ROOT / "docs" / "results" / "paper.json"
TEACHER_BLOCK = 4


def write_page(
    domain: Domain,
    figures: Path,
    analyses: Path,
    page: Path,
    methods: Methods,
    ablations: Methods,
    conversion: Methods,
    splits: tuple[str, str],
    batch: int,
) -> None:
    """Write the page from all runs below `figures` and the analysis's files in `analyses`. The plots go to `figures`.
    The sentences are in results.md.j2.

    splits: the domain's test set and the harder one; batch: sequences of an optimizer step.
    """
    runs = [read_figures(path) | {"file": path.name} for path in sorted(figures.glob("*.json"))]
    if not runs:
        raise UserError(f"{figures} has no figures yet; run `{_command(domain)}` without --page first", str(figures))
    test, hard = map(domain.split, splits)
    folder = Path(os.path.relpath(figures, page.parent)).as_posix()
    named = {**methods, **ablations, **conversion}
    blocks = sorted({run["block_size"] for run in runs if run["method"] in {**methods, **ablations}})
    losses, one = sorted(analyses.glob("*.json")), next((run for run in runs if run["method"] == "t3d"), runs[0])
    recipe = re.search(r"^tables:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, keep_trailing_newline=True
    )
    text = environment.get_template("results.md.j2").render(
        command=_command(domain),
        domain=domain,
        output=domain.runs.as_posix(),
        test=test,
        hard=hard,
        glance=at_a_glance(runs, methods, test),
        teacher_block=TEACHER_BLOCK,
        blocks=[block_part(runs, block, methods, ablations, (test, hard), figures, folder) for block in blocks],
        conversion=conversion_table(runs, conversion, test),
        losses=step_losses(losses, named, plots.looks(list(methods)), figures, folder) if losses else None,
        settings=settings(runs, named),
        batch=batch,
        temperatures=temperatures(),
        strange=sorted({run["method"] for run in runs} - set(named)),
        figures=os.path.relpath(figures, ROOT),
        one=one | {"stem": Path(one["file"]).stem},
        recipe=[line.strip().replace("$(PY)", "python") for line in recipe[1].splitlines()],
        paper=paper.section(json.loads(PAPER.read_text())) if domain.paper else None,
    )
    with atomic_write(page) as file:
        file.write(text)
    print(f"{page}: {len(runs)} runs")


def _command(domain: Domain) -> str:
    return "python -m studies.storymath.tables" + f" --domain {domain.name}" * bool(domain.results)


# ---------------------------------------------------------------------------------------------------------------------
# The whole benchmark


def at_a_glance(runs: Sequence[Run], methods: Methods, test: str) -> str:
    """Every method in a line: its description, and its mean accuracy at one token per step and at the fast speeds."""
    heads, columns = [], []
    found = {block: by_method(runs, block, list(methods)) for block in sorted({run["block_size"] for run in runs})}
    for block, of_block in found.items():
        fast = [speed for speed in fast_speeds(block) if speed >= min(4, block)]
        for speed in [1.0, *fast] if of_block else []:
            heads.append(f"block {block}, {_head(speed)}")
            means = {name: estimate(some, at_speed(test, speed)).mean for name, some in of_block.items()}
            columns.append({name: f"{mean:.1f}" for name, mean in means.items()})
    rows = [[name, told, *(column.get(name, "") for column in columns)] for name, told in methods.items()]
    rows = [row for row in rows if any(row[2:])]
    table = Table("", ["method", "description", *heads], rows, text=["method", "description"])
    return table.markdown()


def settings(runs: Sequence[Run], named: Methods) -> str:
    """One line per method: its config, its overrides, and the budget of its runs, as the runs recorded them."""
    rows = []
    for name in named:
        found = [run for run in runs if run["method"] == name]
        if not found:
            continue
        budget = [_values(run[key] for run in found if key in run) for key in ("steps", "learning_rate", "questions")]
        made_of = " or ".join(sorted({_made_of(run) for run in found}))
        rows.append([name, made_of, *budget, _tokens(found)])
    columns = ["method", "config; overrides", "steps", "learning rate", "questions", "tokens seen"]
    return Table("", columns, rows, text=columns[:2]).without_empty("tokens seen").markdown()


def conversion_table(runs: Sequence[Run], told: Methods, test: str) -> str | None:
    """The rows from an autoregressive model: tokens seen, and accuracy at the speeds of the row's block."""
    found = {name: some for name in told if (some := [run for run in runs if run["method"] == name])}
    if not found:
        return None
    speeds = [1.0, *fast_speeds(max(run["block_size"] for some in found.values() for run in some))]
    rows = []
    for name, some in found.items():
        block = min(run["block_size"] for run in some)
        cells = [estimate(some, at_speed(test, speed)).text() if speed <= block else "" for speed in speeds]
        rows.append([name, told[name], _tokens(some), *cells, str(len(some))])
    columns = ["model", "description", "tokens seen", *map(_head, speeds), "seeds"]
    return Table("", columns, rows, text=columns[:2]).markdown()


def _made_of(run: Run) -> str:
    changed = [
        f"{stage}: " * (stage != "training") + " ".join(f"`{override}`" for override in run[stage])
        for stage in ("training", "rollouts", "decoding")
        if run[stage]
    ]
    made_of = [f"`{run['config']}`" if run["config"] else "the teacher as it is", *changed]
    if not run.get("after"):
        return "; ".join(made_of)
    return "; ".join([_made_of(run["after"]), *([f"then {made_of[0]}"] if run["config"] else []), *changed])


def temperatures() -> str:
    """The temperatures of answers and rollouts, from the configs."""
    from t3d.common.options import load
    from t3d.evaluation.settings import EvalConfig
    from t3d.rollout.settings import SampleConfig

    files = {"Answers": (EvalConfig, "configs/demo/eval.yaml"), "rollouts": (SampleConfig, "configs/demo/sample.yaml")}
    told = [
        f"{what} are drawn at temperature {load(schema, [f'config={file}']).rollout.temperature:g} (`{file}`)"
        for what, (schema, file) in files.items()
    ]
    return ", ".join(told) + ", unless a row's overrides change it."


def _tokens(runs: Sequence[Run]) -> str:
    """Tokens seen, in millions: the mean over the runs that recorded them, for each block size."""
    runs = [run for run in runs if run.get("tokens")]
    blocks, told = sorted({run["block_size"] for run in runs}), []
    for block in blocks:
        counts = [run["tokens"] for run in runs if run["block_size"] == block]
        told.append(f"{sum(counts) / len(counts) / 1e6:.2f} M" + (f" (block {block})" if len(blocks) > 1 else ""))
    return ", ".join(told)


def _values(values) -> str:
    return ", ".join(map(str, sorted(set(values))))


def step_losses(
    files: Sequence[Path], rows: Methods, styles: Mapping[str, dict], figures: Path, folder: str
) -> dict[str, Any]:
    """Factorisation error, cross-entropy and entropy of each student and its teacher, as the analysis measured them."""
    names = {plain(name): name for name in rows}
    models: dict[int, dict[str, Mapping]] = {}  # block size -> name -> its measurements
    for path in files:
        found, stem = read_figures(path), path.stem.partition("-block")[0]
        name = names.get(stem, stem)
        models.setdefault(found["teacher"]["block_size"], {"original": found["teacher"]})[name] = found["student"]
    speeds = sorted({row["tokens_per_step"] for some in models.values() for row in some["original"]["per_block"]})
    lines, images = [], []
    for block, of_block in sorted(models.items()):
        for name, model in of_block.items():
            loss = {row["tokens_per_step"]: row for row in model["per_block"]}
            cells = [
                f"{loss[s]['correlation']:.3f} ± {loss[s]['correlation_error']:.3f}" if s in loss else ""
                for s in speeds
            ]
            states = model["states"]
            cells += [f"{sum(row[key] for row in states) / len(states):.3f}" for key in ("cross_entropy", "entropy")]
            # older analyses have no pair and no risk
            cells.append(f"{model['pair']:.3f} ± {model['pair_error']:.3f}" if "pair" in model else "")
            cells.append(f"{sum(row['risk'] for row in states) / len(states):.3f}" if "risk" in states[0] else "")
            lines.append([str(block), name, *cells])
        image = f"losses-block{block}.png"
        drawn = {name: of_block[name] for name in styles if name in of_block}
        plots.save(figures / image, (13, 3.8), partial(loss_plot, models=drawn, styles=styles), panels=3)
        images.append(
            f"![Block {block}: correlation lost, cross-entropy and entropy of teacher and students]({folder}/{image})"
        )
    columns = ["block", "model", *map(_head, speeds), "cross-entropy", "entropy", "pair", "risk"]
    table = Table("", columns, lines, text=["model"]).without_empty("pair", "risk")
    return {"table": table.markdown(), "images": images}


# ---------------------------------------------------------------------------------------------------------------------
# One block size


def block_part(
    runs: Sequence[Run],
    block: int,
    methods: Methods,
    ablations: Methods,
    splits: tuple[str, str],
    figures: Path,
    folder: str,
) -> dict[str, Any]:
    """The tables of one block size, each Markdown or None, and its plots."""
    test, hard = splits
    main, varied = by_method(runs, block, list(methods)), by_method(runs, block, list(ablations))
    every, fast, groups = main | varied, fast_speeds(block), ablation_groups(main, varied)
    drawn = draw(main, groups, block, plots.looks(list(methods)), test, figures)
    part = {
        "block": block,
        "told": [*seeds_told(main or every), *absent_told(every, methods)],
        "images": {name: f"![{told}]({folder}/{file})" for name, (file, told) in drawn.items()},
    }
    if main:
        part |= {"few": few_step(main, test, fast), "full": full_step(main, test), "dynamic": dynamic_decoding(main)}
    if harder := with_split(main, hard):
        part["hard"] = few_step(harder, hard, [1.0, *fast], gain=False)
    if "t3d" in main and len(main) > 1:
        others = {name: of_method for name, of_method in main.items() if name != "t3d"}
        part["against"] = differences(others, lambda name: main["t3d"], test, fast)
    if groups:
        part["ablations"] = few_step(groups, test, [1.0, *fast], gain=False)
    if of := {name: some for name, some in groups.items() if family(name) in groups and family(name) != name}:
        part["varied"] = differences(of, lambda name: groups[family(name)], test, fast)
    return part


def with_split(runs: Runs, split: str) -> Runs:
    """The runs with figures on a split; runs from before it are left out."""
    found = {
        name: [run for run in some if split in {row["dataset"] for row in run["rows"]}] for name, some in runs.items()
    }
    return {name: some for name, some in found.items() if some}


def seeds_told(runs: Runs) -> list[str]:
    """Seeds and problems, and the seeds that a method lacks."""
    every = [run for of_method in runs.values() for run in of_method]
    seeds = {run["seed"] for run in every}
    problems = _values(row["n"] for run in every for row in run["rows"])
    lacking = {name: seeds - {run["seed"] for run in of_method} for name, of_method in runs.items()}
    told = [f"{name} (seed {_values(lacks)})" for name, lacks in lacking.items() if lacks]
    missing = [f"Not run: {'; '.join(told)}."] if told else []
    return [f"Seeds: {_values(seeds)}; problems per evaluation: {problems}.", *missing]


def absent_told(runs: Runs, methods: Methods) -> list[str]:
    """The paragraph that names the methods without a run, where there are any."""
    absent = [name for name in methods if name not in runs]
    return [f"Without any run: {'; '.join(absent)}."] if absent else []


def few_step(runs: Runs, split: str, speeds: Sequence[float], gain: bool = True) -> str:
    """Accuracy at each speed, their average, and the gain over the teacher."""
    picks = [at_speed(split, speed) for speed in speeds]
    columns = [[estimate(of_method, pick) for of_method in runs.values()] for pick in picks]
    averages = [estimate(of_method, at_speed(split, *speeds)) for of_method in runs.values()]
    gains = []
    for name, of_method in runs.items():
        wanted = gain and name != "original"
        more = difference(of_method, runs.get("original", []), at_speed(split, *speeds)) if wanted else None
        share = f" ({100 * more.mean / more.other:+.0f} %)" if more and more.other else ""
        gains.append(signed(more.mean) + share if more else "")
    yields = [estimate(of_method, picks[-1], "tokens_per_forward").mean for of_method in runs.values()]
    cells = [*map(_bold, columns), _bold(averages), gains, [f"{value:.2f}" for value in yields]]
    heads = [*map(_head, speeds), "average", "gain", f"tokens/forward at {speeds[-1]:g}"]
    return _table(runs, heads, cells).without_empty("gain").markdown()


def full_step(runs: Runs, split: str) -> str:
    """Accuracy at one token per step, and its difference from the teacher's."""
    pick = at_speed(split, 1.0)
    found = [estimate(of_method, pick) for of_method in runs.values()]
    against = [
        None if name == "original" else difference(of_method, runs.get("original", []), pick)
        for name, of_method in runs.items()
    ]
    lost = [signed(one.mean) if one else "" for one in against]
    yields = [f"{estimate(of_method, pick, 'tokens_per_forward').mean:.2f}" for of_method in runs.values()]
    table = _table(runs, [_head(1), "vs teacher", "tokens/forward"], [_bold(found), lost, yields])
    return table.without_empty("vs teacher").markdown()


def dynamic_decoding(runs: Runs) -> str:
    """The table of accuracy and cost under dynamic decoding."""
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
    """Each method minus another, at every speed and for the few-step average."""
    picks: dict[str, Pick] = {_head(speed): at_speed(split, speed) for speed in [1.0, *fast]}
    picks["few-step average"] = at_speed(split, *fast)
    rows = []
    for name, of_method in runs.items():
        found = [difference(of_method, other(name), pick) for pick in picks.values()]
        pairs = found[0].pairs if found[0] else 0
        rows.append([name, *("" if one is None else one.text() for one in found), str(pairs)])
    return Table("", ["method", *picks, "pairs"], rows, text=["method"]).markdown()


def ablation_groups(main: Runs, varied: Runs) -> Runs:
    """Each varied method, followed by its variants. If the method has no run, its variants stand alone."""
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
    main: Runs, groups: Runs, block: int, styles: Mapping[str, dict], test: str, folder: Path
) -> dict[str, tuple[str, str]]:
    """Draw the block's plots into `folder`: name -> (file name, caption)."""
    drawn = {}

    def add(name: str, size: tuple[float, float], told: str, plot: Callable) -> None:
        drawn[name] = (f"{name}-block{block}.png", told)
        plots.save(folder / drawn[name][0], size, plot)

    if main:
        given: dict[str, Any] = {"runs": main, "styles": styles, "split": test, "block": block}
        add("accuracy", (8.5, 4.6), "Accuracy against tokens per step", partial(plots.accuracy_plot, **given))
    if groups:
        plot = partial(plots.ablation_plot, runs=groups, split=test, block=block)
        add("ablations", (8.5, 1.4 + 0.36 * len(groups)), "Ablations: accuracy at each speed", plot)
    return drawn

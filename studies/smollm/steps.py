"""Run a study's stages: estimates, records of finished stages, and the figures of a part."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from studies.smollm.stages import Plan, Stage
from t3d.common.errors import UserError
from t3d.common.jsonfiles import atomic_write
from t3d.evaluation.tables import Table

KEPT: tuple[str, ...] = ("method", "dataset", "strategy", "block_size", "tokens_per_step", "temperature", "seed", "n")
KEPT += ("accuracy", "ci_low", "ci_high", "nll", "nll_low", "nll_high", "distinct_2", "repetition")
KEPT += ("tokens_per_forward", "measured_tokens_per_step", "mean_length")
POINTS, EXAMPLES = 40, 2  # of a training's curve; questions whose answers the page shows
Record = Mapping[str, Any]
Run = Callable[..., None]  # of a command's parts


# ---------------------------------------------------------------------------------------------------------------------
# Records: one file per stage


def record_file(stage: Stage, plan: Plan) -> Path:
    """The file that says how long a stage has run, and whether it has finished."""
    return plan.folder / "stages" / f"{stage.name}.json"


def read_record(stage: Stage, plan: Plan) -> Record:
    """The stage's record, {} if it was never started. Raises UserError if it is of another command."""
    file = record_file(stage, plan)
    if not file.exists():
        return {}
    record = json.loads(file.read_text())
    if record["command"] != list(stage.command):
        other = sorted(set(stage.command) ^ set(record["command"]))
        raise UserError(
            f"{stage.name}: {file} is of another command ({', '.join(other)}); choose another --folder, or remove the "
            "file to run it by the new command",
            stage.name,
        )
    return record


def estimate(stage: Stage, plan: Plan) -> float | None:
    """Seconds of a stage; None = unknown. Finished stages of the same kind count more than the size's rate."""
    rates = plan.size["rates"]
    rate = 0.0 if stage.kind == "start" else measured_rate(stage.kind, plan) or rates[stage.kind]
    return None if rate is None else rates["start"] + stage.work * rate


def measured_rate(kind: str, plan: Plan) -> float | None:
    """Seconds per unit in the finished stages of a kind: their median. None if there is none."""
    records = [json.loads(file.read_text()) for file in sorted((plan.folder / "stages").glob("*.json"))]
    found = [max(0.0, r["seconds"] - plan.size["rates"]["start"]) / r["work"] for r in records if _of(r, kind)]
    return median(found) if found else None


def _of(record: Record, kind: str) -> bool:
    return bool(record["done"] and record["kind"] == kind and record["work"])


def plan_table(stages: list[Stage], plan: Plan) -> str:
    """The stages with their estimates; the time that finished ones took."""
    rows, left = [], 0.0
    for stage in stages:
        record, seconds = read_record(stage, plan), estimate(stage, plan)
        done = bool(record.get("done"))
        left += 0.0 if done or seconds is None else seconds
        told = f"took {clock(record['seconds'])}" if done else about(seconds)
        rows.append([stage.name, f"{stage.work:,.0f}" if stage.work else "", stage.kind, told])
    table = Table("", ["stage", "work", "unit", "time"], rows, text=["stage", "unit", "time"])
    return f"{table.plain()}\n\nleft, without stages of unknown time: {clock(left)}"


def about(seconds: float | None) -> str:
    """An estimate in words."""
    return "not measured on such a machine yet" if seconds is None else f"about {clock(seconds)}"


def clock(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def run_stage(stage: Stage, plan: Plan, number: str, run: Run) -> None:
    """Run a stage that has not finished, and note its time, also when it is stopped."""
    record = read_record(stage, plan)
    if record.get("done"):
        return
    spent = record.get("seconds", 0.0)
    told = f", {clock(spent)} of them spent" if spent else ""
    print(f"\n=== {number}: {stage.name}, {about(estimate(stage, plan))}{told}", flush=True)
    began, done = time.monotonic(), False
    try:
        if not (stage.output and stage.output.exists()):
            run(*stage.command)
        done = True
    finally:
        made = {"command": list(stage.command), "kind": stage.kind, "work": stage.work, "done": done}
        with atomic_write(record_file(stage, plan)) as file:
            file.write(json.dumps(made | {"seconds": round(spent + time.monotonic() - began, 1)}, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# Figures: all that the page needs, without paths of the machine


def write_figures(plan: Plan, part: str, size: str, target: Path) -> None:
    """Write the figures of a part's finished stages."""
    stages = [stage for stage in plan.stages((part,)) if read_record(stage, plan).get("done")]
    rows, examples = evaluations(plan.folder / part)
    made = {
        "part": part,
        "size": size,
        "settings": plan.size[part] | {"training": plan.size["training"]},
        "stages": [
            {"name": s.name, "command": public(s, plan, size), "seconds": read_record(s, plan)["seconds"]}
            for s in stages
        ],
        "rows": rows,
        "curves": {name: curve(plan, part, name) for name in plan.size[part]["steps"]},
        "examples": examples,
    }
    with atomic_write(target) as file:
        file.write(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(f"{target}: {len(rows)} rows", flush=True)


def public(stage: Stage, plan: Plan, size: str) -> list[str]:
    """A stage's command with the study's default folder and the model's file name."""
    names = {str(plan.folder): f"experiments/smollm/{size}", plan.source: Path(plan.source).name}
    command = list(stage.command)
    for here, shown in names.items():
        command = [part.replace(here, shown) for part in command]
    return command


def evaluations(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a part's results, and the answers to its first questions in them."""
    rows: list[dict[str, Any]] = []
    answers: dict[str, list[Record]] = {}
    for path in sorted((folder / "results").glob("*.json")):
        records = path.with_name(path.name.removesuffix(".json")) / "records.jsonl"
        if not records.exists():  # a file of several rows, which have their own files too
            continue
        (row,) = json.loads(path.read_text())
        rows.append({key: row[key] for key in KEPT if key in row})
        for line in records.read_text().split("\n")[:EXAMPLES]:
            one = json.loads(line)
            told = {key: row[key] for key in ("method", "strategy", "tokens_per_step", "seed")}
            answers.setdefault(one["question"], []).append(told | {"text": one["text"], "correct": one["correct"]})
    rows.sort(key=lambda row: (row["method"], row["strategy"], row["tokens_per_step"], row["seed"]))
    return rows, [{"question": question, "answers": some} for question, some in answers.items()]


def curve(plan: Plan, part: str, name: str) -> list[tuple[int, float]]:
    """(step, loss) of a training, as means over at most POINTS equal stretches."""
    log = plan.run(part, name) / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    pairs = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    width = -(-len(pairs) // POINTS) or 1
    stretches = [pairs[i : i + width] for i in range(0, len(pairs), width)]
    return [(some[-1][0], round(sum(loss for _, loss in some) / len(some), 4)) for some in stretches]

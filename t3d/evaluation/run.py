"""Score a checkpoint: decode, grade, summarise. One unit is one data set under one decode setting with one seed."""

import json
import os
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from t3d.blocks.strategy import strategy_named
from t3d.common import options, paths
from t3d.common.errors import UserError, fault
from t3d.common.jsonfiles import atomic_write
from t3d.common.processes import is_main_process
from t3d.data.shards import read_shards
from t3d.data.trajectory import Trajectory
from t3d.evaluation.answers import answer_sets
from t3d.evaluation.judge import Judge, variety
from t3d.evaluation.protocol import aup_tables, paper_tables, settings
from t3d.evaluation.report import print_table, write_report
from t3d.evaluation.results import average, find_results, for_people, tell_apart
from t3d.evaluation.scoring import costs, counts, method, model_label, strategy, summarise
from t3d.evaluation.settings import EvalConfig
from t3d.grading import Verdict
from t3d.rollout.run import Job, decode_all, fitting, node_share, throughput
from t3d.tasks import Answer, Grading, Task, find_task
from t3d.tasks.problems import data_type_of, load_problems


def evaluate(config: EvalConfig) -> Path:
    """Evaluate every unit of the configuration, with one model load. Answers that exist already are kept.

    A unit writes ``<results>.json`` with one row. The folder of the same name holds its trajectories, its configuration
    and records.jsonl, one line per answer. Several units also write a file with all rows and the averages over data
    sets, an HTML page and the configuration. Prints the table, and with a protocol the paper's tables. Returns the path
    of the results file.
    """
    units = units_of(config)
    for unit in units:
        unit.task.isolation(unit.grading)  # before hours of decoding, not after
    rows: list[dict[str, Any]] = []
    for job in decode_all([unit.job for unit in units]):
        if is_main_process():
            unit = units[len(rows)]
            assert job is unit.job
            rows.append(score(unit))
            with atomic_write(unit.output) as file:
                file.write(json.dumps([rows[-1]], indent=2))
            if len(units) > 1:
                share = f"{100 * rows[-1]['accuracy']:.1f} % " if unit.task.graded else ""
                print(f"{unit.output.stem}: {share}({counts(rows[-1]['verdicts'])})", flush=True)
    if len(units) > 1:
        return publish(config, rows, [unit.output for unit in units])
    if is_main_process():
        print_table(rows)
        print(f"{costs(rows[0])}\n{units[0].output}")
    return units[0].output


# ---------------------------------------------------------------------------------------------------------------------
# The units of an evaluation


@dataclass(frozen=True)
class Unit:
    """One data set, one decode setting, one seed: the configuration narrowed to them, and the row's file."""

    config: EvalConfig
    job: Job
    output: Path
    left_out: int = 0  # questions whose prompts are too long

    @property
    def task(self) -> Task:
        return find_task(self.config.evaluation.data_type)

    @property
    def grading(self) -> Grading:
        execute = self.config.execute
        return Grading(
            workers=min(execute.num_chunk, os.cpu_count() or 1),
            time_limit=execute.time_limit,
            allow_unsandboxed=execute.allow_unsandboxed,
            extraction=self.config.evaluation.extraction,
        )


def units_of(config: EvalConfig) -> list[Unit]:
    """One unit per decode setting, data set and seed. Raises UserError for a bad data set."""
    data, rollout = config.evaluation, config.rollout
    names = dataset_names(data.eval_dataset)
    kinds = {name: data_type_of(name, data.data_type) for name in names}
    problems = {name: load_problems(name, kinds[name], data.limit) for name in names}
    variants = [rollout]
    if data.protocol:
        variants = settings(rollout, data.protocol, data.protocol_blocks, data.thresholds)
    seeds = data.seeds or [rollout.seed]
    several = len(names) * len(variants) * len(seeds) > 1
    units = []
    for variant, name, seed in product(variants, names, seeds):
        here = replace(data, eval_dataset=name, data_type=kinds[name], protocol=None, seeds=None)
        narrowed = replace(config, rollout=replace(variant, seed=seed), evaluation=here)
        narrowed.check()  # a protocol sets its own values
        output = results_file(narrowed)
        if several and data.output:  # the file of that name is for all units
            unnamed = replace(narrowed, evaluation=replace(here, output=None))
            output = output.with_name(output.name.removesuffix(".json")) / results_file(unnamed).name
        folder = output.with_name(output.name.removesuffix(".json"))
        share = node_share(problems[name], data.num_node, data.node_index)
        kept = fitting(narrowed, share)
        units.append(Unit(narrowed, Job(narrowed, kept, folder), output, len(share) - len(kept)))
    return units


def dataset_names(given: str) -> list[str]:
    """The data sets of ``evaluation.eval_dataset``: names or paths, with commas between them."""
    if paths.data_file(given).is_file():  # a path may contain a comma
        return [given]
    names = [name.strip() for name in given.split(",") if name.strip()]
    stems = [paths.data_name(name) for name in names]
    if not names or len(set(stems)) < len(stems):
        raise fault("evaluation.eval_dataset", given, "give each data set once, for example MATH500,GSM8K")
    return names


def results_file(config: EvalConfig) -> Path:
    """The unit's file, named after all settings that identify its results; ``evaluation.output`` overrides it."""
    data, rollout = config.evaluation, config.rollout
    if data.output:
        output = paths.output(data.output)
        stem = output.name.removesuffix(".json")  # a name may contain dots
        return output.with_name(f"{stem}{node_suffix(config)}.json")
    threshold = strategy_named(rollout.remasking_strategy).threshold
    at = getattr(rollout, threshold) if threshold else ""
    model, dataset = model_label(data.checkpoint_path), paths.data_name(data.eval_dataset)
    return results_folder(config) / (
        f"{method(config)}-{model}-{dataset}-{strategy(rollout)}{at}"
        f"-b{rollout.block_size}-s{rollout.denoising_steps_per_block}-t{rollout.temperature}-seed{rollout.seed}"
        f"{node_suffix(config)}.json"
    )


def results_folder(config: EvalConfig) -> Path:
    """The folder of a project's results."""
    return paths.output(config.experiment.project) / "results"


def node_suffix(config: EvalConfig) -> str:
    """A machine's part of a file name; "" where one machine has all."""
    return f"-node{config.evaluation.node_index}" if config.evaluation.num_node > 1 else ""


# ---------------------------------------------------------------------------------------------------------------------
# One unit's row


def score(unit: Unit) -> dict:
    """Grade a unit's answers, write their records and return its row."""
    config, folder = unit.config, unit.job.folder
    samples = range(config.rollout.num_response_per_task)
    wanted = {f"{problem.id}/{k}": problem for problem in unit.job.problems for k in samples}
    # the folder may hold more answers, of an earlier run
    answers = [answer for answer in read_shards(folder, ordered=True) if answer.id in wanted]
    for answer in answers:
        if answer.question != wanted[answer.id].question:
            name = config.evaluation.eval_dataset
            raise UserError(
                f"{folder}: {answer.id} answers another question than {name} has; delete the folder", str(folder)
            )
        answer.ground_truth = wanted[answer.id].ground_truth  # an answer key may have been corrected since
    if len(answers) < len(wanted):
        raise UserError(
            f"{folder}: {len(wanted) - len(answers)} of {len(wanted)} answers are missing; start it again", str(folder)
        )
    rows = [wanted[answer.id].raw for answer in answers]
    verdicts = unit.task.grade([Answer(a.text, row) for a, row in zip(answers, rows, strict=True)], unit.grading)
    write_records(folder / "records.jsonl", answers, verdicts)
    row = summarise(config, answers, verdicts, *throughput(folder))
    if not unit.task.graded:
        row |= variety([answer.response_ids[: answer.length] for answer in answers])
    if config.evaluation.judge:
        row |= judge(config.evaluation.judge, config.evaluation.checkpoint_path).measures(answers)
    more = {"isolation": unit.task.isolation(unit.grading), "left_out": unit.left_out}
    return row | {key: value for key, value in more.items() if value}


judge = cache(Judge)  # one load for all units


def write_records(path: Path, answers: list[Trajectory], verdicts: list[Verdict]) -> None:
    """One JSON line per answer: question, text, extracted answer, verdict and cost."""
    keys = ("id", "question", "ground_truth", "text", "length", "steps", "forwards", "seconds", "finish_reason")
    with atomic_write(path) as file:
        for answer, verdict in zip(answers, verdicts, strict=True):
            record = {key: getattr(answer, key) for key in keys} | vars(verdict)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Several units


def publish(config: EvalConfig, rows: list[dict], files: list[Path]) -> Path:
    """Write and print the results of one command's units; returns the file with their rows. ``files``: the units' own.

    With a protocol the tables also show other methods' results of the same settings in the same folder.
    """
    data = config.evaluation
    output = results_file(config) if data.output else results_folder(config) / f"{summary_name(config)}.json"
    if not is_main_process():
        return output
    with atomic_write(output) as file:
        file.write(json.dumps([*rows, *average(rows)], indent=2))
    options.save(config, output.with_suffix(".yaml"))
    tables, answers = [], answer_sets(list(zip(rows, files, strict=True)))
    if data.protocol and "accuracy" in rows[0]:
        rows = beside_others(rows, results_folder(config))
        tables = [*paper_tables(rows), *aup_tables(rows)]
    shown = for_people(rows)
    print()
    print_table(shown)
    for table in tables:
        print(f"\n{table.plain()}")
    if isolation := next(filter(None, (row.get("isolation") for row in rows)), None):
        print(f"\nprograms isolated by {isolation}")
    title = f"{model_label(data.checkpoint_path)}, {'protocol ' + data.protocol if data.protocol else 'results'}"
    page = write_report(output.with_suffix(".html"), title=title, results=shown, tables=tables, answers=answers)
    print(f"\n{output}\n{page}")
    return output


def summary_name(config: EvalConfig) -> str:
    """The name of the file for all units of one command; see `results_file`."""
    data, rollout = config.evaluation, config.rollout
    setting = data.protocol or f"{strategy(rollout)}-b{rollout.block_size}-s{rollout.denoising_steps_per_block}"
    datasets = "+".join(paths.data_name(name) for name in dataset_names(data.eval_dataset))
    seeds = "+".join(map(str, data.seeds or [rollout.seed]))
    model = model_label(data.checkpoint_path)
    return f"{method(config)}-{model}-{datasets}-{setting}-t{rollout.temperature}-seed{seeds}{node_suffix(config)}"


def beside_others(rows: list[dict], folder: Path) -> list[dict]:
    """The rows, and the rows of other methods and models in `folder` with the same questions, settings and seeds."""
    keys, own = ("dataset", "n", "seed", "node", "decode"), (rows[0]["method"], rows[0]["model"])
    wanted = [{key: row.get(key) for key in keys} for row in rows]
    others = [
        row
        for row in find_results(folder)
        if (row["method"], row.get("model")) != own and {key: row.get(key) for key in keys} in wanted
    ]
    return tell_apart([*others, *rows])


if __name__ == "__main__":
    raise SystemExit("this module is no command: use `t3d eval` or `python -m t3d.evaluation`")

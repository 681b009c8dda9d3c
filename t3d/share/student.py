"""The facts about a trained student that its card names: its run, its budget, its evaluation, its teacher's licence."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from t3d.common import options, paths
from t3d.common.errors import UserError
from t3d.data.release import read_release_json
from t3d.data.shards import read_shards
from t3d.data.trajectory import Trajectory, split_id
from t3d.evaluation.report import read_log
from t3d.evaluation.results import Row, find_results, pool_nodes, read_results, tell_apart
from t3d.models.loading import CARD, PROVENANCE, provenance
from t3d.objectives.base import find
from t3d.tasks.download import SETS
from t3d.training.runs import saved_settings
from t3d.training.tracking import LOG

log = logging.getLogger(__name__)

TRAINING = "training"  # in a student's folder with a card: its run's configuration and log, and its results
CONFIG, RESULTS = "config.yaml", "results.json"
HERE = "."  # in training/results.json: the student itself
LICENCE = ("license", "license_name", "license_link")  # keys of a card's metadata
QUESTIONS = "Gen-Verse"  # the hub's owner of t3d.tasks.download.SETS

# Keys of every training that a card names, before the objective's own.
COMMON = (
    *("training.objective", "training.block_size", "training.batch_size_lm", "training.gradient_accumulation_steps"),
    *("training.max_gen_length", "training.lora.rank", "training.ema_decay", "training.mixed_precision"),
    *("training.refresh_rollouts", "model.random_ratio", "optimizer.params.learning_rate", "lr_scheduler.scheduler"),
    *("lr_scheduler.params.warmup_steps", "experiment.max_grad_norm", "training.seed"),
)


@dataclass(frozen=True)
class Student:
    """A trained student.

    Attributes:
        folder: its model folder. made_by: what t3d.json says of its training.
        run: the folder with the training's config.yaml and log.jsonl.
        settings: dotted key -> value of config.yaml.
        log: the training's steps up to this student.
    """

    folder: Path
    made_by: Mapping[str, Any]
    run: Path
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]

    @property
    def teacher(self) -> str:
        return self.settings["model.pretrained_model"]


def read_student(folder: str | Path) -> Student:
    """The student of a training run's folder, or of a student's own folder.

    Raises:
        UserError: there is no such folder, no training made it, or its training's files are missing.
    """
    model = trained_folder(folder)
    made_by = provenance(model)
    if not {"objective", "step", "teacher"} <= made_by.keys():
        raise UserError(
            f"{folder}: no {PROVENANCE} of a training, so t3d train did not make it; give the folder of a training "
            "run, or of a student in its ckpt/",
            PROVENANCE,
        )
    homes = [model / TRAINING, *model.parents[1:2]]
    run = next((home for home in homes if (home / CONFIG).is_file() and (home / LOG).is_file()), None)
    if run is None:
        raise UserError(
            f"{folder}: neither {TRAINING}/ nor the folder of its run has {CONFIG} and {LOG}; copy them to "
            f"{model / TRAINING}",
            CONFIG,
        )
    steps = [record for record in read_log(run / LOG) if record["step"] <= made_by["step"]]
    return Student(model, made_by, run, options.dotted(saved_settings(run / CONFIG)), steps)


def trained_folder(folder: str | Path) -> Path:
    """The model folder of a finished run, or any other folder itself. Raises UserError if there is none."""
    run = paths.resolve(folder)
    if not run.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a training run, or of a student", "folder")
    if not (run / LOG).is_file():
        return run
    model = run / "ckpt" / options.dotted(saved_settings(run / CONFIG)).get("model.optimized_name", "optimized")
    if not model.is_dir():
        others = ", ".join(str(path.parent) for path in sorted(run.glob(f"ckpt/*/{PROVENANCE}")))
        remedy = f"give one of {others}" if others else "continue it with experiment.resume=auto"
        raise UserError(f"{run}: the run has not finished, {model} does not exist; {remedy}", "folder")
    return model


# --- budget and method -----------------------------------------------------------------------------------------------


def budget(student: Student) -> dict[str, float]:
    """steps, epochs, sequences, tokens and seconds of the training up to this student.

    ``tokens`` are tokens of the training layout, the clean sequence and its noisy copies. ``seconds`` leaves out
    pauses, checkpoints and refreshed rollouts.
    """
    timed = [record for record in student.log if record.get("tokens_per_second")]
    return {
        "steps": len(student.log),
        "epochs": 1 + max((record.get("epoch", 0) for record in student.log), default=0),
        "sequences": sum(record.get("sequences", 0) for record in student.log),
        "tokens": sum(record.get("tokens", 0) for record in student.log),
        "seconds": sum(record["tokens"] / record["tokens_per_second"] for record in timed),
    }


def method_settings(student: Student) -> dict[str, Any]:
    """Dotted key -> value: the keys of ``COMMON``, then the keys that the objective reads. Keys without a value are
    left out.
    """
    try:
        own = [f"training.{f.name}" for f in fields(find(student.settings["training.objective"]).Settings)]
    except UserError as error:  # a user's own objective may lie elsewhere today
        log.warning("%s; the card leaves out the objective's own keys", error)
        own = []
    found = {key: student.settings.get(key) for key in (*COMMON, *own)}
    return {key: value for key, value in found.items() if value is not None}


def objective_text(student: Student) -> str:
    """The documentation of the objective's file: formula and source. Empty if the objective is not found."""
    try:
        module = find(student.settings["training.objective"]).__module__
    except UserError:
        return ""
    return (sys.modules[module].__doc__ or "").strip()


def first_trajectory(student: Student) -> Trajectory | None:
    """The first trajectory of the training data; None if the data are gone, or are no trajectories with token ids."""
    name = student.settings.get("dataset.optimization_data", "")
    if name.startswith("hub:") or not (path := paths.data_file(name)).exists():
        return None
    try:
        return next(iter(read_shards(path) if path.is_dir() else read_release_json(path)), None)
    except UserError as error:
        log.warning("%s; the card says nothing of the trajectories", error)
        return None


def question_sets(student: Student, first: Trajectory | None) -> list[str]:
    """The hub's names of the training data: an SFT set, or the question set of the trajectories if it is known."""
    data = student.settings.get("dataset.optimization_data", "")
    if data.startswith("hub:"):
        return [data.split(":")[1]]
    name = split_id(first.id)[0] if first else None
    return [f"{QUESTIONS}/{name}"] if name in SETS else []


# --- the teacher -----------------------------------------------------------------------------------------------------


def hub_id(source: str) -> str | None:
    """The hub id of a model: given itself, or read off the path of the hub's cache. None for another folder."""
    for part in Path(source).parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return None if paths.resolve(source).is_dir() or source.count("/") != 1 else source


def teachers_licence(source: str) -> dict[str, str]:
    """The licence keys of a teacher's card, in its folder or in the hub's cache; {} if there is none."""
    folder = paths.resolve(source)
    found = (
        folder / CARD if folder.is_dir() else try_to_load_from_cache(source, CARD) if source.count("/") == 1 else None
    )
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return {}
    try:
        data = ModelCard.load(found).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        log.warning("%s: not readable as a card (%s); name the licence by --license", found, str(error).splitlines()[0])
        return {}
    return {key: str(data[key]) for key in LICENCE if data.get(key)}


# --- results ---------------------------------------------------------------------------------------------------------


def results_of(student: Student, given: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of results of a student and its teacher.

    Args:
        given: results files or folders. Without any, the folders are the student's own, eval/, and its project's.

    Raises:
        UserError: the given ones hold no result of this student.
    """
    homes = dict.fromkeys(["eval", str(student.settings.get("experiment.project", "eval"))])
    rows = [row for path in given for row in read_results(paths.resolve(path))]
    if not given:
        rows = [_placed(row, student) for row in find_results(student.folder / TRAINING)]
        rows += [row for home in homes for row in find_results(paths.output(home))]
    own = [row for row in rows if is_of(row, student)]
    if given and not own:
        models = ", ".join(sorted({str(row.get("model")) for row in rows}))
        raise UserError(f"--results: none of {student.folder}, only of {models}; give this student's", "--results")
    sets = {row["dataset"] for row in own}
    others = [row for row in rows if row["dataset"] in sets and _is_of_teacher(row, student)]
    distinct = {json.dumps(row, sort_keys=True): row for row in (*others, *own)}
    return tell_apart(pool_nodes(distinct.values()))


def portable(rows: Sequence[Row], student: Student) -> list[dict[str, Any]]:
    """Rows without the paths of this machine: the student is ".", its teacher has its name."""
    teacher = hub_id(student.teacher) or paths.model_name(student.teacher)
    return [{**row, "model": HERE if is_of(row, student) else teacher} for row in rows]


def _placed(row: Row, student: Student) -> dict[str, Any]:
    return {**row, "model": str(student.folder) if row.get("model") == HERE else row.get("model")}


def is_of(row: Row, student: Student) -> bool:
    """Whether a row measured the student: the same folder, or the same end <project>/<run>/ckpt/<name> of its path."""
    model = Path(str(row.get("model", "")))
    run = tuple(str(student.made_by.get(key)) for key in ("project", "run"))
    return paths.resolve(model) == student.folder or model.parts[-4:] == (*run, "ckpt", student.folder.name)


def _is_of_teacher(row: Row, student: Student) -> bool:
    model, teacher = str(row.get("model", "")), student.teacher
    known = (teacher, hub_id(teacher), paths.model_name(teacher))
    return model in known or paths.resolve(model) == paths.resolve(teacher)

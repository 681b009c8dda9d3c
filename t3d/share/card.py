"""`t3d card`: the card of a student or of a set of trajectories, as the README.md of its folder.

    t3d card experiments/SDAR-1.7B-Chat/math/mine/2026-05-01_10-00-00 --repo owner/name

A student's folder also gets training/: its run's configuration and log, and the rows of results that the card shows. So
the folder is complete for `t3d push`, and a later card needs no other file.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from t3d.common import paths
from t3d.common.errors import UserError, run_main
from t3d.common.jsonfiles import atomic_write
from t3d.data.shards import shard_files
from t3d.evaluation.report import result_table
from t3d.evaluation.results import AVERAGE, Row, for_people
from t3d.evaluation.tables import Table
from t3d.models.loading import CARD, folder_config
from t3d.share import student as facts
from t3d.share.student import CONFIG, RESULTS, TRAINING, Student
from t3d.share.templates import plain, render
from t3d.share.trajectories import trajectory_card
from t3d.training.tracking import LOG

SPEED = {"tokens_per_second": ("Tokens/s", "{tokens_per_second:.0f}")}
TAGS = ("t3d", "block-diffusion", "diffusion-language-model")


def write_student_card(student: Student, asked: argparse.Namespace) -> Path:
    """Write a student's card and the files that go with it; returns the card's path.

    Args:
        asked: repo, base_model, datasets, license and results of the command; None or empty = found.
    """
    rows = facts.results_of(student, asked.results)
    text = student_card(student, rows, asked)
    beside = student.folder / TRAINING
    beside.mkdir(exist_ok=True)
    for name in (CONFIG, LOG) if student.run != beside else ():
        shutil.copyfile(student.run / name, beside / name)
    with atomic_write(beside / RESULTS) as file:
        file.write(json.dumps(facts.portable(rows, student), indent=2, ensure_ascii=False))
    with atomic_write(student.folder / CARD) as file:
        file.write(text)
    return student.folder / CARD


def student_card(student: Student, rows: Sequence[Row], asked: argparse.Namespace) -> str:
    """The text of a student's card; ``rows`` as of ``results_of``."""
    first = facts.first_trajectory(student)
    base = asked.base_model or facts.hub_id(student.teacher)
    teacher = base or paths.model_name(student.teacher)
    objective = student.settings["training.objective"].rpartition(":")[2]
    name = (asked.repo or f"{teacher}-{objective}").rpartition("/")[2]
    licence = {"license": asked.license} if asked.license else facts.teachers_licence(student.teacher)
    data = asked.datasets or facts.question_sets(student, first)
    settings = [[f"`{key}`", f"`{plain(value)}`"] for key, value in facts.method_settings(student).items()]
    shown = for_people(rows)
    metadata = {
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "datasets": data or None,
        "tags": [*TAGS, objective],
        **licence,
    }
    return render(
        "student.md.j2",
        metadata=model_metadata(name, metadata, [row for row in rows if facts.is_of(row, student)]),
        name=name,
        repo=asked.repo or f"owner/{name}",
        teacher=teacher,
        objective=objective,
        about=facts.objective_text(student),
        settings=Table("", ["Key", "Value"], settings, text=("Key", "Value")).markdown(),
        data=data,
        data_name=paths.data_name(student.settings["dataset.optimization_data"].rstrip("/")),
        first=first,
        budget=facts.budget(student),
        results=result_table(shown, SPEED).markdown() if shown else "",
        native=folder_config(str(student.folder))["model_type"] == "sdar",
        block_size=student.settings["training.block_size"],
        licence=licence.get("license_name") or licence.get("license"),
        licence_link=licence.get("license_link"),
    )


def model_metadata(name: str, metadata: dict[str, Any], rows: Sequence[Row]) -> str:
    """The YAML head of a model's card. ``rows``: the model's own results, written in per cent."""
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["dataset"],
            dataset_name=row["dataset"],
            metric_type="accuracy",
            metric_name=f"accuracy, {row['tokens_per_step']:.3g} tokens per step, blocks of {row['block_size']}",
            metric_value=round(100 * row["accuracy"], 2),
        )
        for row in for_people(rows)
        if row["dataset"] != AVERAGE
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=name if measured else None,
        eval_results=measured or None,
        **metadata,
    ).to_yaml()


def main(argv: Sequence[str] | None = None) -> None:
    """Write a card. ``argv``: None = the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog="t3d card",
        description="Write a card, README.md. A student's folder also gets training/, with its run's configuration and "
        "log and the results that the card shows. A rollout's folder can then be read by datasets.load_dataset.",
    )
    parser.add_argument("folder", help="a training run's folder, a student's, or a rollout's folder of shards")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the name that the folder will have on the hub")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="PATH", help="results files or folders; else eval/ and the project"
    )
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="the teacher's name on the hub")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="OWNER/NAME", help="the data's names on the hub")
    parser.add_argument("--license", metavar="ID", help="such as apache-2.0; else the teacher's, from its card")
    parser.add_argument("--force", action="store_true", help="replace a README.md that is there")
    asked = parser.parse_args(argv)
    if shard_files(folder := paths.resolve(asked.folder)):
        refuse_present(folder, asked.force)
        text = trajectory_card(folder, asked.repo, asked.license)
        with atomic_write(folder / CARD) as file:
            file.write(text)
        print(folder / CARD)
        return
    student = facts.read_student(asked.folder)
    refuse_present(student.folder, asked.force)
    print(write_student_card(student, asked))


def refuse_present(folder: Path, force: bool) -> None:
    """Raises UserError if the folder has a card. It may be edited, or in an older export the teacher's."""
    if (folder / CARD).exists() and not force:
        raise UserError(f"{folder / CARD}: exists already; add --force to replace it", "--force")


if __name__ == "__main__":
    run_main(main)

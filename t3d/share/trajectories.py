"""The card of a set of trajectories: a folder of shards becomes a folder that ``datasets.load_dataset`` reads.

The shards stay as they are, so training reads the folder too. The card names the type of every column. Without the
types ``datasets`` would infer them from the first rows, where a list may be empty and a number whole.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from t3d.common import paths
from t3d.common.errors import UserError
from t3d.data.shards import ReadReport, read_shards
from t3d.data.trajectory import Trajectory, split_id
from t3d.evaluation.tables import Table
from t3d.share.templates import plain, render

COLUMNS: Mapping[Any, Mapping[str, Any]] = {  # type of a field -> of its column
    str: {"dtype": "string"},
    int: {"dtype": "int64"},
    float: {"dtype": "float64"},
    float | None: {"dtype": "float64"},
    list[int]: {"list": "int64"},
    list[float]: {"list": "float64"},
    list[list[int]]: {"list": {"list": "int64"}},
}
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass
class Summary:
    """Counts over the trajectories of a folder; ``decode`` has every value of each decode setting."""

    rows: int = 0
    tokens: int = 0
    steps: int = 0
    forwards: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    models: set[str] = field(default_factory=set)
    sets: set[str] = field(default_factory=set)
    blocks: set[int] = field(default_factory=set)
    decode: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, trajectory: Trajectory) -> None:
        self.rows += 1
        self.tokens += trajectory.length
        self.steps += trajectory.steps
        self.forwards += trajectory.forwards
        self.finished[trajectory.finish_reason] += 1
        self.models.add(trajectory.model)
        self.sets.add(split_id(trajectory.id)[0])
        self.blocks.add(trajectory.block_size)
        for key, value in trajectory.decode.items():
            known = self.decode.setdefault(key, [])
            if value not in known or type(value) not in map(type, known):
                known.append(value)


def summarise(folder: Path) -> Summary:
    """The counts of a folder of shards. Raises UserError for a bad line, or for a rollout that was stopped."""
    summary, report = Summary(), ReadReport()
    for trajectory in read_shards(folder, report):
        summary.add(trajectory)
    if report.torn or not summary.rows:
        fault = "a shard ends within a line" if report.torn else "no trajectories"
        raise UserError(f"{folder}: {fault}; finish the rollout with the command that began it", "folder")
    return summary


def trajectory_card(folder: Path, repo: str | None, licence: str | None) -> str:
    """The text of the card of a folder of shards.

    Args:
        repo: the name on the hub. licence: an id such as apache-2.0.
    """
    summary = summarise(folder)
    name = (repo or f"owner/{folder.name.removeprefix('outputs-eval-')}").rpartition("/")[2]
    settings = [
        [f"`{key}`", ", ".join(f"`{plain(value)}`" for value in values)] for key, values in summary.decode.items()
    ]
    metadata = {
        **({"license": licence} if licence else {}),
        "task_categories": ["text-generation"],
        "tags": ["t3d", "trajectories", "block-diffusion", "diffusion-language-model"],
        "size_categories": [next((text for limit, text in SIZES if summary.rows < limit), "n>1M")],
        "configs": [{"config_name": "default", "data_files": "shard-*.jsonl"}],
        "dataset_info": {"features": features(summary)},
    }
    return render(
        "trajectories.md.j2",
        metadata=yaml.safe_dump(metadata, sort_keys=False).rstrip(),
        name=name,
        repo=repo or f"owner/{name}",
        models=", ".join(sorted(paths.model_name(model) for model in summary.models if model)),
        sets=", ".join(sorted(paths.data_name(name) for name in summary.sets)),
        blocks=", ".join(map(str, sorted(summary.blocks))),
        summary=summary,
        settings=Table("", ["Key", "Value"], settings, text=("Key", "Value")).markdown() if settings else "",
        licence=licence,
    )


def features(summary: Summary) -> list[dict[str, Any]]:
    """The columns' names and types, as the card of a data set writes them."""
    hints = get_type_hints(Trajectory)
    decode = [{"name": key, **_type_of(values)} for key, values in summary.decode.items()]
    columns = [{"name": key, **COLUMNS[hint]} for key, hint in hints.items() if hint in COLUMNS]
    return [*columns, *([{"name": "decode", "struct": decode}] if decode else [])]


def _type_of(values: Iterable[Any]) -> dict[str, Any]:
    """The type that holds all values of a decode setting; null fits every type."""
    types = {type(value) for value in values if value is not None}
    if types in ({bool}, {int}):
        return {"dtype": "bool" if bool in types else "int64"}
    return {"dtype": "float64" if types and types <= {int, float} else "string"}

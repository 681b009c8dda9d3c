"""A training run's folder: new or resumed, the settings that a resumed run may change, and its exports."""

import hashlib
import json
import re
import shutil
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, cast

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from t3d.common import options, paths
from t3d.common.errors import UserError, fault
from t3d.training import checkpoint
from t3d.training.settings import TrainConfig


def run_folder(config: TrainConfig, accelerator: Accelerator, look: bool = True) -> tuple[Path, Path | None]:
    """This run's folder, the same on every process, and the checkpoint to resume from (None = start at step 0).

    Args:
        look: look for a checkpoint; this renames damaged ones.
    """
    experiment = config.experiment
    root = paths.run_root(
        experiment.output_root, config.model.pretrained_model, config.dataset.data_type, experiment.project
    )
    run = root / (experiment.run_name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    if experiment.resume == "auto" and not experiment.run_name:
        runs = [path.parent for path in root.glob("*/config.yaml")]
        run = max(runs, key=lambda path: path.stat().st_mtime, default=run)
    elif experiment.resume not in (None, "auto"):
        run = paths.resolve(experiment.resume)
        if not run.is_dir():
            raise fault("experiment.resume", experiment.resume, "no such run folder; give one, auto, or null")
    elif experiment.resume is None and (run / "config.yaml").exists():
        raise fault(
            "experiment.run_name", experiment.run_name, f"{run} exists; choose another name or experiment.resume=auto"
        )
    reads = look and experiment.resume and accelerator.is_main_process  # one process checks the checkpoints
    found = checkpoint.latest(run / "checkpoints") if reads else None
    shared = [str(run), str(found) if found else ""]
    broadcast_object_list(shared)
    run, found = Path(shared[0]), Path(shared[1]) if shared[1] else None
    if look and found is None and experiment.resume not in (None, "auto"):
        raise fault("experiment.resume", experiment.resume, "it holds no complete checkpoint; give another run or null")
    return run, found


# Keys that a resumed run may change: the size and division of its batch, its length, its cost.
FREE_ON_RESUME = {
    *("batch_size_lm", "gradient_accumulation_steps", "tokens_per_batch", "max_steps", "num_train_epochs"),
    *("gradient_checkpointing_enable", "head_chunk", "reference_offload", "compile", "enable_tf32"),
    *("attn_implementation", "optimized_name", "refresh_max_active", "refresh_engine_urls"),
}
SAME_ON_RESUME: tuple[str, ...] = ("model.", "dataset.", "training.", "optimizer.", "lr_scheduler.")
SAME_ON_RESUME += ("experiment.gradient_clipping", "experiment.max_grad_norm")


def refuse_other_settings(config: TrainConfig, saved: Path) -> None:
    """A resumed run must be the same run. UserError names every setting that differs from its config.yaml."""
    before = saved_settings(saved)
    for section in ("experiment", *(name[:-1] for name in SAME_ON_RESUME if name.endswith("."))):
        if not isinstance(before.get(section), dict):
            raise UserError(f"{saved}: damaged, it has no {section}; repair it, or choose another run_name", str(saved))
    now = options.dotted(options.to_dict(config))
    defaults = options.dotted(options.to_dict(type(config)()))  # the values of keys that the saved run did not have
    old = defaults | options.dotted(before)
    other = [key for key in sorted(now) if _same_on_resume(key) and old[key] != now[key]]
    if other:
        differing = "; ".join(f"{key}={now[key]}: the run to resume has {old[key]}" for key in other)
        remedy = "keep it" if len(other) == 1 else "keep them"
        raise UserError(f"{differing} ({saved}); {remedy}, or choose another experiment.run_name", other[0])


def _same_on_resume(key: str) -> bool:
    return key.startswith(SAME_ON_RESUME) and key.partition(".")[2] not in FREE_ON_RESUME


def saved_settings(path: Path) -> dict[str, Any]:
    """The configuration that a run was started with. Raises UserError for a file that is not readable."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path)))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable ({reason}); repair it, or choose another run_name", str(path)) from None


def fingerprint(samples: Any) -> dict[str, Any]:
    """A training set's identity: its number of sequences, and a digest of their ids and answers' lengths."""
    digest = hashlib.sha256()
    columns = (samples.data.column(name) for name in ("id", "length"))
    for pair in zip(*(chain.from_iterable(chunk.to_pylist() for chunk in c.chunks) for c in columns), strict=True):
        digest.update(json.dumps(pair).encode())
    return {"sequences": len(samples), "digest": digest.hexdigest()}


def refuse_other_data(name: str, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """A resumed run must see the data of its start. Checkpoints of earlier versions have no record of their data."""
    if before not in (None, now):
        raise fault(
            "dataset.optimization_data",
            name,
            f"not the data that the run to resume was trained on "
            f"({before['sequences']} sequences then, {now['sequences']} now); restore it, or choose another "
            "experiment.run_name",
        )


def prune_exports(folder: Path, name: str, limit: int | None) -> None:
    """Keep the newest ``limit`` of a running run's exports <name>-<epoch>-<step>."""
    pattern = re.compile(re.escape(name) + r"-\d+-(\d+)")
    found = [(match, path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    exports = [path for _, path in sorted(found, key=lambda item: int(item[0][1]))]
    for path in exports[: -limit if limit else 0]:
        shutil.rmtree(path)

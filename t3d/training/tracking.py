"""A run's log: one JSON line per optimizer step in log.jsonl, and optionally accelerate's wandb or tensorboard."""

import json
import math
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from t3d.common.errors import UserError

LOG = "log.jsonl"
WANDB_ID = "wandb_run_id"


class Tracker:
    """Writes a run's metrics. It works only on the main process; on others it does nothing.

    Args:
        folder: the run's. kind: "none", "wandb" or "tensorboard".
        config: the run's resolved configuration, as plain dicts. wandb_config: entity, project, run_id, resume.
        name: the run's name, for people.
        resume_step: optimizer steps done already. Lines of later steps are removed from log.jsonl, because a resumed
            run writes them again. At 0 the log starts empty.

    Raises:
        UserError: the tracker is not installed, or wandb cannot start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: str,
        config: dict,
        wandb_config: Any,
        name: str,
        resume_step: int = 0,
        main: bool = True,
    ):
        self._file, self._tracker = None, None
        if not main:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if kind != "none":
            self._tracker = _started(kind, folder, config, wandb_config, name, resume_step)
        _rewind(folder / LOG, resume_step)
        self._file = (folder / LOG).open("a", encoding="utf-8")

    def log(self, metrics: dict, step: int) -> None:
        """Record a step's metrics: one line, flushed, with null for values that are not finite (JSON lacks them)."""
        if self._file is None:
            return
        values = {name: _plain(value) for name, value in metrics.items() if name != "step"}
        line = {"step": step} | {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._tracker is not None:
            numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
            self._tracker.log(numbers, step=step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tracker is not None:
            self._tracker.finish()
        self._file = self._tracker = None


def _rewind(path: Path, step: int) -> None:
    """Remove the lines after ``step``, and a torn last line."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    fresh = path.with_name(f".tmp-{path.name}")
    fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(fresh, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _plain(value: Any) -> Any:
    """A tensor or a NumPy scalar as a plain number."""
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite(_plain(item)) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _started(kind: str, folder: Path, config: dict, wandb: Any, name: str, resume_step: int) -> GeneralTracker:
    if kind == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=resume_step + 1 if resume_step else None)
    else:
        if wandb.resume and not wandb.run_id:
            raise UserError("wandb.resume=true: needs the run to continue; set wandb.run_id", key="wandb.run_id")
        own = folder / WANDB_ID  # a resumed run continues its own
        tracker = WandBTracker(
            wandb.project or config["experiment"]["project"],
            entity=wandb.entity,
            name=name,
            id=wandb.run_id or (own.read_text().strip() if resume_step and own.exists() else None),
            resume="allow" if wandb.resume or resume_step else None,
            dir=str(folder),
            config=config,
            mode=os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline"),
        )
    try:
        tracker.start()
    except ImportError as error:
        remedy = f"not installed; pip install {kind}"
        raise UserError(f"experiment.tracker={kind}: {remedy}", key="experiment.tracker") from error
    except Exception as error:  # wandb's own errors, and its service process's
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "check wandb.entity and wandb.project, set WANDB_MODE=offline, or use experiment.tracker=none"
        raise UserError(
            f"experiment.tracker={kind}: could not start ({reason}); {remedy}", key="experiment.tracker"
        ) from error
    if kind == "wandb":
        own.write_text(f"{tracker.tracker.id}\n")
    return tracker


def _logged_in() -> bool:
    """Whether there is a key for wandb's server: in the environment, or in the file of `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

"""A run's log: one JSON line per optimizer step in log.jsonl, always; wandb or tensorboard besides, if configured."""

import json
import math
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from t3d.common.errors import UserError

LOG = "log.jsonl"
WANDB_ID = "wandb_run_id"


class Tracker:
    """Where a run's metrics go. On other than the main process it does nothing.

    Args:
        folder: the run's. kind: "none", "wandb" or "tensorboard".
        config: the run's resolved configuration, as plain dicts. wandb_config: entity, project, run_id, resume.
        name: the run's name, for people.
        resume_step: optimizer steps done already. Lines of later steps, which a resumed run will write again, leave
            log.jsonl; so at 0 the log begins anew.

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
        assert kind in ("none", "wandb", "tensorboard"), kind
        self._file = self._wandb = self._tensorboard = None
        if not main:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "wandb":
            self._wandb = _start_wandb(folder, config, wandb_config, name, resume_step)
        elif kind == "tensorboard":
            self._tensorboard = _start_tensorboard(folder, resume_step)
        _rewind(folder / LOG, resume_step)
        self._file = (folder / LOG).open("a", encoding="utf-8")

    def log(self, metrics: dict, step: int) -> None:
        """Record a step's metrics: one line, flushed, with null for what is not finite (JSON has no word for it)."""
        if self._file is None:
            return
        record = {"step": step} | {name: _plain(value) for name, value in metrics.items() if name != "step"}
        line = {name: _finite(value) for name, value in record.items()}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        scalars = {
            name: value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._file = self._wandb = self._tensorboard = None


def _rewind(path: Path, step: int) -> None:
    """Drop the lines after ``step``, and one that a kill has cut off."""
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
    """A number out of a tensor or a NumPy scalar."""
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(_plain(item)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(_plain(item)) for item in value]
    return value


def _start_tensorboard(folder: Path, resume_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("experiment.tracker=tensorboard: not installed; pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)


def _start_wandb(folder: Path, config: dict, settings: Any, name: str, resume_step: int):
    try:
        import wandb
    except ImportError as error:
        raise UserError("experiment.tracker=wandb: not installed; pip install wandb") from error
    if settings.resume and not settings.run_id:
        raise UserError("wandb.resume=true: which run? set wandb.run_id")
    run_id, id_file = settings.run_id, folder / WANDB_ID
    if run_id is None and resume_step and id_file.exists():  # our own run goes on
        run_id = id_file.read_text().strip()
    try:
        run = wandb.init(
            entity=settings.entity,
            project=settings.project or config["experiment"]["project"],
            name=name,
            id=run_id,
            resume="allow" if settings.resume or resume_step else None,
            dir=str(folder),
            config=config,
            mode=os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline"),
        )
    except Exception as error:  # wandb's own errors, and those of its service process
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"experiment.tracker=wandb: could not start ({reason}); check wandb.entity and wandb.project, "
            "set WANDB_MODE=offline, or use experiment.tracker=none"
        ) from error
    id_file.write_text(f"{run.id}\n")
    return run


def _logged_in() -> bool:
    """Is there a key for wandb's server: in the environment, or where `wandb login` puts it?"""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

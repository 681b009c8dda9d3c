"""Checkpoints of a training run, on accelerate's save_state / load_state: written aside and renamed when complete.

    root/checkpoint-00000256/   everything accelerate saves, trainer_state.json and complete.json

``complete.json`` is written last and lists every file with its size, so a checkpoint can be told from its remains. The
folder must be one that all processes see.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load as safe_load

from t3d.errors import UserError

STATE, MARKER = "trainer_state.json", "complete.json"
TEMPORARY = ".tmp-"
# `.replaced` is what a new save of the same step found in its place. It counts until the new one is there.
FOLDER = re.compile(r"checkpoint-(\d+)(\.replaced)?")


def save(accelerator: Any, root: Path, step: int, state: dict, limit: int | None) -> Path:
    """Save everything that accelerate has prepared or registered, and the trainer's state. All processes call it.

    Args:
        step: optimizer steps done. state: JSON-serialisable; ``load`` returns it.
        limit: how many checkpoints to keep, the one just written included; None = all.

    Returns:
        root/checkpoint-<step>, complete. A process killed at any moment leaves the earlier checkpoints as they were.
    """
    root = Path(root)
    final = root / f"checkpoint-{step:08d}"
    partial = root / f"{TEMPORARY}{final.name}"
    if accelerator.is_main_process:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _seal(partial, {"step": step, "num_processes": accelerator.num_processes, "state": state})
        _put_in_place(partial, final)
        _prune(root, final, limit)
    accelerator.wait_for_everyone()
    return final


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint below ``root``; None where there is none."""
    return next((folder for folder in _newest_first(Path(root)) if fault(folder) is None), None)


def load(accelerator: Any, path: Path) -> dict:
    """Load a checkpoint into what accelerate has prepared; all processes call it.

    Returns:
        the trainer's state, as given to ``save``.

    Raises:
        UserError: the folder is not a complete checkpoint, or is one of another number of DeepSpeed / FSDP processes.
    """
    path = Path(path)
    if found := fault(path):
        raise UserError(f"{path}: not a complete checkpoint ({found}); resume from another, or with auto")
    record = json.loads((path / STATE).read_text())
    sharded = accelerator.distributed_type.value in ("DEEPSPEED", "FSDP")
    if sharded and record["num_processes"] != accelerator.num_processes:
        raise UserError(
            f"{path}: saved by {record['num_processes']} processes, loaded by {accelerator.num_processes}; "
            "sharded states need the same number"
        )
    accelerator.load_state(str(path))
    _check_random_state(path, accelerator.process_index)
    return record["state"]


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where it is complete."""
    try:
        sizes = json.loads((path / MARKER).read_text())
    except (OSError, ValueError):
        return f"no {MARKER}"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def _seal(folder: Path, record: dict) -> None:
    """Add the trainer's state and the marker, and bring everything to the disk before the folder gets its name."""
    (folder / STATE).write_text(json.dumps(record, indent=1))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    for path in files:
        _sync(path)
    (folder / MARKER).write_text(json.dumps(sizes, indent=1))
    for path in (folder / MARKER, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def _put_in_place(partial: Path, final: Path) -> None:
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        if replaced.exists():
            _remove(replaced)
        os.rename(final, replaced)
    os.rename(partial, final)
    _sync(final.parent)


def _prune(root: Path, written: Path, limit: int | None) -> None:
    """Keep ``written`` and the newest others; everything that a new save has replaced goes."""
    others = [folder for folder in _newest_first(root) if folder != written]
    kept = [folder for folder in others if folder.suffix != ".replaced"][: None if limit is None else limit - 1]
    for folder in others:
        if folder not in kept:
            _remove(folder)


def _newest_first(root: Path) -> list[Path]:
    """All checkpoint folders, complete or not, the highest step first and a replaced one behind its successor."""
    if not root.is_dir():
        return []
    found = [(match, path) for path in root.iterdir() if path.is_dir() and (match := FOLDER.fullmatch(path.name))]
    found.sort(key=lambda item: (-int(item[0][1]), item[0][2] is not None))
    return [path for _, path in found]


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves no half of it under its own name."""
    doomed = folder.with_name(f"{TEMPORARY}remove-{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_random_state(path: Path, process_index: int) -> None:
    """accelerate only logs it when it fails to restore the random states; a resumed run must not differ in silence.

    A process that the saving run did not have has no state to restore.
    """
    file = path / f"random_states_{process_index}.pkl"
    if file.exists() and not torch.equal(safe_load(file)["torch_manual_seed"], torch.get_rng_state()):
        raise RuntimeError(f"{file}: accelerate did not restore the random states")

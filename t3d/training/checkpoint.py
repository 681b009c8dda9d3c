"""Checkpoints of a training run, on accelerate's save_state / load_state.

    root/checkpoint-00000256/   everything accelerate saves, trainer_state.json and complete.json

A checkpoint is written under another name and renamed when it is complete. ``complete.json`` is written last. It lists
every file with its size and CRC-32, so an incomplete checkpoint is recognised. All processes must see the folder.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load as safe_load
from safetensors import SafetensorError

from t3d.common.errors import UserError
from t3d.training import regrouping
from t3d.training.distribution import UNSHARDED, kind
from t3d.training.regrouping import check_ends

log = logging.getLogger(__name__)

# On a full disk: torch.save, and torch.load of a file that torch up to 2.9 left without its end and without an error
TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "iostream error", "unexpected pos", "failed finding central directory")
STATE, MARKER = "trainer_state.json", "complete.json"
TEMPORARY = ".tmp-"
# `.replaced` is an older checkpoint of the same step. It counts until the new checkpoint is complete.
FOLDER = re.compile(r"checkpoint-(\d+)(\.replaced)?")


def save(accelerator: Any, root: Path, step: int, state: dict, limit: int | None) -> Path:
    """Save everything that accelerate has prepared or registered, and the trainer's state. All processes call it.

    Args:
        step: optimizer steps done. state: JSON-serialisable; ``load`` returns it.
        limit: number of checkpoints to keep, the new one included; None = all.

    Returns:
        root/checkpoint-<step>, complete. A kill at any moment leaves the earlier checkpoints unchanged.

    Raises:
        UserError: it could not be written (a full disk, a quota). Its partial files are removed.
    """
    root = Path(root)
    final = root / f"checkpoint-{step:08d}"
    partial = root / f"{TEMPORARY}{final.name}"
    with writing(final, partial):
        if accelerator.is_main_process:
            root.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(root)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            record = {"step": step, "num_processes": accelerator.num_processes, "kind": kind(accelerator)}
            _seal(partial, record | {"state": state})
            _put_in_place(partial, final)
            _prune(root, final, limit)
        accelerator.wait_for_everyone()
    return final


def _remove_leftovers(root: Path) -> None:
    """Remove the partial folders of a process that was killed while it wrote or deleted a checkpoint."""
    for leftover in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)


@contextlib.contextmanager
def writing(place: Path, partial: Path | None = None) -> Iterator[None]:
    """Turn the errors of a full disk into a UserError that names ``place``, and delete ``partial``.

    With several processes the others wait for this process until the launcher ends them all.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_CANNOT_WRITE):
            raise
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"{place}: could not be written ({reason}); earlier files are unchanged: make room, and continue with "
            "experiment.resume=auto",
            str(place),
        ) from error


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint below ``root``, with every byte checked; None if there is none.

    A newer, damaged checkpoint gives a warning and is renamed to ``<name>.damaged``, so that it is never used again.
    One process calls this function.
    """
    for folder in _newest_first(Path(root)):
        found = fault(folder)
        if found is None:
            return folder
        log.warning("%s is damaged (%s): it is renamed, and the checkpoint before it is used", folder, found)
        folder.rename(_free_name(folder))
    return None


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{count or ''}") for count in range(len(os.listdir(path.parent)) + 1))
    return next(name for name in names if not name.exists())


def prepare(accelerator: Any, path: Path) -> None:
    """Check the checkpoint for ``load``, before accelerate prepares anything. All processes call it.

    Raises:
        UserError: the checkpoint is not complete, or a launch with other sharding wrote it.
    """
    if _split_otherwise(accelerator, _record(accelerator, Path(path))):
        regrouping.read_universal(accelerator)


def load(accelerator: Any, path: Path) -> dict:
    """Load a checkpoint into the objects that accelerate has prepared. All processes call it, after ``prepare``.

    If the states are split over another number of processes, they are first regrouped in a folder next to the
    checkpoint. Only this start uses that folder. It is deleted after loading, or by the next save after a kill.

    Returns:
        The trainer's state, as given to ``save``.

    Raises:
        UserError: as ``prepare``; or the disk has no room for the regrouped states.
    """
    path = Path(path)
    record = _record(accelerator, path)
    if _split_otherwise(accelerator, record):
        regrouped = path.with_name(f"{TEMPORARY}regrouped-{path.name}")
        if accelerator.is_main_process:
            log.warning(
                "%s: its states are split over %d processes; regrouping them for %d. A large model takes some minutes, "
                "and twice its room on the disk meanwhile",
                *(path, record["num_processes"], accelerator.num_processes),
            )
            _remove_leftovers(path.parent)
            with writing(regrouped, regrouped):
                regrouping.regroup(path, regrouped)
        accelerator.wait_for_everyone()
        regrouping.load(accelerator, regrouped)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(regrouped)
    else:
        accelerator.load_state(str(path))
    _check_random_state(path, accelerator.process_index)
    return record["state"]


def _record(accelerator: Any, path: Path) -> dict:
    """The checkpoint's own record. Raises UserError if this launch cannot load accelerate's files."""
    if found := fault(path, contents=False):
        raise UserError(
            f"{path}: not a complete checkpoint ({found}); resume from another one, or with auto", str(path)
        )
    record = json.loads((path / STATE).read_text())
    if record["kind"] != kind(accelerator):
        raise UserError(
            f"{path}: saved with {record['kind']}, loaded with {kind(accelerator)}; launch with the accelerate config "
            "of the run that saved it",
            str(path),
        )
    return record


def _split_otherwise(accelerator: Any, record: dict) -> bool:
    return record["kind"] != UNSHARDED and record["num_processes"] != accelerator.num_processes


def fault(path: Path, contents: bool = True) -> str | None:
    """The fault of a checkpoint's files; None if it is complete. ``contents`` = False checks only names and sizes."""
    try:
        files = json.loads((path / MARKER).read_text())
    except (OSError, ValueError):
        return f"no {MARKER}"
    if not all(isinstance(entry, dict) for entry in files.values()):
        return "written by an earlier version"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
    if contents:
        for name, checksum in _checksums([path / name for name in files]).items():
            if checksum != files[name.relative_to(path).as_posix()]["crc32"]:
                return f"{name.name} has changed since it was written"
    return None


def _checksums(files: list[Path]) -> dict[Path, int]:
    """CRC-32 of each file, several at a time, because checkpoints of large models have tens of GB."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(_checksum, files), strict=True))


def _checksum(path: Path) -> int:
    value, buffer = 0, memoryview(bytearray(1 << 22))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return value


def _seal(folder: Path, record: dict) -> None:
    """Add the trainer's state and ``complete.json``, and force everything to the disk before the rename."""
    (folder / STATE).write_text(json.dumps(record, indent=1))
    check_ends(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum}
        for path, checksum in _checksums(files).items()
    }
    (folder / MARKER).write_text(json.dumps(entries, indent=1))
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
    """Keep ``written`` and the newest others; delete replaced checkpoints."""
    others = [folder for folder in _newest_first(root) if folder != written]
    kept = [folder for folder in others if folder.suffix != ".replaced"][: None if limit is None else limit - 1]
    for folder in others:
        if folder not in kept:
            _remove(folder)


def _newest_first(root: Path) -> list[Path]:
    """All checkpoint folders, complete or not, by falling step; a replaced one follows its successor."""
    if not root.is_dir():
        return []
    found = [(match, path) for path in root.iterdir() if path.is_dir() and (match := FOLDER.fullmatch(path.name))]
    found.sort(key=lambda item: (-int(item[0][1]), item[0][2] is not None))
    return [path for _, path in found]


def _remove(folder: Path) -> None:
    """Delete a checkpoint. A kill in between leaves no half of it under its own name."""
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
    """Raise if accelerate did not restore the random states. accelerate itself only logs that failure.

    A process that the saving run did not have has no state to restore.
    """
    file = path / f"random_states_{process_index}.pkl"
    if file.exists() and not torch.equal(safe_load(file)["torch_manual_seed"], torch.get_rng_state()):
        raise RuntimeError(f"{file}: accelerate did not restore the random states")

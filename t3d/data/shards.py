"""Trajectories as JSONL shards, one file per process, keyed by id. Each trajectory is appended when it is finished.

A killed run leaves at most a torn last line, which readers ignore and the next writer cuts off.
"""

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from t3d.common.errors import UserError, disk_faults_as_user_errors
from t3d.common.jsonfiles import atomic_write
from t3d.data.trajectory import Trajectory, split_id

log = logging.getLogger(__name__)


@dataclass
class ReadReport:
    """Counts of the records that reading left out, by reason."""

    torn: int = 0  # unfinished last lines of shards (a killed writer)
    repeated: int = 0  # ids seen before
    mismatched: int = 0  # text without ids whose tokens do not fit its step map
    first_mismatch: str = ""

    def mismatch(self, what: str) -> None:
        self.mismatched += 1
        self.first_mismatch = self.first_mismatch or what

    def announce(self, source: Path) -> None:
        """One warning line, or none when nothing was left out."""
        parts = (
            (self.torn, "torn last lines"),
            (self.repeated, "repeated ids"),
            (self.mismatched, "responses that do not fit their step map"),
        )
        if said := ", ".join(f"{count} {what}" for count, what in parts if count):
            first = f" (first: {self.first_mismatch})" if self.first_mismatch else ""
            log.warning("%s: left out %s%s", source, said, first)


class ShardWriter:
    """Appends records to `<folder>/shard-<rank>.jsonl`, one whole line each. Written records survive a kill.

    Opening truncates the torn last line of a killed writer of the same rank. Records are forced to the device every
    `sync_every` records (0: only on closing). That protects against a stop of the machine; the process may stop freely.
    """

    def __init__(self, folder: str | Path, rank: int, sync_every: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"shard-{rank:05d}.jsonl"
        self.sync_every = sync_every
        self.written = 0
        self._file = open(self.path, "ab")
        try:  # held until the file is closed, by a kill too
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{self.path}: another process writes it; wait for it, or stop it", str(self.path)
            ) from None
        intact = _intact_bytes(self.path)
        if intact < self.path.stat().st_size:
            log.warning("%s: removed the torn last line of a stopped run", self.path)
            self._file.truncate(intact)

    def write(self, trajectory: Trajectory) -> None:
        with disk_faults_as_user_errors(self.path):
            self._file.write(json.dumps(vars(trajectory), ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        self.written += 1
        if self.sync_every and self.written % self.sync_every == 0:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            with disk_faults_as_user_errors(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shard_files(folder: str | Path) -> list[Path]:
    """The shards of a folder, in the order of their names."""
    return sorted(Path(folder).glob("shard-*.jsonl"))


def read_shards(source: str | Path, report: ReadReport | None = None, ordered: bool = False) -> Iterator[Trajectory]:
    """Stream the trajectories of a shard folder (or of one .jsonl file), shards by name and lines as written.

    A torn last line of a shard is ignored, and a repeated id is dropped. `report` counts both, and one warning at the
    end names the counts. `ordered` sorts by (data set, row, sample), with only ids and file offsets in memory. Any
    other bad line is a `UserError` that names file and line.
    """
    source, report = Path(source), report if report is not None else ReadReport()
    if ordered:
        yield from _read_ordered(source, report)
    else:
        seen: set[str] = set()
        for path, number, _, line in _lines(source, report):
            trajectory = _parse_line(path, number, line)
            if trajectory.id in seen:
                report.repeated += 1
                continue
            seen.add(trajectory.id)
            yield trajectory
    report.announce(source)


def finished_ids(folder: str | Path) -> set[str]:
    """The ids in a shard folder, read without building the records; empty when there is no such folder."""
    return {_line_id(path, number, line) for path, number, _, line in _lines(Path(folder), ReadReport())}


def _read_ordered(source: Path, report: ReadReport) -> Iterator[Trajectory]:
    places: dict[tuple[str, int, int], tuple[Path, int, int]] = {}
    for path, number, offset, line in _lines(source, report):
        key = split_id(_line_id(path, number, line))
        if key in places:
            report.repeated += 1
        else:
            places[key] = (path, number, offset)
    opened: dict[Path, IO[bytes]] = {}
    try:
        for key in sorted(places):
            path, number, offset = places[key]
            if path not in opened:
                opened[path] = open(path, "rb")
            opened[path].seek(offset)
            yield _parse_line(path, number, opened[path].readline())
    finally:
        for file in opened.values():
            file.close()


def _lines(source: Path, report: ReadReport) -> Iterator[tuple[Path, int, int, bytes]]:
    """(file, line number from 1, byte offset, line) of every intact line."""
    for path in shard_files(source) if source.is_dir() else [source] if source.exists() else []:
        size = path.stat().st_size  # another process may still append; later lines are not read
        end, offset = _intact_bytes(path), 0
        report.torn += end < size
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if offset >= end:
                    break
                yield path, number, offset, line
                offset += len(line)


def _intact_bytes(path: Path) -> int:
    """The bytes of a shard without a last line that has no end or is no JSON."""
    with open(path, "rb") as file:
        end = _line_end_before(file, file.seek(0, os.SEEK_END))
        start = _line_end_before(file, end - 1)
        file.seek(start)
        try:
            json.loads(file.read(end - start) or b"{}")
        except ValueError:
            return start
    return end


def _line_end_before(file: IO[bytes], position: int, chunk: int = 1 << 16) -> int:
    """The offset just after the last newline in front of `position`, or 0."""
    while position > 0:
        start = max(0, position - chunk)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


_ID = re.compile(rb'\{"id": ("(?:[^"\\]|\\.)*")')


def _line_id(path: Path, number: int, line: bytes) -> str:
    match = _ID.match(line)  # as ShardWriter writes it; any other line is parsed whole
    return json.loads(match[1]) if match else _parse_line(path, number, line).id


def _parse_line(path: Path, number: int, line: bytes) -> Trajectory:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        return Trajectory.from_dict(record)
    except (ValueError, TypeError) as error:
        remedy = "remove the line, or delete the folder and roll out again"
        raise UserError(f"{path}, line {number}: {error}; {remedy}", str(path)) from error


def claim_folder(folder: str | Path, settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
    """Bind a shard folder to the settings of its run, so that a later run cannot mix in other settings.

    The first call writes `<folder>/settings.json`. A later call with other settings is a `UserError` that names the
    differing keys. If the folder is older than a key of `defaults`, the default is its value.
    """
    path = Path(folder) / "settings.json"
    settings = json.loads(json.dumps(settings))  # as read from the file: tuples are lists, keys are strings
    if not path.exists():
        with atomic_write(path) as file:
            file.write(json.dumps(settings, indent=2, ensure_ascii=False))
        return
    try:
        claimed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete the folder and roll out again", str(path)) from error
    claimed = (defaults or {}) | claimed
    absent = "(absent)"
    keys = [*settings, *sorted(claimed.keys() - settings.keys())]
    other = [key for key in keys if claimed.get(key, absent) != settings.get(key, absent)]
    if other:
        old, new = (", ".join(f"{key}={values.get(key, absent)}" for key in other) for values in (claimed, settings))
        raise UserError(
            f"{folder} holds rollouts with {old}, this run has {new}: choose another experiment.project or delete the "
            "folder",
            other[0],
        )

"""Boxes: starting them, reading their output, ending them."""

from __future__ import annotations

import itertools
import marshal
import os
import selectors
import shutil
import struct
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from t3d.grading.sandbox import world

_USERS = range(61184, 65520)  # systemd leaves these to short-lived users
_next_user = itertools.count(os.getpid())
_GRACE = 60.0  # seconds a supervisor may be late, on a machine under heavy load


@dataclass(frozen=True)
class Limits:
    """The limits of a box.

    Attributes:
        cpu: seconds of CPU time, all its processes together.
        wall: seconds from its start; None = 10 cpu + 5. It ends programs that sleep. It is generous, so that a busy
            machine changes no verdict.
        memory: bytes of address space per process, and of resident memory of all together.
        disk: bytes of its folder, and of one file.
        output: bytes on stdout and stderr.
    """

    cpu: float = 1.0
    wall: float | None = None
    memory: int = 1 << 30
    processes: int = 32
    open_files: int = 64
    disk: int = 64 << 20
    output: int = 16 << 20

    @property
    def wall_seconds(self) -> float:
        return 10 * self.cpu + 5 if self.wall is None else self.wall


class SandboxError(RuntimeError):
    """A box did not start, or its supervisor no longer answers: the machine's fault, not the program's."""


class Box:
    """A program in a box, running from the constructor on; leaving the `with` block ends all its processes.

    Attributes:
        role: "script" and "quiet" (without the prompts of input()) run order["program"]. "serve" answers calls of its
            names. "check" runs the tests of order["plan"].
        channel: the descriptor that it gets as fd 3.
        stdout, stderr: its output, up to about the limit.
        ending: the supervisor's report (`_supervise` of inside/box.py), or {"end": "output"}; empty while it runs.

    Raises SandboxError if the box cannot start (also later, from `attend`).
    """

    def __init__(
        self,
        role: str,
        order: dict[str, Any],
        limits: Limits,
        walls: str,
        channel: int | None = None,
        stdin: str | None = None,
    ) -> None:
        self.stdout, self.stderr = bytearray(), bytearray()
        self.ending: dict[str, Any] = {}
        self._limits = limits
        self._deadline = time.monotonic() + limits.wall_seconds + _GRACE
        self._status = bytearray()
        user = _user(walls)
        self._host_folder = _host_folder(user) if walls == "rlimits" else None
        pipes = [os.pipe() for _ in range(4)]
        self._control: int | None
        (control, self._control), *readers = pipes
        sinks = (self.stdout, self.stderr, self._status)
        self._sinks = {reader: sink for (reader, _), sink in zip(readers, sinks, strict=True)}
        theirs = [control] + [writer for _, writer in readers]
        shown = world.describe(walls)
        folder = f"{self._host_folder}/work" if self._host_folder else "/tmp"
        order = order | asdict(limits) | shown
        order |= {"role": role, "walls": walls, "folder": folder, "user": user, "wall": limits.wall_seconds}
        order |= {"stdin": stdin, "channel": channel, "status": theirs[3]}
        try:
            self._process = subprocess.Popen(
                world.command(walls, shown, limits.disk),
                stdin=control,
                stdout=theirs[1],
                stderr=theirs[2],
                pass_fds=[fd for fd in (theirs[3], channel) if fd is not None],
                env=world.environment(walls, folder),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._release()
            raise SandboxError(f"no process for a box: {error}") from error
        finally:
            for fd in theirs:
                os.close(fd)
        data = marshal.dumps(order)
        try:
            with open(self._control, "wb", closefd=False) as file:
                file.write(struct.pack(">Q", len(data)) + data)
        except BrokenPipeError:
            pass  # its report, or the lack of one, says why

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._release()

    def stop(self) -> None:
        """End all processes of the box, by closing the supervisor's control channel."""
        if self._control is not None:
            os.close(self._control)
            self._control = None

    def _release(self) -> None:
        self.stop()
        for fd in self._sinks:
            os.close(fd)
        self._sinks = {}
        if self._host_folder is not None:
            shutil.rmtree(self._host_folder, ignore_errors=True)

    def _read(self, fd: int) -> None:
        """Read the available output; close a stream at its end."""
        data = os.read(fd, 1 << 16)
        if data:
            self._sinks[fd] += data
            if len(self.stdout) + len(self.stderr) > self._limits.output and not self.ending:
                self.ending = {"end": "output"}
                self.stop()
            return
        sink = self._sinks.pop(fd)
        os.close(fd)
        if sink is self._status and not self.ending:
            self.ending = marshal.loads(sink) if sink else {"end": "failed", "detail": self._last_words()}
        if self.ending and self.ending["end"] == "failed":
            raise SandboxError(self.ending["detail"])

    def _last_words(self) -> str:
        return f"it left without a report: {self.stderr.decode(errors='replace')[-2000:]}"


def attend(*boxes: Box, until: Box | None = None) -> None:
    """Read from boxes until `until`, or all of them, have ended and their output is complete. Raises SandboxError."""
    awaited = boxes if until is None else (until,)
    while any(box._sinks for box in awaited):
        with selectors.DefaultSelector() as streams:
            for box in boxes:
                for fd in box._sinks:
                    streams.register(fd, selectors.EVENT_READ, box)
            for key, _ in streams.select(timeout=1.0):
                key.data._read(key.fd)
        if any(time.monotonic() > box._deadline for box in awaited):
            raise SandboxError("its supervisor fell silent")


def run_script(program: str, limits: Limits, walls: str, stdin: str = "", prompts: bool = True) -> Box:
    """Run a program to its end, as `python answer.py` does. The returned box has its ending and its output.

    prompts: whether input() writes its prompt.
    """
    with Box("script" if prompts else "quiet", {"program": program}, limits, walls, stdin=stdin) as box:
        attend(box)
    return box


def _user(walls: str) -> int | None:
    """The user id for a boxed program, if this process may choose one. Each box has its own, because the kernel counts
    processes per user.
    """
    if os.geteuid() != 0 or walls not in ("namespaces-root", "rlimits"):
        return None
    if walls == "rlimits" and not _anybody_may_read(os.path.dirname(os.__file__)):
        return None
    return _USERS[next(_next_user) % len(_USERS)]


def _anybody_may_read(folder: str) -> bool:
    return all(path.stat().st_mode & 0o005 == 0o005 for path in (Path(folder), *Path(folder).parents))


def _host_folder(user: int | None) -> str:
    """A folder on this machine for a program without walls: work/, the program's, and packages/."""
    folder = tempfile.mkdtemp(prefix="t3d-box-")
    world.link_packages(f"{folder}/packages")
    os.mkdir(f"{folder}/work", 0o700)
    if user is not None:
        os.chmod(folder, 0o711)
        os.chown(f"{folder}/work", user, user)
    return folder

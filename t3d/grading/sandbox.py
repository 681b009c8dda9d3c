"""Boxes for untrusted Python programs: processes of their own behind walls, limited, and gone afterwards.

    walls         a program sees                      made by
    "namespaces"  the standard library, numpy, /tmp   this package, as root or as anybody, from Linux namespaces
    "bubblewrap"  the same                            bwrap, where the machine grants namespaces to it alone
    "rlimits"     all files of its user               nothing: refused unless asked for

Which can be had is found out by running a program (`isolation`). Behind all of them a seccomp filter takes away system
calls that no answer needs, network sockets among them; the environment is empty; the kernel bounds each process, and a
supervisor looks every 20 ms at the CPU time, the resident memory and the number of processes of the whole tree
(`inside/box.py`). The sum of memory is bounded up to what can be touched in 20 ms, plus /tmp, which is memory.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import selectors
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t3d.common.errors import UserError

_INSIDE = Path(__file__).resolve().parent / "inside"
_SYSTEM_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
_USERS = range(61184, 65520)  # systemd leaves these to short-lived users
_next_user = itertools.count(os.getpid())
_GRACE = 60.0  # seconds a supervisor may be late, on a machine under heavy load


@dataclass(frozen=True)
class Limits:
    """What a box may use.

    cpu: seconds of CPU time, all its processes together. wall: seconds from its start, None = 10 cpu + 5: generous, so
    that a busy machine changes no verdict; it ends programs that sleep. memory: bytes of address space per process and
    of resident memory together. disk: bytes of its folder and of one file. output: bytes on stdout and stderr.
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
    """A box did not start, or its supervisor fell silent: the machine's fault, not the program's."""


class Box:
    """A program in a box, running from the constructor on; leaving the `with` block ends all its processes.

    role: a function of inside/roles.py; order: what it needs to know. channel: the descriptor that it gets as fd 3.
    stdout, stderr: what was written, up to about the limit. ending: the supervisor's report (see box._supervise), or
    {"end": "output"}; None while it runs.

    Raises SandboxError where the box cannot start (also later, from `attend`).
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
        self.stdout, self.stderr, self.ending = bytearray(), bytearray(), None
        self._limits = limits
        self._deadline = time.monotonic() + limits.wall_seconds + _GRACE
        self._status = bytearray()
        self._host_folder = tempfile.mkdtemp(prefix="t3d-box-") if walls == "rlimits" else None
        user = _user(walls)
        if self._host_folder and user is not None:
            os.chown(self._host_folder, user, user)
        folder = self._host_folder or "/tmp"
        pipes = [os.pipe() for _ in range(4)]
        (control, self._control), *readers = pipes
        self._sinks = {
            reader: sink for (reader, _), sink in zip(readers, (self.stdout, self.stderr, self._status), strict=True)
        }
        theirs = [control] + [writer for _, writer in readers]
        order = order | {
            "role": role,
            "walls": walls,
            "status": theirs[3],
            "channel": channel,
            "stdin": stdin,
            "folder": folder,
            "user": user,
            "cpu": limits.cpu,
            "wall": limits.wall_seconds,
            "memory": limits.memory,
            "processes": limits.processes,
            "open_files": limits.open_files,
            "disk": limits.disk,
            **_world(walls),
        }
        try:
            self._process = subprocess.Popen(
                _command(walls, order, limits),
                stdin=control,
                stdout=theirs[1],
                stderr=theirs[2],
                pass_fds=[fd for fd in (theirs[3], channel) if fd is not None],
                env=_environment(folder),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._release()
            raise SandboxError(f"no process for a box: {error}") from error
        finally:
            for fd in theirs:
                os.close(fd)
        data = json.dumps(order).encode()
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
        """Tell the supervisor to end it all, by closing what it listens to."""
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
        """Take what there is; at the end of a stream let go of it."""
        data = os.read(fd, 1 << 16)
        if data:
            self._sinks[fd] += data
            if len(self.stdout) + len(self.stderr) > self._limits.output and self.ending is None:
                self.ending = {"end": "output"}
                self.stop()
            return
        sink = self._sinks.pop(fd)
        os.close(fd)
        if sink is self._status and self.ending is None:
            line = sink.partition(b"\n")[0]
            self.ending = json.loads(line) if line else {"end": "failed", "detail": self._last_words()}
        if self.ending and self.ending["end"] == "failed":
            raise SandboxError(self.ending["detail"])

    def _last_words(self) -> str:
        return f"it left without a report: {self.stderr.decode(errors='replace')[-2000:]}"


def attend(*boxes: Box, until: Box | None = None) -> None:
    """Read from boxes until `until`, or all of them, have ended and said everything. Raises SandboxError."""
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


def run_script(program: str, limits: Limits, walls: str, stdin: str = "") -> Box:
    """Run a program as a script to its end. The box returned has ended; it tells how, and what was written."""
    with Box("script", {"program": program}, limits, walls, stdin=stdin) as box:
        attend(box)
    return box


# --- what a box is made of -------------------------------------------------------------------------------------------


def _python() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return os.path.realpath(sys.executable)


def _user(walls: str) -> int | None:
    """The user id for a boxed program, where this process may choose one: one per box, because the kernel counts
    processes per user.
    """
    if os.geteuid() != 0 or walls not in ("namespaces-root", "rlimits"):
        return None
    if walls == "rlimits" and not _anybody_may_read(os.path.dirname(os.__file__)):
        return None
    return _USERS[next(_next_user) % len(_USERS)]


def _anybody_may_read(folder: str) -> bool:
    return all(path.stat().st_mode & 0o005 == 0o005 for path in (Path(folder), *Path(folder).parents))


def _environment(folder: str) -> dict[str, str]:
    return {
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": "/usr/bin:/bin",
        "LC_ALL": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "PYTHONHASHSEED": "0",  # the same order of sets, the same verdict
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


@functools.cache
def _world(walls: str) -> dict[str, Any]:
    """What a box shows of the machine: binds (source, target), links (path, target), masks (folders shown empty),
    packages (for sys.path), and where to build (mountpoint).
    """
    binds, links = {}, []
    for path in (*_SYSTEM_LIBRARIES, os.path.join(sys.base_prefix, "lib"), os.path.join(sys.base_prefix, "lib64")):
        if os.path.islink(path):
            links.append((path, os.readlink(path)))
        elif os.path.isdir(path):
            binds[path] = path
    for path in (_python(), "/etc/ld.so.cache"):
        if os.path.exists(path):
            binds[path] = path
    if sys.base_prefix.startswith("/nix/store"):
        binds["/nix/store"] = "/nix/store"
    # A folder inside one that is shown already is shown with it.
    binds = {path: path for path in binds if not any(path.startswith(f"{other}/") for other in binds)}
    installed = [sysconfig.get_path(name, vars=_BASE) for name in ("purelib", "platlib")]
    shown = [path for path in set(installed) if any(path.startswith(f"{bind}/") for bind in binds)]
    masks = sorted(path for path in shown if os.path.isdir(path))
    walled = walls != "rlimits"
    folder = "/inside/packages" if walled else None
    packages = []
    spec = importlib.util.find_spec("numpy")  # finds, does not import
    if spec and spec.origin:
        source = Path(spec.origin).parent
        packages.append(folder or str(source.parent))
        for part in (source, source.with_name("numpy.libs")):
            if walled and part.is_dir():
                binds[str(part)] = f"{folder}/{part.name}"
    code = str(_INSIDE)
    if walls == "bubblewrap":
        binds[code] = code = "/inside/code"
    return {
        "binds": list(binds.items()),
        "links": links,
        "masks": masks,
        "packages": packages,
        "mountpoint": tempfile.gettempdir(),
        "python": _python(),
        "code": code,
    }


_BASE = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}


def _command(walls: str, order: dict[str, Any], limits: Limits) -> list[str]:
    start = f"import sys; sys.path.insert(0, {order['code']!r}); import box; box.main()"
    python = [_python(), "-S", "-s", "-P", "-c", start]
    if walls != "bubblewrap":
        return python
    # Old versions know neither --size nor --disable-userns; the seccomp filter does the second's work anyway.
    bwrap = [shutil.which("bwrap"), "--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session"]
    for path, target in order["links"]:
        bwrap += ["--symlink", target, path]
    for source, target in order["binds"]:
        bwrap += ["--ro-bind", source, target]
    for path in order["masks"]:
        bwrap += ["--tmpfs", path, "--remount-ro", path]
    bwrap += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    bwrap += ["--size", str(limits.disk), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return [*bwrap, "--", *python]


# --- which walls can be had ------------------------------------------------------------------------------------------

_PROBE = """
import os, socket, sys
def fails(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return True
assert fails(open, sys.argv[0] + "/../" * 9 + "etc/passwd")
assert fails(os.mkdir, "/escape") and fails(os.listdir, "/home")
assert fails(socket.socket, socket.AF_INET)
assert os.getuid() != 0 and os.getppid() in (0, 1)
open("/tmp/mine", "w").write("x")
print("walled")
"""


def isolation(allow_unsandboxed: bool = False) -> str:
    """The walls of this machine's boxes: "namespaces", "bubblewrap" or "rlimits". The first call runs a program in
    each to see.

    Raises UserError where only "rlimits" can be had and `allow_unsandboxed` does not accept that.
    """
    return walls(allow_unsandboxed).partition("-")[0]


def walls(allow_unsandboxed: bool = False) -> str:
    """As `isolation`, but as `Box` wants it: "namespaces-root" and "namespaces-user" are told apart."""
    found, troubles = _best_walls()
    if found == "rlimits" and not allow_unsandboxed:
        raise UserError(
            f"no sandbox for programs on this machine ({troubles}): they could read your files and use the network; "
            "install bubblewrap or allow user namespaces, or accept that with execute.allow_unsandboxed=true "
            "(--allow-unsandboxed)"
        )
    return found


@functools.cache
def _best_walls() -> tuple[str, str]:
    if sys.platform != "linux":
        raise UserError(
            f"grading of programs needs Linux, this is {sys.platform}; grade the answers on a Linux machine"
        )
    troubles = []
    for kind in ("namespaces-root", "namespaces-user", "bubblewrap"):
        if can_try(kind):
            trouble = probe(kind)
            if trouble is None:
                return kind, ""
            troubles.append(f"{kind}: {trouble}")
    return "rlimits", "; ".join(troubles)


def can_try(kind: str) -> bool:
    """root makes namespaces itself; bwrap, where it is installed, is for those who may not."""
    root = os.geteuid() == 0
    return {"namespaces-root": root, "bubblewrap": not root and shutil.which("bwrap") is not None}.get(kind, True)


def probe(kind: str) -> str | None:
    """None where these walls work here, else what went wrong, in a few words."""
    try:
        box = run_script(_PROBE, Limits(cpu=5.0, wall=30.0), kind)
    except SandboxError as error:
        return str(error).strip().splitlines()[-1][:200]
    if box.stdout.decode(errors="replace").strip() == "walled":
        return None
    return (box.stderr.decode(errors="replace").strip().splitlines() or [str(box.ending)])[-1][:200]

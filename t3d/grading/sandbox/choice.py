"""Finds the walls that this machine can give its boxes, by running a program in each kind."""

from __future__ import annotations

import functools
import os
import shutil
import sys

from t3d.common.errors import UserError
from t3d.grading.sandbox.boxes import Limits, SandboxError, run_script

_PROBE = """
import os, socket, sys
def fails(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return True
assert fails(open, "../" * 9 + "etc/passwd")
assert fails(os.mkdir, "/escape") and fails(os.listdir, "/home")
assert fails(socket.socket, socket.AF_INET)
assert os.getuid() != 0 and os.getppid() in (0, 1)
open("/tmp/mine", "w").write("x")
print("walled")
"""


def isolation(allow_unsandboxed: bool = False) -> str:
    """The walls of this machine's boxes: "namespaces", "bubblewrap" or "rlimits". The first call tests each of them.

    Raises UserError if only "rlimits" works and `allow_unsandboxed` is false.
    """
    return walls(allow_unsandboxed).partition("-")[0]


def walls(allow_unsandboxed: bool = False) -> str:
    """`isolation` in the form for `Box`: it distinguishes "namespaces-root" and "namespaces-user"."""
    found, troubles = _best_walls()
    if found == "rlimits" and not allow_unsandboxed:
        raise UserError(
            f"no sandbox for programs on this machine ({troubles}): they could read your files and use the network; "
            "install bubblewrap, allow user namespaces, or run them without a sandbox by "
            "execute.allow_unsandboxed=true (--allow-unsandboxed)",
            "execute.allow_unsandboxed",
        )
    return found


@functools.cache
def _best_walls() -> tuple[str, str]:
    if sys.platform != "linux":
        raise UserError(
            f"grading of programs needs Linux, this is {sys.platform}; grade the answers on a Linux machine",
            "sys.platform",
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
    """Whether these walls can be tried. root creates namespaces itself; other users need bwrap or user namespaces."""
    root = os.geteuid() == 0
    return {"namespaces-root": root, "bubblewrap": not root and shutil.which("bwrap") is not None}.get(kind, True)


def probe(kind: str) -> str | None:
    """None if these walls work here, else the fault in a few words."""
    try:
        box = run_script(_PROBE, Limits(cpu=5.0, wall=30.0), kind)
    except SandboxError as error:
        return str(error).strip().splitlines()[-1][:200]
    if box.stdout.decode(errors="replace").strip() == "walled":
        return None
    return (box.stderr.decode(errors="replace").strip().splitlines() or [str(box.ending)])[-1][:200]

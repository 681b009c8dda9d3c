"""The part of this machine that a box shows: the interpreter with its libraries, numpy, and the time zones."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_INSIDE = Path(__file__).resolve().parent / "inside"
_SYSTEM_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
_PACKAGES = ("numpy", "numpy.libs", "tzdata")  # besides the standard library
_INHERITED = ("TZ", "LD_LIBRARY_PATH")  # the interpreter may need its libraries
_CODE, _PLACE = "/inside/code", "/inside/packages"

# Prints an interpreter's folders. It finds them from its own place, so the bare interpreter runs this program and not
# the one of a virtual environment.
_QUESTION = """
import json, site, sys, sysconfig
with open("/proc/self/maps") as file:
    mapped = {line.split(maxsplit=5)[5].rstrip("\\n") for line in file if ".so" in line}
print(json.dumps({
    "library": sys.path + [f"{prefix}/{name}" for prefix in (sys.prefix, sys.exec_prefix) for name in ("lib", "lib64")],
    "mapped": sorted(mapped),
    "installed": [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")],
    "zones": (sysconfig.get_config_var("TZPATH") or "").split(":"),
}))
"""


def python() -> str:
    """The interpreter itself, not a link to it nor its copy in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def environment(walls: str, folder: str) -> dict[str, str]:
    """The variables of a boxed program. The time zone is this machine's."""
    variables = {
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "1",  # the same order of sets, the same verdict; 0 would show in sys.flags
        "PYTHONPATH": f"{folder}/../packages" if walls == "rlimits" else _PLACE,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return variables | {name: os.environ[name] for name in _INHERITED if name in os.environ}


@functools.cache
def describe(walls: str) -> dict[str, Any]:
    """The parts of the machine that a box shows, for `inside/box.py` and bubblewrap.

    binds: (source, target), sources without links; links: (path, target); masks: folders shown empty; mountpoint: the
    root of the new world; python: the interpreter; code: the folder with the code of the inside.
    """
    own = _interpreter()
    paths = [*_SYSTEM_LIBRARIES, *own["library"], *own["mapped"], *own["zones"], python()]
    paths += ["/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"]
    paths += ["/nix/store"] if python().startswith("/nix/store/") else []
    paths = [os.path.abspath(path) for path in paths if os.path.isabs(path) and os.path.exists(path)]
    binds = _outermost(map(os.path.realpath, paths))
    links = {link: target for path in paths for link, target in _links_to(path) if not _within(link, binds)}
    masks = {os.path.realpath(path) for path in own["installed"] if os.path.isdir(path)}
    packages = _packages() if walls != "rlimits" else {}
    return {
        "binds": [(path, path) for path in binds] + [(path, f"{_PLACE}/{name}") for name, path in packages.items()],
        "links": sorted(links.items()),
        "masks": sorted(path for path in masks if _within(path, binds)),
        "mountpoint": os.path.realpath(tempfile.gettempdir()),
        "python": python(),
        "code": str(_INSIDE) if walls == "rlimits" else _CODE,
        "code_source": str(_INSIDE),
    }


def link_packages(folder: str) -> None:
    """Link the packages for a box without walls, which sees all of this machine's files."""
    os.mkdir(folder, 0o755)
    for name, path in _packages().items():
        os.symlink(path, os.path.join(folder, name))


def command(walls: str, shown: dict[str, Any], disk: int) -> list[str]:
    """The command line that starts a supervisor. disk: bytes of /tmp, if bubblewrap creates it."""
    code = _CODE if walls == "bubblewrap" else str(_INSIDE)
    start = f"import sys; sys.path.insert(0, {code!r}); import box; box.main()"
    bare = [shown["python"], "-S", "-s", "-P", "-c", start]
    if walls != "bubblewrap":
        return bare
    # Old versions have neither --size nor --disable-userns; the seccomp filter replaces the second.
    bwrap = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session"]
    bwrap += ["--size", str(disk), "--tmpfs", "/tmp"]
    for path, target in shown["links"]:
        bwrap += ["--symlink", target, path]
    for source, target in [*shown["binds"], (shown["code_source"], _CODE)]:
        bwrap += ["--ro-bind", source, target]
    for path in shown["masks"]:
        bwrap += ["--tmpfs", path, "--remount-ro", path]
    bwrap += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--chdir", "/tmp", "--remount-ro", "/"]
    return [*bwrap, "--", *bare]


# --- the interpreter, and the links on the way to it -----------------------------------------------------------------


@functools.cache
def _interpreter() -> dict[str, list[str]]:
    """The interpreter's answer to _QUESTION; empty if it cannot run. Starting a box then reports the reason."""
    line = [python(), "-S", "-s", "-P", "-c", _QUESTION]
    try:
        answer = subprocess.run(line, env=environment("", "/"), cwd="/", capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return {"library": [], "mapped": [], "installed": [], "zones": []}
    return json.loads(answer.stdout)


def _links_to(path: str) -> list[tuple[str, str]]:
    """(link, target) of each symbolic link on the way to an existing path."""
    links: list[tuple[str, str]] = []
    while True:
        steps = [str(step) for step in reversed([Path(path), *Path(path).parents])]
        link = next((step for step in steps if os.path.islink(step)), None)
        if link is None:
            return links
        target = os.path.realpath(link)
        links.append((link, target))
        path = target + path[len(link) :]


def _outermost(paths: Iterable[str]) -> list[str]:
    """The paths that lie inside no other path. A box shows a folder with its content."""
    kept: list[str] = []
    for path in sorted(set(paths), key=len):
        if not _within(path, kept):
            kept.append(path)
    return kept


def _within(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _packages() -> dict[str, str]:
    """Folder of each package that programs may import, as this process would import it."""
    found = {}
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name.partition(".")[0])  # finds, does not import
        if spec and spec.origin:
            folder = os.path.join(os.path.dirname(os.path.dirname(spec.origin)), name)
            if os.path.isdir(folder):
                found[name] = os.path.realpath(folder)
    return found

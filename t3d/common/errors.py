"""Mistakes that a user can correct, and how a script reports them."""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from t3d.common.processes import is_main_process, wait_passively


class UserError(ValueError):
    """A mistake in a command, a configuration or a data file. The message is one line: field, value, remedy.

    Attributes:
        key: the setting or field at fault, as the user writes it; None if there is no single one.
    """

    def __init__(self, message: str, key: str | None = None):
        super().__init__(message)
        self.key = key


def fault(key: str, value: Any, remedy: str) -> UserError:
    """The error of a setting: its key, its value and the remedy."""
    return UserError(f"{key}={written(value)}: {remedy}", key)


def written(value: Any) -> str:
    """A setting's value as the user writes it on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ", ".join(map(written, value)) + "]" if isinstance(value, list) else str(value)


class Interrupted(Exception):
    """A run that saved its state and stopped because of ``signal``. It can be resumed."""

    def __init__(self, signal: int, line: str):
        super().__init__(line)
        self.signal = signal


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)


def disk_fault(error: OSError, path: str | os.PathLike | None = None) -> UserError | None:
    """A UserError if the disk is full or the place is not writable; None for any other error."""
    place = error.filename or path or "the disk"
    if error.errno in NO_ROOM:
        remedy = "files written so far stay usable; make room, and start the same command again"
    elif error.errno in NOT_WRITABLE:
        remedy = "choose another place, or change its permissions"
    else:
        return None
    return UserError(f"{place}: {error.strerror}; {remedy}", str(place))


@contextmanager
def disk_faults_as_user_errors(path: str | os.PathLike | None = None) -> Iterator[None]:
    """Turn errors of a full disk or an unwritable place into UserErrors. They name the file, or ``path`` if unknown."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = _told_by_the_system(error)
        if told and (fault := disk_fault(told, path)):
            raise fault from error
        raise


def _told_by_the_system(error: Exception) -> OSError | None:
    """An error of the system; None for any other. shutil.copytree and libraries in Rust put it in their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    number = re.search(r"(?:\(os error |\[Errno )(\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


WAIT = 20.0  # seconds in which a launcher ends the other processes of a busy machine, once one has failed


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's ``main`` and leave the process with its exit code (None counts as 0).

    Each of these gives one line on stderr and an exit code:
    - a ``UserError``, a full disk, a place that cannot be written: 2;
    - Ctrl-C: 130;
    - a run that a signal stopped and that saved its state: 128 + the signal's number, as in shells.

    Any other exception is a fault of the program and keeps its traceback. In a launch of several processes the main
    process prints the line. Another process prints its own line only if the main process did not fail with it.
    """
    wait_passively()
    try:
        with disk_faults_as_user_errors():
            code = main()
            sys.stdout.flush()
    except UserError as error:
        if not is_main_process():
            time.sleep(WAIT)
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        code = 2
    except Interrupted as stopped:
        if is_main_process():
            print(f"stopped: {stopped}", file=sys.stderr)
        code = 128 + stopped.signal
    except KeyboardInterrupt:
        if is_main_process():
            print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader has closed the pipe, as in `t3d train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)

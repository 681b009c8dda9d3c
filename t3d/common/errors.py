"""Mistakes a user can put right, and how a script reports them."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """A mistake in a command, a configuration or a data file. The message is one line: field, value, remedy.

    Attributes:
        key: the setting or field at fault, as the user writes it; None where no single one is.
    """

    def __init__(self, message: str, key: str | None = None):
        super().__init__(message)
        self.key = key


class Interrupted(Exception):
    """A run that stopped in good order because it was told to, by ``signal``; it can be resumed."""

    def __init__(self, signal: int, line: str):
        super().__init__(line)
        self.signal = signal


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's ``main`` and leave the process with its exit code (None counts as 0).

    A ``UserError`` becomes one line on stderr and code 2, Ctrl-C one line and code 130; a run that a signal has stopped
    in good order one line and 128 + the signal's number, as shells have it. Everything else is a fault of the program
    and keeps its traceback.
    """
    try:
        code = main()
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        code = 2
    except Interrupted as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        code = 128 + stopped.signal
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)

"""Mistakes a user can put right, and how a script reports them."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """A mistake in a command, a configuration or a data file. The message is one line: what, its value, the remedy."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's ``main`` and leave the process with its exit code (None counts as 0).

    A ``UserError`` becomes one line on stderr and code 2, Ctrl-C one line and code 130. Everything else is a fault of
    the program and keeps its traceback.
    """
    try:
        code = main()
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)

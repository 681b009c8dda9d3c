"""Stopping on request: SIGTERM (clusters send it before they remove a node) or Ctrl-C."""

import signal
import sys
import threading
from typing import Any

from t3d.common.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Inside its block SIGTERM or SIGINT is recorded, and the loop checks it. A second Ctrl-C stops at once.

    A second SIGTERM does not: clusters send one to every process, and the launcher sends another.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}  # the handlers

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            print(f"\n{self.received.name}: stopping after this step; Ctrl-C to stop at once", file=sys.stderr)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def interrupted(self, line: str) -> Interrupted:
        """The exception to raise. If another process got the signal, SIGTERM is assumed."""
        return Interrupted(self.received or signal.SIGTERM, line)

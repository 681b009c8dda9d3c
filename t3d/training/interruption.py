"""Stopping on request: SIGTERM (clusters send it before they take a node away) or Ctrl-C."""

import signal
import sys
import threading
from typing import Any

from t3d.common.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Inside its block SIGTERM or SIGINT is noted, for the loop to look at; a second Ctrl-C stops at once.

    A second SIGTERM does not: clusters send one to every process, and the launcher passes on its own.
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
        """What to raise. Where another process got the signal, it is taken for the cluster's."""
        return Interrupted(self.received or signal.SIGTERM, line)

r"""Processes for the answers that need computer algebra, each under a limit on its *CPU time*.

Algebra may run for ever on an answer such as 9^{9^{9^9}}. The kernel ends a worker that exceeds the limit, even inside
a single long operation. The answer's verdict is "timeout", and a new worker starts. CPU time, unlike wall time, does
not grow when the machine is busy, so verdicts do not depend on its load.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_MEMORY_LIMIT = 4 << 30  # bytes of address space for a worker


def serve() -> None:
    """A worker's loop: reads [answer, truth, seconds] from stdin; writes "correct", "wrong" or "error" to stdout."""
    import logging
    import resource
    import warnings

    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    from t3d.grading.algebra import equal

    # Parsers write warnings to both streams. From here on only replies leave this process.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process when its CPU time is up
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; it closes stdin
    sys.set_int_max_str_digits(0)  # the limit on CPU time replaces this limit
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, truth, time_limit = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, time_limit)  # CPU seconds
        try:
            reply = "correct" if equal(answer, truth) else "wrong"
        except Exception:
            reply = "error"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, file=replies, flush=True)


class _Worker:
    """One process, restarted when it dies.

    It is a plain subprocess: multiprocessing would import the caller's __main__ again. Any thread may use it.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def compare(self, answer: str, truth: str, time_limit: float) -> str:
        process = self.process or self._start()
        assert process.stdin and process.stdout  # pipes
        try:
            process.stdin.write(json.dumps([answer, truth, time_limit]) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline().strip()
        except (OSError, ValueError):  # the worker died during the comparison
            reply = ""
        if not reply:
            reply = "timeout" if process.wait() == -signal.SIGPROF else "error"
            self.close()
        return reply

    def _start(self) -> subprocess.Popen[str]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from t3d.grading.workers import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert self.process.stdout
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError("the math grader's process did not start; its error is printed above")
        return self.process

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def compare_all(
    jobs: Sequence[tuple[str, str]], workers: int | None, time_limit: float, progress: bool
) -> list[tuple[str, float]]:
    """The verdict on each (answer, truth) and the wall seconds that it took, in their order."""
    from tqdm import tqdm

    count = min(workers or os.cpu_count() or 1, len(jobs))
    everyone = [_idle.pop() if _idle else _Worker() for _ in range(count)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in everyone:
        idle.put(worker)

    def compare(job: tuple[str, str]) -> tuple[str, float]:
        worker = idle.get()
        start = time.monotonic()
        try:
            return worker.compare(*job, time_limit), time.monotonic() - start
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(count)
    try:
        replies = threads.map(compare, jobs)
        found = list(tqdm(replies, total=len(jobs), desc="grading", unit="answer", disable=not progress))
    except BaseException:
        # After an interruption threads still wait for replies. So end the processes first, then the threads.
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in everyone:
            worker.kill()
        threads.shutdown()
        for worker in everyone:
            worker.close()
        raise
    threads.shutdown()
    _idle.extend(everyone)
    return found


_idle: list[_Worker] = []  # started once, and kept for the next set of answers; they end with this process


@atexit.register
def _end() -> None:
    while _idle:
        _idle.pop().close()

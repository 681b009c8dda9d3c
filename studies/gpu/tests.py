"""The tests marked ``gpu``, counted as they end."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

from studies.gpu.part import Row, run
from t3d.common.paths import ROOT

FOLDERS = ("tests/decode", "tests/blocks", "tests/states", "tests/training")  # the kernels of the decoder first


def rows(device: str) -> Iterator[Row]:
    """A row for each test that failed, and after each folder the counts. Without a GPU the tests are skipped."""
    counts: Counter[str] = Counter()
    for folder in FOLDERS:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-vv",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            folder,
        ]
        done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.stdout
        last = ""
        for line in done.stdout:
            last = line.strip() or last
            for state in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
                if f" {state}" in line and "::" in line:
                    counts[state.lower()] += 1
                    if state in ("FAILED", "ERROR"):
                        yield _row(line.split()[0], "failed", line.strip()[:200])
        if done.wait() not in (0, 5):  # 5: no test was selected
            yield _row(folder, "pytest", last[:200])
        for state in ("passed", "failed", "error", "skipped"):
            yield _row(f"up to {folder}", state, counts[state])


def _row(case: str, metric: str, value: object) -> Row:
    return {"case": case, "metric": metric, "value": value, "baseline": None, "ratio": None}


if __name__ == "__main__":
    run(rows)

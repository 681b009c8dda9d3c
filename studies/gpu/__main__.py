"""Everything that a GPU can show, in one command and a given number of minutes.

    python -m studies.gpu [--minutes 8] [--device cuda|cpu] [--output DIR] [--wheels DIR] [--part NAME ...]

Each part is a process with a limit of its own: its share of the time that is left. A part that fails or runs out of
time keeps its rows, and the next part runs. After every part DIR/report.json and DIR/report.md are written anew.
--device cpu runs all parts in tiny shapes, to check the command. --wheels adds a folder's pure-Python wheels to the
path, for a machine without network that has only torch, transformers, accelerate and peft.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from studies.gpu.report import Outcome, read_rows, write

ROOT = Path(__file__).resolve().parents[2]
# the parts in their order, with their shares of the time; a part's unused time goes to the parts after it
PARTS = {"machine": 0.05, "tests": 0.2, "decode": 0.3, "train": 0.2, "demo": 0.15, "smollm": 0.1}
SPARE = 5.0  # seconds to write the report


def main() -> None:
    """The command."""
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes - SPARE
    context = {"began": datetime.now(UTC).isoformat(timespec="seconds"), "minutes": args.minutes, "device": args.device}
    outcomes = [Outcome(name) for name in args.part]
    for number, outcome in enumerate(outcomes):
        left, rest = end - time.monotonic(), [PARTS[o.name] for o in outcomes[number:]]
        outcome.limit = max(0.0, left * rest[0] / sum(rest))
        run_part(outcome, args.device, args.wheels)
        write(args.output, outcomes, **context)
        print(
            f"{outcome.name}: {outcome.state}, {outcome.seconds:.0f} of {outcome.limit:.0f} s {outcome.reason}",
            flush=True,
        )
    print(args.output / "report.md")


def run_part(outcome: Outcome, device: str, wheels: Path | None) -> None:
    """Run a part in a process group of its own, which ends with its limit."""
    with tempfile.TemporaryDirectory() as folder:
        rows, errors = Path(folder) / "rows", Path(folder) / "errors"
        command = [sys.executable, "-m", f"studies.gpu.{outcome.name}", "--device", device, "--rows", str(rows)]
        began = time.monotonic()
        with errors.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(device, wheels),
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
            )
        try:
            code = process.wait(outcome.limit)
            outcome.state = "failed" if code else "finished"
        except subprocess.TimeoutExpired:
            outcome.state = "out of time"
        finally:
            end_group(process)
        outcome.seconds = time.monotonic() - began
        outcome.rows = read_rows(rows)
        if outcome.state == "failed":
            lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
            outcome.reason = lines[-1][:200] if lines else f"exit code {process.returncode}"


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a part's processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def environment(device: str, wheels: Path | None) -> dict[str, str]:
    """The parts' variables: the checkout and the wheels on the path, and with --device cpu no GPU."""
    found = [str(ROOT), *(str(wheel) for wheel in sorted((wheels or Path()).glob("*.whl")) if wheels)]
    path = os.pathsep.join([*found, *filter(None, [os.environ.get("PYTHONPATH")])])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"} | hidden


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "experiments" / "gpu-report")
    parser.add_argument("--wheels", type=lambda path: Path(path).absolute(), help="folder of pure-Python wheels")
    parser.add_argument(
        "--part", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="only these, in this order"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

"""Whole commands: the model's share of a rollout and of an evaluation, `make demo` on a busy machine, dynamic decoding
and self-verification.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from studies.benchmarks.measure import Row, endless_loops, output_of, row, seconds
from studies.storymath.problems import build_splits
from t3d.common.options import load
from t3d.common.paths import ROOT

TEACHER, STUDENT = "models/embedded-teacher", "models/embedded-student"
COMMANDS = {  # name -> the command's words, questions
    "rollout": (("rollout", "config=configs/demo/sample.yaml", "rollout.num_processes=1"), 4000),
    "evaluation": (("eval", "config=configs/demo/eval.yaml", "rollout.denoising_steps_per_block=4"), 2000),
}


def write_questions(folder: Path, name: str, count: int) -> Path:
    """Write the first questions of one of StoryMath's sets; returns the file."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(build_splits()[name][:count]))
    return file


def command_rows(quick: bool) -> Iterator[Row]:
    """Seconds of whole commands in one process, and the shares of the decoder and of the model in them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for command, (words, questions) in COMMANDS.items():
            data = write_questions(folder, "StoryMath_train", 4 if quick else questions)
            line = [*words, f"experiment.project={folder / command}", f"evaluation.eval_dataset={data}"]
            code = "from studies.benchmarks import commands; commands.run_timed()"
            began = time.perf_counter()
            printed = output_of([sys.executable, "-c", code, *line])
            whole, spent = time.perf_counter() - began, json.loads(printed.splitlines()[-1])
            label = f"`t3d {words[0]}`, {4 if quick else questions} questions"
            yield row(label, "s", whole)
            yield row(label, "share before the work: start, imports", spent["start"] / whole)
            yield row(label, "share in the model", (spent["model"] - spent["draw"]) / whole)
            yield row(label, "share in drawing tokens", spent["draw"] / whole)


def run_timed() -> None:
    """The process of ``command_rows``: a ``t3d`` command; at the end prints the seconds of its parts as JSON."""
    began = time.time()
    import psutil

    from t3d.cli import dispatch
    from t3d.common.processes import wait_passively

    wait_passively()
    from t3d.blocks import decoding
    from t3d.models import SDARForCausalLM

    spent = {"start": began - psutil.Process().create_time(), "model": 0.0, "draw": 0.0}
    decoding.draw = timed(decoding.draw, spent, "draw")
    SDARForCausalLM.forward = timed(SDARForCausalLM.forward, spent, "model")  # type: ignore[method-assign]
    spent["start"] += time.time() - began
    dispatch(sys.argv[1:])
    print(json.dumps(spent))


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """The function; its seconds are added to ``spent[name]``."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - began

    return wrapper


def demo_rows(quick: bool) -> Iterator[Row]:
    """Seconds of `make demo` without its installation, beside four endless loops and on a quiet machine."""
    size = ["--rollouts", "8", "--steps", "2"] if quick else []
    with tempfile.TemporaryDirectory() as name:
        line = [sys.executable, "-m", "studies.storymath.demo", *size, "--output"]
        quiet = seconds(lambda: output_of([*line, f"{name}/quiet"]))
        with endless_loops(4):
            busy = seconds(lambda: output_of([*line, f"{name}/busy"]))
    yield row("`make demo`, four endless loops beside it", "s with busy cores", busy, quiet, beside="quiet")


def dynamic_rows(quick: bool) -> Iterator[Row]:
    """The paper's third table (dynamic decoding, block 4, threshold 0.9) for the embedded teacher and student."""
    count, seeds = (4, [1]) if quick else (1000, [1, 2, 3])
    with tempfile.TemporaryDirectory() as name:
        data = write_questions(Path(name), "StoryMath_test", count)
        for method, checkpoint in (("teacher", TEACHER), ("student", STUDENT)):
            found = evaluated(
                Path(name),
                data,
                f"evaluation.checkpoint_path={checkpoint}",
                *("evaluation.protocol=dynamic", "evaluation.protocol_blocks=[4]", f"evaluation.method={method}"),
                f"evaluation.seeds={seeds}",
            )
            yield row(method, "dynamic", 0.0, questions=count, seeds=seeds, runs=found)


def verify_rows(quick: bool) -> Iterator[Row]:
    """The embedded teacher with self-verification and without it, at 1, 2 and 4 steps per block."""
    count = 4 if quick else 300
    with tempfile.TemporaryDirectory() as name:
        data = write_questions(Path(name), "StoryMath_val", count)
        for steps in (1, 2, 4):
            for verify in (False, True):
                (found,) = evaluated(
                    Path(name),
                    data,
                    *(f"rollout.denoising_steps_per_block={steps}", f"rollout.self_verify={str(verify).lower()}"),
                )
                case = f"{steps} steps, verification {'on' if verify else 'off'}"
                yield row(case, "verification", 0.0, questions=count, steps=steps, verify=verify, runs=[found])


def evaluated(folder: Path, data: Path, *words: str) -> list[dict[str, Any]]:
    """The rows of an evaluation in this process, without averages."""
    from t3d.evaluation.run import evaluate
    from t3d.evaluation.settings import EvalConfig

    line = [f"config={ROOT / 'configs/demo/eval.yaml'}", f"experiment.project={folder}"]
    config = load(EvalConfig, [*line, f"evaluation.eval_dataset={data}", *words])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        output = evaluate(config)
    return [found for found in json.loads(output.read_text()) if "decode" in found]

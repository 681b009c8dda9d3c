"""`make demo`'s pipeline in one process per stage: rollouts, preparation, T3D, evaluations; seconds and accuracies."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from studies.benchmarks.measure import row
from studies.gpu.part import Row, run
from t3d.common.paths import ROOT

TEACHER = "models/embedded-teacher"
# questions of the rollouts, optimizer steps, problems of an evaluation
SIZES = {"cuda": (4000, 600, 1000), "cpu": (16, 2, 8)}


def rows(device: str) -> Iterator[Row]:
    """A row of seconds per stage, and the accuracy of each evaluation with the ends of its interval."""
    rollouts, steps, problems = SIZES[device]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield _timed("questions", "-m", "studies.storymath", "--data", str(folder / "data"))
        project, data = f"experiment.project={folder}", folder / "data"
        yield _timed(
            *("rollouts", "sample/sdar_sample.py", "config=configs/demo/sample.yaml", project),
            *(f"evaluation.eval_dataset={data / 'StoryMath_train.json'}", f"evaluation.limit={rollouts}"),
            "rollout.num_processes=1",
        )
        yield _timed(
            *("preparation", "data/rename_key.py", "--model_name", "embedded-teacher", "--dataset", "StoryMath_train"),
            *("--project", str(folder), "--output", str(folder / "trajectories.json"), "--force"),
        )
        yield _timed(
            *("training", "train/self_ddo_sdar_full.py", "config=configs/demo/train.yaml"),
            *(f"dataset.optimization_data={folder / 'trajectories.json'}", f"experiment.output_root={folder}"),
            *("experiment.run_name=run", "training.batch_size_lm=32", f"training.max_steps={steps}"),
        )
        student = folder / "embedded-teacher" / "math" / "demo" / "run" / "ckpt" / "optimized"
        evaluations = (("t3d", student, 1), ("original", TEACHER, 1), ("original", TEACHER, 4))
        for method, checkpoint, at in evaluations[: 1 if device == "cpu" else 3]:  # each takes the start of a process
            output = folder / f"{method}-{at}.json"
            yield _timed(
                *(f"evaluation of {method}, {at} steps", "eval.py", "config=configs/demo/eval.yaml", project),
                *(f"evaluation.checkpoint_path={checkpoint}", f"evaluation.limit={problems}"),
                *(f"evaluation.eval_dataset={data / 'StoryMath_test.json'}", f"evaluation.output={output}"),
                *(f"rollout.denoising_steps_per_block={at}", f"evaluation.method={method}"),
            )
            (found,) = json.loads(output.read_text())
            case = f"{method}, {at} steps per block"
            yield row(case, "accuracy", found["accuracy"])
            for end in ("ci_low", "ci_high"):
                yield row(case, end, found[end])


def _timed(stage: str, *arguments: str) -> Row:
    began = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = next(line for line in [*reversed(done.stderr.splitlines()), "no message"] if line.strip())
        raise RuntimeError(f"{stage}: {last}")
    return row(stage, "seconds", time.monotonic() - began)


if __name__ == "__main__":
    run(rows)

"""The whole pipeline on the embedded teacher: rollouts, preprocessing, T3D training, evaluation, report.

    python -m studies.storymath.demo [--domain StoryCode] [--seed N] [--output DIR] [--rollouts N] [--steps N]

Every stage is the command that a real run uses, with another configuration; each is printed before it runs. An
interrupted demo continues at its place.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from studies.domains import DOMAINS, Domain, named
from t3d.common.errors import Interrupted, UserError, run_main
from t3d.common.paths import ROOT

STEPS_PER_BLOCK = (4, 2, 1)


def command(*arguments: str) -> None:
    """Run a stage as its own process, from the repository root. On a signal it stops the stage and waits for it."""
    print(f"\n$ {shlex.join(arguments)}", flush=True)
    line = [sys.executable, *arguments[1:]] if arguments[0] == "python" else list(arguments)
    if arguments[0] == "t3d":
        line = [sys.executable, "-m", *arguments]
    if arguments[0] == "accelerate":
        line = [sys.executable, "-m", "accelerate.commands.launch", *arguments[2:]]
    stage = subprocess.Popen(line, cwd=ROOT)

    def pass_on(number: int, _frame) -> None:
        stage.terminate()
        raise Interrupted(number, f"{arguments[1]}; the same command continues")

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = stage.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        stage.wait()  # also after Ctrl-C, which the terminal sends to both: a stage may write a checkpoint
    if code:
        raise UserError(f"{arguments[1]}: failed with exit code {code}; see its message above", arguments[1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", type=named, default="StoryMath", help=f"one of {', '.join(DOMAINS)}")
    parser.add_argument("--seed", type=int, default=10086, help="seed of rollouts, training and decoding")
    parser.add_argument("--output", type=Path, default=Path("experiments/demo"), help="folder of everything it writes")
    parser.add_argument("--rollouts", type=int, default=4000, help="questions the teacher answers")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of the student")
    args = parser.parse_args()
    output = ROOT / args.output
    began = time.monotonic()

    domain, kind = args.domain, args.domain.data_type
    command("python", "-m", domain.package, "--data", str(args.output / "data"))
    data, train, teacher = output / "data", domain.split("train"), Path(domain.teacher).name
    command(
        *("python", "sample/sdar_sample.py", "config=configs/demo/sample.yaml", f"experiment.project={args.output}"),
        *(f"evaluation.checkpoint_path={domain.teacher}", f"evaluation.data_type={kind}"),
        *(f"evaluation.eval_dataset={data / train}.json", f"evaluation.limit={args.rollouts}"),
        f"rollout.seed={args.seed}",
    )
    trajectories = data / "trajectories.json"
    command(
        *("python", "data/rename_key.py", "--model_name", teacher, "--dataset", train),
        *("--project", str(args.output), "--output", str(trajectories), "--force"),
    )
    command(
        *("accelerate", "launch", "--config_file", "accelerate_configs/2_cpu_processes.yaml"),
        *("train/self_ddo_sdar_full.py", "config=configs/demo/train.yaml", f"dataset.optimization_data={trajectories}"),
        *(f"model.pretrained_model={domain.teacher}", f"dataset.data_type={kind}"),
        *(f"experiment.output_root={args.output}", "experiment.run_name=run", "experiment.resume=auto"),
        *(f"training.seed={args.seed}", f"training.max_steps={args.steps}"),
    )
    run = output / teacher / kind / "demo" / "run"
    student = run / "ckpt" / "optimized"
    results, folders = evaluate_all(args, data, student)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    from t3d.evaluation.answers import answer_sets
    from t3d.evaluation.report import print_table, write_report

    print()
    print_table(results)
    report = write_report(
        output / "report.html",
        title=f"T3D on {domain.name}",
        results=results,
        training_logs={"": run / "log.jsonl"},
        walkthrough=walkthrough(folders, domain),
        answers=answer_sets(list(zip(results, folders.values(), strict=True))),
    )
    print(f"\n{output / 'results.json'}\n{report}\n{time.monotonic() - began:.0f} s")


def evaluate_all(args, data: Path, student: Path) -> tuple[list[dict], dict[tuple[str, int], Path]]:
    """Score teacher and student on the test split at 1, 2 and 4 tokens per step.

    Returns the rows, and the folder of each (method, steps per block).
    """
    from t3d.common.options import load
    from t3d.evaluation.run import evaluate
    from t3d.evaluation.settings import EvalConfig

    results, folders = [], {}
    for method, checkpoint in (("original", args.domain.teacher), ("t3d", str(student))):
        for steps in STEPS_PER_BLOCK:
            overrides = [
                "config=configs/demo/eval.yaml",
                f"experiment.project={args.output}",
                f"evaluation.checkpoint_path={checkpoint}",
                f"evaluation.data_type={args.domain.data_type}",
                f"evaluation.eval_dataset={data / args.domain.split('test')}.json",
                f"evaluation.method={method}",
                f"rollout.denoising_steps_per_block={steps}",
                f"rollout.seed={args.seed}",
            ]
            print(f"\n$ python eval.py {shlex.join(overrides)}", flush=True)
            output = evaluate(load(EvalConfig, overrides))
            results += json.loads(output.read_text())
            folders[method, steps] = output.with_suffix("")
    return results, folders


def walkthrough(folders: dict[tuple[str, int], Path], domain: Domain) -> list[dict]:
    """One problem side by side: by the teacher at full steps and at one step per block, and by the student at one.

    It is the first problem that few-step decoding breaks and the student repairs.
    """
    from t3d.data.shards import read_shards
    from t3d.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / domain.teacher))
    shown = {("original", 4): "Teacher, 1 token per step", ("original", 1): "Teacher, 4 tokens per step"}
    shown["t3d", 1] = "T3D student, 4 tokens per step"
    answers = {key: {t.id: t for t in read_shards(folders[key])} for key in shown}
    verdicts = {key: _verdicts(folders[key]) for key in shown}
    wanted = [True, False, True]
    ids = sorted(verdicts["original", 4])
    chosen = next((i for i in ids if [verdicts[key][i] for key in shown] == wanted), ids[0])
    entries = []
    for key, title in shown.items():
        answer = answers[key][chosen]
        entries.append(
            {
                "title": title,
                "question": answer.question,
                "ground_truth": answer.ground_truth,
                "prompt": tokenizer.decode(answer.prompt_ids),
                "tokens": [tokenizer.decode([token]) for token in answer.response_ids[: answer.length]],
                "unmask_step": answer.unmask_step[: answer.length],
                "block_size": answer.block_size,
                "offset": len(answer.prompt_ids) % answer.block_size,
                "correct": verdicts[key][chosen],
                "steps": answer.steps,
                "forwards": answer.forwards,
            }
        )
    return entries


def _verdicts(folder: Path) -> dict[str, bool]:
    records = (json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines())
    return {record["id"]: record["correct"] for record in records}


if __name__ == "__main__":
    run_main(main)

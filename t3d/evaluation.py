"""Score a checkpoint on a data set under given decode settings: decode, grade, summarise."""

import json
from dataclasses import asdict
from pathlib import Path

from t3d import paths
from t3d.config import EvalConfig, RolloutConfig
from t3d.errors import UserError
from t3d.grading.math import Verdict, grade_all
from t3d.jsonfiles import atomic_write
from t3d.report import print_table
from t3d.rollout import decode, is_main_process, node_share, throughput
from t3d.shards import read_shards
from t3d.statistics import wilson_interval
from t3d.tasks import load_problems
from t3d.trajectory import Trajectory

FIXED_STEPS = ("low_confidence_static", "sequential", "random")


def evaluate(config: EvalConfig) -> Path:
    """Decode and grade; writes ``<results>.json`` and, in the folder beside it, one record per answer.

    Returns the path of the results file. Prints the table.
    """
    data = config.evaluation
    if data.data_type == "code":
        raise UserError("evaluation.data_type=code: grading of programs is not there yet; use math or option")
    problems = node_share(load_problems(data.eval_dataset, data.data_type, data.limit), data.num_node, data.node_index)
    output = results_file(config)
    folder = output.with_name(output.name.removesuffix(".json"))
    decode(config, problems, folder)
    if is_main_process():
        samples = range(config.rollout.num_response_per_task)
        wanted = {f"{problem.id}/{k}": problem for problem in problems for k in samples}  # the folder may hold more
        answers = [t for t in read_shards(folder, ordered=True) if t.id in wanted]
        for answer in answers:
            if answer.question != wanted[answer.id].question:
                raise UserError(
                    f"{folder}: {answer.id} answers another question than {data.eval_dataset} has; delete it"
                )
        verdicts = grade_all([(answer.text, answer.ground_truth) for answer in answers])
        row = summarise(config, answers, verdicts, *throughput(folder))
        write_records(folder / "records.jsonl", answers, verdicts)
        with atomic_write(output) as file:
            json.dump([row], file, indent=2)
        print_table([row])
        print(f"{costs(row)}\n{output}")
    return output


def results_file(config: EvalConfig) -> Path:
    """Named after all that tells results apart; ``evaluation.output`` overrides."""
    data, rollout = config.evaluation, config.rollout
    if data.output:
        output = paths.ROOT / Path(data.output).expanduser()
        return output.with_name(f"{output.name.removesuffix('.json')}.json")  # a name may have dots of its own
    dataset = Path(data.eval_dataset).stem
    node = f"-node{data.node_index}" if data.num_node > 1 else ""
    name = (
        f"{data.method}-{paths.model_name(data.checkpoint_path)}-{dataset}-{strategy(rollout)}"
        f"-b{rollout.block_size}-s{rollout.denoising_steps_per_block}-t{rollout.temperature}-seed{rollout.seed}{node}"
    )
    return paths.ROOT / Path(config.experiment.project).expanduser() / "results" / f"{name}.json"


def strategy(rollout: RolloutConfig) -> str:
    """What tells the ways of decoding apart in tables, charts and file names."""
    return rollout.remasking_strategy + ("+verify" if rollout.self_verify else "")


def summarise(
    config: EvalConfig,
    answers: list[Trajectory],
    verdicts: list[Verdict],
    tokens_per_second: float | None,
    seconds: float,
) -> dict:
    """One row of results.

    ``accuracy`` with a 95 % Wilson interval over all answers. ``tokens_per_step`` is the setting, block size / steps,
    where the strategy fixes it, and the measured mean elsewhere; ``measured_tokens_per_step`` counts tokens to the
    answer's end over denoising steps, ``tokens_per_forward`` over all forwards, prefill and commits included. With
    self-verification a step that left no token in the answer is not counted, its forward is.
    """
    rollout, count = config.rollout, len(answers)
    correct = sum(verdict.correct for verdict in verdicts)
    low, high = wilson_interval(correct, count)
    tokens, steps, forwards = (sum(getattr(a, name) for a in answers) for name in ("length", "steps", "forwards"))
    fixed = rollout.remasking_strategy in FIXED_STEPS and not rollout.self_verify
    latency = sorted(answer.seconds for answer in answers)
    return {
        "method": config.evaluation.method,
        "model": config.evaluation.checkpoint_path,
        "dataset": Path(config.evaluation.eval_dataset).stem,
        "block_size": rollout.block_size,
        "denoising_steps_per_block": rollout.denoising_steps_per_block,
        "tokens_per_step": rollout.block_size / rollout.denoising_steps_per_block if fixed else tokens / steps,
        "strategy": strategy(rollout),
        "temperature": rollout.temperature,
        "seed": rollout.seed,
        "n": count,
        "accuracy": correct / count,
        "ci_low": low,
        "ci_high": high,
        "measured_tokens_per_step": tokens / steps,
        "tokens_per_forward": tokens / forwards,
        "steps_per_answer": steps / count,
        "forwards_per_answer": forwards / count,
        "mean_length": tokens / count,
        "tokens_per_second": tokens_per_second,
        "latency_mean": sum(latency) / count,
        "latency_median": latency[count // 2],
        "seconds": seconds,
        "finish_reasons": _tally(answer.finish_reason for answer in answers),
        "verdicts": _tally(verdict.reason for verdict in verdicts),
        "decode": asdict(rollout.decode_settings()),
    }


def costs(row: dict) -> str:
    """What the table leaves out, in one line."""
    rate = row["tokens_per_second"]
    return ", ".join(
        [
            f"{row['mean_length']:.1f} tokens, {row['steps_per_answer']:.1f} steps, "
            f"{row['forwards_per_answer']:.1f} forwards per answer",
            f"{rate:.0f} tokens/s" if rate else "no finished session to time",
            f"latency {row['latency_mean']:.2f} s (median {row['latency_median']:.2f} s)",
            "finished by " + ", ".join(f"{reason} {count}" for reason, count in row["finish_reasons"].items()),
        ]
    )


def _tally(names) -> dict[str, int]:
    tally: dict[str, int] = {}
    for name in names:
        tally[name] = tally.get(name, 0) + 1
    return tally


def write_records(path: Path, answers: list[Trajectory], verdicts: list[Verdict]) -> None:
    """One JSON line per answer: what was asked, said, extracted and judged, and what it cost."""
    keys = ("id", "question", "ground_truth", "text", "length", "steps", "forwards", "seconds", "finish_reason")
    with atomic_write(path) as file:
        for answer, verdict in zip(answers, verdicts, strict=True):
            record = {key: getattr(answer, key) for key in keys} | asdict(verdict)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

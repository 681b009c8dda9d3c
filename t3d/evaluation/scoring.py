"""One row of results: the scores of the answers to a data set under one decode setting."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median

from t3d.blocks.strategy import strategy_named
from t3d.common import paths
from t3d.data.trajectory import Trajectory
from t3d.evaluation.settings import EvalConfig
from t3d.evaluation.statistics import pass_at_k, share_interval, wilson_interval
from t3d.grading import Verdict
from t3d.models.loading import provenance
from t3d.rollout.settings import RolloutConfig


def strategy(rollout: RolloutConfig) -> str:
    """The name of a way of decoding in tables, charts and file names."""
    energy = f"+energy{rollout.energy_candidates}" if rollout.energy_candidates > 1 else ""
    return rollout.remasking_strategy.replace(":", ".") + ("+verify" if rollout.self_verify else "") + energy


def method(config: EvalConfig) -> str:
    """The label of a checkpoint's results: as given, else the objective of the training that made it.

    A converted model with a logit shift is the autoregressive model itself at block size 1.
    """
    made_by = provenance(config.evaluation.checkpoint_path)
    if made_by.get("objective") == "converted" and made_by.get("logit_shift") and config.rollout.block_size == 1:
        made_by["objective"] = "autoregressive"
    return config.evaluation.method or made_by.get("objective", "original")


def model_label(checkpoint: str) -> str:
    """A model's name in file names. Students of one project share a folder's name, so their run's name comes first."""
    made_by, name = provenance(checkpoint), paths.model_name(checkpoint)
    return "-".join([made_by["project"], made_by["run"], name]) if {"project", "run"} <= made_by.keys() else name


def summarise(
    config: EvalConfig,
    answers: list[Trajectory],
    verdicts: list[Verdict],
    tokens_per_second: float | None,
    seconds: float,
) -> dict:
    """One row of results.

    ``accuracy`` is the share of right answers, over ``n`` answers to ``questions`` questions. A task that grades
    nothing has no accuracy. With one answer per question its 95 % interval is Wilson's. Several answers to one question
    are not independent. Then the interval is the bootstrap's over questions. ``pass_at_k`` has the probability that one
    of k answers is right, for k = 1, 2, 4, ...

    ``tokens_per_step`` is block size / steps if the strategy fixes it, else the measured mean.
    ``measured_tokens_per_step`` is tokens to the answer's end / denoising steps. ``tokens_per_forward`` divides by all
    forwards, prefill and commits included. With self-verification a step that left no token in the answer does not
    count, but its forward does. ``latency_mean`` and ``latency_median`` are seconds of one answer among all answers in
    flight.
    """
    rollout, count = config.rollout, len(answers)
    tokens, steps, forwards = (sum(getattr(a, name) for a in answers) for name in ("length", "steps", "forwards"))
    fixed = strategy_named(rollout.remasking_strategy).fixed_steps and not rollout.self_verify
    latency = [answer.seconds for answer in answers]
    data = config.evaluation
    row = {
        "method": method(config),
        "model": data.checkpoint_path,
        "dataset": paths.data_name(data.eval_dataset),
        "block_size": rollout.block_size,
        "denoising_steps_per_block": rollout.denoising_steps_per_block,
        "tokens_per_step": rollout.block_size / rollout.denoising_steps_per_block if fixed else tokens / steps,
        "strategy": strategy(rollout),
        "temperature": rollout.temperature,
        "seed": rollout.seed,
        "n": count,
        "questions": len({_question(answer) for answer in answers}),
        **accuracy(answers, verdicts, rollout.num_response_per_task),
        "measured_tokens_per_step": tokens / steps,
        "tokens_per_forward": tokens / forwards,
        "steps_per_answer": steps / count,
        "forwards_per_answer": forwards / count,
        "mean_length": tokens / count,
        "tokens_per_second": tokens_per_second,
        "latency_mean": sum(latency) / count,
        "latency_median": median(latency),
        "seconds": seconds,
        "finish_reasons": _tally(answer.finish_reason for answer in answers),
        "verdicts": _tally(verdict.reason for verdict in verdicts),
        "decode": asdict(rollout.decode_settings()),
    }
    return row | ({"node": f"{data.node_index}/{data.num_node}"} if data.num_node > 1 else {})


def accuracy(answers: Sequence[Trajectory], verdicts: Sequence[Verdict], samples: int) -> dict:
    """The accuracy of `samples` answers per question, its interval and pass@k; {} if nothing grades the answers."""
    if any(verdict.correct is None for verdict in verdicts):
        return {}
    right: dict[str, list[bool]] = {}
    for answer, verdict in zip(answers, verdicts, strict=True):
        right.setdefault(_question(answer), []).append(bool(verdict.correct))
    correct, count = sum(bool(verdict.correct) for verdict in verdicts), len(verdicts)
    if samples == 1:
        low, high = wilson_interval(correct, count)
        return {"accuracy": correct / count, "ci_low": low, "ci_high": high}
    at_k = pass_at_ks(list(right.values()), samples)
    first = at_k[0]
    return {"accuracy": correct / count, "ci_low": first["ci_low"], "ci_high": first["ci_high"], "pass_at_k": at_k}


def _question(answer: Trajectory) -> str:
    return answer.id.rpartition("/")[0]


def pass_at_ks(right: Sequence[Sequence[bool]], samples: int) -> list[dict]:
    """pass@k for k = 1, 2, 4, ... and `samples`, each with its 95 % interval over questions.

    right: per question, whether each of its `samples` answers is right.
    """
    ks = [2**i for i in range(samples.bit_length())]
    rows = []
    for k in ks if samples in ks else [*ks, samples]:
        values = [pass_at_k(len(answers), sum(answers), k) for answers in right]
        low, high = share_interval(values)
        rows.append({"k": k, "estimate": sum(values) / len(values), "ci_low": low, "ci_high": high})
    return rows


def costs(row: dict) -> str:
    """The figures that the table leaves out, in one line."""
    rate = row["tokens_per_second"]
    return ", ".join(
        [
            f"{row['mean_length']:.1f} tokens, {row['steps_per_answer']:.1f} steps, "
            f"{row['forwards_per_answer']:.1f} forwards per answer",
            f"{rate:.0f} tokens/s" if rate else "no finished session to time",
            f"an answer in flight {row['latency_mean']:.2f} s (median {row['latency_median']:.2f} s)",
            f"finished by {counts(row['finish_reasons'])}",
            f"graded {counts(row['verdicts'])}",
            *(f"pass@{at['k']} {100 * at['estimate']:.1f} %" for at in row.get("pass_at_k", ())),
            *([f"programs isolated by {row['isolation']}"] if row.get("isolation") else []),
        ]
    )


def counts(tally: dict[str, int]) -> str:
    """Names and counts for people: "stop 3, length 1"."""
    return ", ".join(f"{name} {count}" for name, count in tally.items())


def _tally(names: Iterable[str]) -> dict[str, int]:
    tally: dict[str, int] = {}
    for name in names:
        tally[name] = tally.get(name, 0) + 1
    return tally

"""The plan of a training: its data, steps and memory, and the time of three real steps. It has no results."""

import math
import resource
import sys
import time
from dataclasses import dataclass

import torch
from accelerate import DistributedType

from t3d.training import cost
from t3d.training.distribution import unwrapped

STEPS = 3  # the first is a warm-up


@dataclass(frozen=True)
class Lengths:
    """Tokens of a training set, before any masking."""

    sequences: int
    prompt: int
    answer: int
    longest: int  # sequence in the training layout, clean and noisy copies
    copies: int = 1  # noisy copies of a sequence, at most

    @property
    def layout(self) -> int:
        return self.prompt + (1 + self.copies) * self.answer

    @classmethod
    def of(cls, samples, copies: int = 1, drawn: int | None = None) -> "Lengths":
        """The lengths from the memory-mapped columns of t3d.data.dataset, without reading the tokens.

        drawn: the most tokens of an answer that on-policy rounds draw in place of the data's.
        """
        import pyarrow.compute as pc

        prompt, answer = (
            pc.list_value_length(samples.data.column(name)).to_numpy() for name in ("prompt_ids", "response_ids")
        )
        longest = prompt + (1 + copies) * (answer if drawn is None else answer.clip(min=drawn))
        return cls(len(samples), int(prompt.sum()), int(answer.sum()), int(longest.max()), copies)


def dry_run(trainer) -> None:
    """Print a trainer's plan, make three optimizer steps, print their time. Only the data cache is written."""
    accelerator, training = trainer.accelerator, trainer.config.training
    drawn = training.max_gen_length if trainer.rounds else None
    lengths = Lengths.of(trainer.samples, trainer.objective.copies, drawn)
    say = print if accelerator.is_main_process else lambda *parts: None
    for line in plan_lines(trainer, lengths):
        say(line)
    say(f"\nmeasuring {STEPS} optimizer steps ...")
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for step in range(1, STEPS + 1):
        began = time.perf_counter()
        metrics = trainer.optimizer_step(step)  # it reads its metrics at the end, so the device has finished
        taken.append(time.perf_counter() - began)
        say(f"step {step}: {taken[-1]:.2f} s, loss {metrics['loss']:.4f}")
    usual = sum(taken[1:]) / len(taken[1:])
    whole = clock(usual * trainer.total_steps)
    say(f"time of a step: {usual:.2f} s; of the whole training, without checkpoints: {whole}")
    say(f"most memory seen in this process: {measured_memory(accelerator.device.type) / 1e6:,.0f} MB")
    say("dry run: only the data cache was written")


def plan_lines(trainer, lengths: Lengths) -> list[str]:
    """The plan in words: data, steps, weights, and one process's memory by component."""
    config, accelerator, order = trainer.config, trainer.accelerator, trainer.order
    student = unwrapped(accelerator, trainer.student)
    epochs = trainer.total_steps * order.global_batch / lengths.sequences
    weights, trainable = cost.parameters(student), cost.parameters(student, trained=True)
    training = config.training
    lines = [
        f"data: {lengths.sequences:,} sequences; {lengths.prompt:,} prompt tokens, {lengths.answer:,} answer tokens, "
        f"{lengths.layout:,} in the training layout (longest sequence there: {lengths.longest:,})",
        f"steps: {trainer.total_steps:,} of {order.global_batch:,} sequences (batch_size_lm {training.batch_size_lm} x "
        f"accumulation {training.gradient_accumulation_steps} x {accelerator.num_processes} processes), {epochs:.1f} "
        "epochs",
        f"weights: {weights:,}, {trainable:,} of them trained",
        f"memory of a process, computed (t3d/training/cost.py; sharding: {sharding(accelerator)}), in MB:",
    ]
    need = estimate(trainer, lengths.longest)
    lines += [f"  {name:12} {value / 1e6:10,.1f}" for name, value in vars(need).items()]
    lines.append(f"  {'total':12} {need.total / 1e6:10,.1f} without the libraries' own memory")
    return lines


def estimate(trainer, longest: int) -> cost.Memory:
    """One process's memory for this trainer's settings, with the longest sequences in one micro-batch."""
    accelerator, training = trainer.accelerator, trainer.config.training
    student = unwrapped(accelerator, trainer.student)
    trainable = cost.parameters(student, trained=True)
    run = cost.Run(
        processes=accelerator.num_processes,
        sharding=sharding(accelerator),
        half=accelerator.mixed_precision != "no",
        weight_bytes=2 if trainer.config.model.dtype == "bfloat16" else 4,
        trainable=None if trainable == cost.parameters(student) else trainable,
        second_model=holds_reference(trainer.reference),
        checkpointing=training.gradient_checkpointing_enable,
        chunk=training.head_chunk,
        forwards=trainer.objective.forwards,
        head_tables=trainer.objective.head_tables,
    )
    # the token budget may be exceeded only by one long sequence
    budget = training.tokens_per_batch
    tokens = max(budget, longest) if budget else training.batch_size_lm * longest
    return cost.memory(cost.Model.of(student.config, run.half), run, tokens)


def holds_reference(reference) -> bool:
    """Whether a second model is on the device. Adapters share the student's base; an offloaded one is in CPU memory."""
    return hasattr(reference, "model") and not getattr(reference, "offloaded", False)


def sharding(accelerator) -> str:
    """The sharding, by the names of t3d.training.cost."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return "none"
    return cost.SHARDINGS[accelerator.state.deepspeed_plugin.zero_stage]


def measured_memory(device: str) -> float:
    """Bytes: the allocator's peak on a GPU, else the process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def clock(seconds: float) -> str:
    """Seconds -> "12 s", "3 min 20 s", "5 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = math.floor(seconds / 60)
    return f"{minutes} min {seconds % 60:.0f} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"

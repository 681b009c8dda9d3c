"""A T3D training step: ours against the released recipe, the gain of each change, and growth with the length.

The parts ``train``, ``large`` and ``sequence`` of ``python -m studies.benchmarks``. Ours is the trainer itself
(t3d.training.loop.Trainer.optimizer_step). The recipe and the steps between are in released_recipe.py. Both get the
same states of the same sequences, one sequence per micro-batch, and their losses must agree to 1e-4.

tokens/s counts real tokens, prompt and answer, without padding and without the layout's second copy. It is the median
of alternating repeats of whole steps (forwards, backward, clipping, AdamW) in one process. All padded sequences have
one size, so the recipe's step sees some of them, and its time counts for as many as all. Peak memory is the peak of the
forward and backward passes above the two loaded models, in MB. It includes gradients, and not AdamW's moments, which
are the same on both sides. Each peak is measured in its own process.

    python -m studies.benchmarks.train_step --measure-lengths

prints the quantiles of the real prompts.
"""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils.logging import disable_progress_bar

from studies.benchmarks.decode import curve
from studies.benchmarks.measure import Row, alternate_all, output_of, row, seconds
from studies.benchmarks.released_recipe import Longest, Recipe, Unpadded, pad_to_longest
from t3d.blocks.special_ids import SpecialIds
from t3d.common.options import load
from t3d.common.paths import ROOT
from t3d.models import SDARConfig, SDARForCausalLM
from t3d.states.base import collate
from t3d.training import cost
from t3d.training import loop as training
from t3d.training.settings import TrainConfig

# Lengths of MATH_train's prompts in tokens of SDAR's tokenizer, as t3d.tasks renders them: the quantiles 0, .05,
# ... 1 of the 8,451 of 8,523 that max_prompt_len=512 keeps (python -m studies.benchmarks.train_step --measure-lengths).
PROMPT_QUANTILES = (
    30, 44, 49, 53, 56, 60, 63, 66, 69, 72, 76, 80, 85, 91, 98, 106, 118, 136, 171, 244, 512,
)  # fmt: skip
# Without rollouts of a released model the lengths of answers are assumed. They have the prompts' relative spread and
# this multiple of their length. Real answers go up to max_gen_length=1024 and vary more.
ANSWER_FACTOR = 2.0
BLOCK = 4


@dataclass(frozen=True)
class Shape:
    """A model's size, and the number of sequences of a step."""

    layers: int
    width: int
    vocab: int
    sequences: int

    def __str__(self) -> str:
        vocab = f"{self.vocab / 1000:.0f}k" if self.vocab >= 1000 else self.vocab
        return f"layers={self.layers}/width={self.width}/vocab={vocab}"


LARGE = Shape(layers=6, width=384, vocab=151_936, sequences=12)
SMALL = Shape(layers=6, width=384, vocab=32_000, sequences=12)
QUICK_LARGE = Shape(layers=2, width=64, vocab=8_000, sequences=6)
QUICK_SMALL = Shape(layers=2, width=64, vocab=1_000, sequences=6)

# The ladder: each variant adds one change to the one before.
RECIPE, TWO_FORWARDS, MASKED_ROWS, NO_PADDING = "recipe", "two forwards", "masked rows", "no padding"
OURS, CHECKPOINTING, NO_REFERENCE = "ours", "ours, checkpointing", "ours, round_interval=1"
LADDER = (RECIPE, TWO_FORWARDS, MASKED_ROWS, NO_PADDING, OURS, CHECKPOINTING, NO_REFERENCE)
RECIPE_CHECKPOINTING = "recipe, checkpointing"
PADDED = (RECIPE, RECIPE_CHECKPOINTING, TWO_FORWARDS, MASKED_ROWS)
CHANGES = {
    TWO_FORWARDS: "two forwards in place of four",
    MASKED_ROWS: "logits of masked rows only",
    NO_PADDING: "no padding: micro-batches by length",
    OURS: "vocabulary in chunks (`training.head_chunk=128`)",
    CHECKPOINTING: "gradient checkpointing",
}


# ---------------------------------------------------------------------------------------------------------------------
# Samples and models


def quantile(q: float) -> float:
    """The prompts' length at q in [0, 1], by linear interpolation in the table."""
    place = q * (len(PROMPT_QUANTILES) - 1)
    low = min(int(place), len(PROMPT_QUANTILES) - 2)
    return PROMPT_QUANTILES[low] + (place - low) * (PROMPT_QUANTILES[low + 1] - PROMPT_QUANTILES[low])


def lengths(sequences: int) -> list[tuple[int, int]]:
    """(prompt, answer) lengths at the mid-points of equal parts of the distributions, paired at random."""
    points = [(i + 0.5) / sequences for i in range(sequences)]
    pairing = torch.randperm(sequences, generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [round(quantile(point)) for point in points]
    return [(prompt, round(ANSWER_FACTOR * quantile(points[i]))) for prompt, i in zip(prompts, pairing, strict=True)]


def samples_of(shape: Shape, pairs: Sequence[tuple[int, int]] | None = None) -> list[dict]:
    """Random trajectories at full steps: one token per step, in a random order within each block.

    pairs: lengths of prompts and answers; None = those of ``lengths``.
    """
    generator, samples = torch.Generator().manual_seed(1), []
    for i, (prompt, answer) in enumerate(pairs or lengths(shape.sequences)):
        answer += -(prompt + answer) % BLOCK
        ids = torch.randint(shape.vocab - 1, (prompt + answer,), generator=generator).tolist()
        block = torch.arange(prompt, prompt + answer) // BLOCK
        order = (block + torch.rand(answer, generator=generator)).argsort()
        step = torch.empty(answer, dtype=torch.long)
        step[order] = torch.arange(1, answer + 1)
        sample = {"prompt_ids": ids[:prompt], "response_ids": ids[prompt:], "unmask_step": step.tolist()}
        samples.append({"id": f"bench/{i}", **sample, "length": answer})
    return samples


def write_models(shape: Shape, folder: Path) -> None:
    """A reference with random weights, and a student near it, so that DDO's margins are not zero."""
    torch.manual_seed(0)
    config = SDARConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=max(1, shape.width // 128),
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        mask_token_id=shape.vocab - 1,
    )
    model = SDARForCausalLM(config)
    model.save_pretrained(folder / "reference")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    model.save_pretrained(folder / "student")


class Bench:
    """One trainer with its student and reference, and every variant of its optimizer step."""

    def __init__(self, shape: Shape, folder: Path, *overrides: str, pairs: Sequence[tuple[int, int]] | None = None):
        self.config = load(
            TrainConfig,
            [
                f"model.pretrained_model={folder / 'reference'}",
                "model.random_ratio=0.1",
                "training.gradient_checkpointing_enable=false",
                "training.mixed_precision=no",
                "training.batch_size_lm=1",
                f"training.gradient_accumulation_steps={shape.sequences}",
                "training.head_chunk=128",
                f"training.block_size={BLOCK}",
                "training.max_steps=1000",
                *overrides,
            ],
        )
        self.samples, self.mask_id = samples_of(shape, pairs), shape.vocab - 1
        ids = SpecialIds(self.mask_id, 0, (0,), (self.mask_id,), torch.arange(1, self.mask_id))
        accelerator = training.make_accelerator(self.config)
        student = training.load_student(self.config, str(folder / "student"), accelerator)
        self.trainer = training.Trainer(
            self.config,
            accelerator,
            student,
            training.make_objective(self.config, ids),
            self.samples,
            ids,
            str(folder / "reference"),
        )
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = 0.0  # a step does all its work, but every repeat starts from the same weights
        frozen: Any = self.trainer.reference
        self.reference, self.plain_reference = frozen, (frozen if hasattr(frozen, "lm_head") else frozen.model)
        self.ending = 0.0  # seconds of the last step's ``update``, of a variant that is not ours
        self.tokens = sum(len(s["prompt_ids"]) + len(s["response_ids"]) for s in self.samples)

    def step(self, variant: str, first: int | None = None) -> float:
        """One optimizer step; returns its loss. ``first``: a padded variant uses only the first sequences."""
        trainer, student = self.trainer, self.trainer.student
        if student.is_gradient_checkpointing:
            student.gradient_checkpointing_disable()
        if variant in (CHECKPOINTING, RECIPE_CHECKPOINTING):
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer.reference = None if variant == NO_REFERENCE else self.reference
        if variant in (OURS, CHECKPOINTING, NO_REFERENCE):
            return trainer.optimizer_step(1)["loss"]
        states, objective = trainer.draw_states(1), trainer.objective
        terms = {name: getattr(objective.settings, name) for name in ("alpha", "beta", "lambda_path")}
        if variant == NO_PADDING:
            loss: Recipe = Unpadded(objective.forbidden_ids, **terms, block_size=BLOCK)
            inputs: Iterator[Any] = (
                collate([[state]], trainer.ids.pad_id) for state in sorted(states, key=len, reverse=True)
            )
        else:
            plain = variant in (RECIPE, RECIPE_CHECKPOINTING)
            loss = Recipe(objective.forbidden_ids, **terms, two_forwards=not plain, masked_rows=variant == MASKED_ROWS)
            prompts = [len(self.samples[index]["prompt_ids"]) for _, index in trainer.local_indices(1)]
            longest = Longest.of(states, prompts)
            pairs = list(zip(states, prompts, strict=True))[:first]
            inputs = (pad_to_longest(state, prompt, longest, trainer.ids.pad_id, BLOCK) for state, prompt in pairs)
        total = 0.0
        for rows in inputs:
            part = loss(student, self.plain_reference, rows).sum() / len(states)
            part.backward()
            total += part.item()
        self.ending = seconds(self.update)
        return total

    def update(self) -> None:
        """The end of a step: clipping and the optimizer."""
        self.trainer.accelerator.clip_grad_norm_(self.trainer.student.parameters(), self.config.clip_norm)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def times(bench: Bench, variants: Sequence[str], repeats: int, first: int) -> dict[str, float]:
    """Median seconds of every variant's step. Each repeat runs all variants, so drift affects all equally.

    first: padded sequences of a step; the passes' time counts for as many as all.
    """
    losses: dict[str, float] = {}

    def step(variant: str) -> float:
        padded = variant in PADDED

        def work() -> None:
            losses[variant] = bench.step(variant, first if padded else None)

        taken = seconds(work)
        return (taken - bench.ending) * len(bench.samples) / first + bench.ending if padded else taken

    bench.step(RECIPE, first=1)  # creates the optimizer's moments
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            found[variant].append(step(variant))
    for group in ([v for v in variants if v in PADDED], [v for v in variants if v not in PADDED]):
        assert_equal_losses({variant: losses[variant] for variant in group})
    return {variant: statistics.median(values) for variant, values in found.items()}


def assert_equal_losses(losses: dict[str, float]) -> None:
    """All variants with a reference minimise the same function, so their losses must be equal."""
    same = {variant: loss for variant, loss in losses.items() if variant != NO_REFERENCE}
    for variant, loss in same.items():
        expected = next(iter(same.values()))
        assert abs(loss - expected) < 1e-4, f"{variant}: loss {loss}, {next(iter(same))} has {expected}"


def peak_megabytes(shape: Shape, folder: Path, variant: str) -> float:
    """Peak memory of a step's passes above the loaded models, measured in its own process."""
    job = json.dumps({"shape": asdict(shape), "folder": str(folder), "variant": variant})
    command = [sys.executable, "-m", "studies.benchmarks.train_step", "--peak", job]
    return float(output_of(command).splitlines()[-1])


def print_peak(shape: Shape, folder: Path, variant: str) -> None:
    """The process of ``peak_megabytes``. All padded sequences have one size, so two of them show the recipe's peak."""
    bench = Bench(shape, folder)
    bench.trainer.optimizer.step = lambda: None
    for model in (bench.trainer.student, bench.plain_reference):
        sum(parameter.sum().item() for parameter in model.parameters())  # this reads the mapped files into memory
        logits = model(torch.arange(8)[None]).logits  # this loads the libraries
        if logits.requires_grad:
            logits.sum().backward()
    bench.trainer.optimizer.zero_grad()
    del logits
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    loaded = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    bench.step(variant, first=2)
    print((memory("VmHWM") - loaded) / 1024)


def computed_peak(bench: Bench, variant: str) -> float:
    """The cost model's value, in MB, for the peak that ``peak_megabytes`` measures."""
    longest = max(len(state) for state in bench.trainer.draw_states(1))
    chunk = bench.config.training.head_chunk
    run = cost.Run(half=False, checkpointing=variant == CHECKPOINTING, chunk=chunk)
    need = cost.memory(cost.Model.of(bench.trainer.student.config, half=False), run, tokens=longest)
    return (need.gradients + need.activations + need.logits) / 2**20


def memory(key: str) -> int:
    """A line of this process's /proc status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def train_rows(quick: bool) -> Iterator[Row]:
    """A vocabulary of 32k: each change beside the one before, then ours beside the recipe."""
    shape, first = (QUICK_SMALL, 2) if quick else (SMALL, 3)
    variants = (RECIPE, RECIPE_CHECKPOINTING, *LADDER[1:])
    speed, peaks, computed = measured(shape, variants, variants, 1 if quick else 2, first)
    for before, after in zip(LADDER, LADDER[1:-1], strict=False):
        yield row(CHANGES[after], "tokens/s", speed[after], speed[before], beside=before, table="changes")
        yield row(CHANGES[after], "MB", peaks[after], peaks[before], beside=before, table="changes")
    for ours in (OURS, CHECKPOINTING, NO_REFERENCE):
        recipe = RECIPE_CHECKPOINTING if ours == CHECKPOINTING else RECIPE
        yield row(f"{shape}: {ours}", "tokens/s", speed[ours], speed[recipe], beside=recipe, table="recipe")
        yield row(f"{shape}: {ours}", "MB", peaks[ours], peaks[recipe], beside=recipe, table="recipe")
    yield cost_row(shape, computed, peaks)


def large_rows(quick: bool) -> Iterator[Row]:
    """A vocabulary of 152k: ours beside the recipe."""
    shape = QUICK_LARGE if quick else LARGE
    variants, held = (RECIPE, OURS, CHECKPOINTING), (RECIPE, CHECKPOINTING)
    speed, peaks, computed = measured(shape, variants, held, repeats=1, first=1)
    for ours in (OURS, CHECKPOINTING):
        yield row(f"{shape}: {ours}", "tokens/s", speed[ours], speed[RECIPE], beside=RECIPE, table="recipe")
    case = f"{shape}: {CHECKPOINTING}"
    yield row(case, "MB", peaks[CHECKPOINTING], peaks[RECIPE], beside=RECIPE, table="recipe")
    yield cost_row(shape, computed, peaks)


def cost_row(shape: Shape, computed: float, peaks: dict[str, float]) -> Row:
    """The cost model's peak beside the measured one."""
    case = f"{shape}: {CHECKPOINTING}, computed by the cost model"
    return row(case, "MB", computed, peaks[CHECKPOINTING], beside="measured", table="recipe")


def measured(
    shape: Shape, variants: Sequence[str], held: Sequence[str], repeats: int, first: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """(tokens/s of the variants, peak MB of the variants ``held``, the cost model's MB with checkpointing)."""
    with tempfile.TemporaryDirectory() as folder:
        write_models(shape, Path(folder))
        peaks = {variant: peak_megabytes(shape, Path(folder), variant) for variant in held}
        bench = Bench(shape, Path(folder))
        taken = times(bench, variants, repeats, first)
    speed = {variant: bench.tokens / value for variant, value in taken.items()}
    return speed, peaks, computed_peak(bench, CHECKPOINTING)


def sequence_rows(quick: bool) -> Iterator[Row]:
    """Microseconds per trained token by the sequences' length; every step has the same number of tokens."""
    shape = Shape(2, 64, 500, 1) if quick else Shape(4, 256, 4096, 1)
    sizes, total = ((16, 32), 64) if quick else ((128, 256, 512, 1024, 2048), 2048)
    with tempfile.TemporaryDirectory() as folder:
        write_models(shape, Path(folder))
        steps, benches = {}, {}
        for size in sizes:
            pairs = [(size // 4, size - size // 4)] * (total // size)
            sized = replace(shape, sequences=len(pairs))
            benches[size] = Bench(sized, Path(folder), f"training.tokens_per_batch={2 * total}", pairs=pairs)
            steps[size] = partial(timed_step, benches[size])
        found = alternate_all(steps, 1 if quick else 3)
        shares = {size: attention_share(bench) for size, bench in benches.items()}
    for size, taken in found.items():
        yield curve("sequence", "T3D, 4 layers of width 256", size, benches[size].tokens / taken)
    for size, share in shares.items():
        yield curve("sequence", "its attention alone", size, benches[size].tokens / (found[size] * share))


def attention_share(bench: Bench) -> float:
    """The attention's share of a step's time on the CPU, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        bench.step(OURS)
    spent = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    return sum(time for name, time in spent.items() if "scaled_dot_product" in name) / sum(spent.values())


def timed_step(bench: Bench) -> float:
    """Seconds of one optimizer step of ours."""
    return seconds(partial(bench.step, OURS))


# On a GPU (studies.gpu.train): bf16 without sparsity, operations/s, data sheets
GPU_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def prompt_lengths() -> list[int]:
    """Tokens of every real prompt of MATH_train, ascending. It needs the data set and SDAR's tokenizer."""
    from t3d.models.loading import load_tokenizer
    from t3d.tasks import prompt

    shared = ROOT.parent / "shared"
    found = [path for path in (shared / "data", ROOT / "data") if (path / "MATH_train.json").exists()]
    if not found or not (shared / "sdar-4b-chat").is_dir():
        sys.exit("needs MATH_train.json in data/ or ../shared/data, and SDAR's tokenizer in ../shared/sdar-4b-chat")
    tokenizer = load_tokenizer(str(shared / "sdar-4b-chat"))
    questions = [row["question"] for row in json.loads((found[0] / "MATH_train.json").read_text())]
    return sorted(prompt(question, tokenizer).shape[1] for question in questions)


def quantiles(ascending: list[int]) -> list[int]:
    """The quantiles 0, .05, ... 1: the smallest value with at least that share at or below it."""
    return [ascending[max(0, -(-i * len(ascending) // 20) - 1)] for i in range(21)]


def measure_lengths() -> None:
    """Print the source of PROMPT_QUANTILES."""
    counts = prompt_lengths()
    kept = [count for count in counts if count <= 512]
    print(f"{len(kept)} of {len(counts)}, mean {sum(kept) / len(kept):.1f}: {quantiles(kept)}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--measure-lengths", action="store_true", help="print the quantiles of the real prompts")
    job.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_lengths:
        return measure_lengths()
    disable_progress_bar()
    print_peak(Shape(**args.peak["shape"]), Path(args.peak["folder"]), args.peak["variant"])


if __name__ == "__main__":
    main()

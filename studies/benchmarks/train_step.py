"""A T3D training step: ours against the released recipe, and the gain of each change.

    python -m studies.benchmarks.train_step [--repeats 2] [--quick]

Ours is the trainer itself (t3d.training.loop.Trainer.optimizer_step). The recipe and the steps between are in
released_recipe.py. Both get the same states of the same sequences, one sequence per micro-batch, and their losses must
agree to 1e-4. Prints a table and writes results/train_step.json: rows of {case, metric, value, baseline, ratio}.

tokens_per_second counts real tokens, prompt and answer, without padding and without the layout's second copy. It is the
median of alternating repeats of whole steps (forwards, backward, clipping, AdamW) in one process. peak_memory is the
peak of the forward and backward passes above the two loaded models, in MB. It includes gradients, and not AdamW's
moments, which are the same on both sides. Each peak is measured in its own process. Neither side sets allocator
variables (MALLOC_*). The environment's values hold for both, and train_step.context.json records them.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from studies.benchmarks.measure import publish, row, seconds
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
TARGET = (RECIPE, OURS, CHECKPOINTING, NO_REFERENCE)
LADDER = (RECIPE, TWO_FORWARDS, MASKED_ROWS, NO_PADDING, OURS, CHECKPOINTING, NO_REFERENCE)


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


def samples_of(shape: Shape) -> list[dict]:
    """Random trajectories of these lengths at full steps: one token per step, in a random order within each block."""
    generator, samples = torch.Generator().manual_seed(1), []
    for i, (prompt, answer) in enumerate(lengths(shape.sequences)):
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

    def __init__(self, shape: Shape, folder: Path, *overrides: str):
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
        self.samples, self.mask_id = samples_of(shape), shape.vocab - 1
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
        self.tokens = sum(len(s["prompt_ids"]) + len(s["response_ids"]) for s in self.samples)

    def step(self, variant: str, first: int | None = None) -> float:
        """One optimizer step; returns its loss. ``first``: use only the first padded sequences (for memory)."""
        trainer, student = self.trainer, self.trainer.student
        if student.is_gradient_checkpointing:
            student.gradient_checkpointing_disable()
        if variant == CHECKPOINTING:
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
            plain = variant == RECIPE
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
        trainer.accelerator.clip_grad_norm_(student.parameters(), self.config.clip_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return total


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def times(bench: Bench, variants: Sequence[str], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and the loss of every variant. Each repeat runs all variants, so drift affects all equally."""
    taken: dict[str, list[float]] = {variant: [] for variant in variants}
    losses: dict[str, float] = {}

    def step(variant: str) -> None:
        losses[variant] = bench.step(variant)

    bench.step(OURS)  # creates the optimizer's moments
    for _ in range(repeats):
        for variant in variants:
            taken[variant].append(seconds(partial(step, variant)))
    return {variant: statistics.median(values) for variant, values in taken.items()}, losses


def assert_equal_losses(losses: dict[str, float]) -> None:
    """All variants with a reference minimise the same function, so their losses must be equal."""
    expected = losses[RECIPE]
    for variant, loss in losses.items():
        if variant != NO_REFERENCE:
            assert abs(loss - expected) < 1e-4, f"{variant}: loss {loss}, the recipe's is {expected}"


def peak_megabytes(shape: Shape, folder: Path, variant: str) -> float:
    """Peak memory of a step's passes above the loaded models, measured in its own process."""
    job = json.dumps({"shape": asdict(shape), "folder": str(folder), "variant": variant})
    command = [sys.executable, "-m", "studies.benchmarks.train_step", "--peak", job]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


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


def case_rows(shape: Shape, name: str, variants: Sequence[str], repeats: int) -> list[dict]:
    """One model size: ours against the recipe, and with the whole ladder each variant against the one before."""
    with tempfile.TemporaryDirectory() as folder:
        write_models(shape, Path(folder))
        peaks = {variant: peak_megabytes(shape, Path(folder), variant) for variant in variants}
        bench = Bench(shape, Path(folder))
        taken, losses = times(bench, variants, repeats)
    assert_equal_losses(losses)
    speed = {variant: bench.tokens / value for variant, value in taken.items()}
    print(f"{name} ({shape}): {bench.tokens} real tokens, loss {losses[RECIPE]:.6f} on both sides")
    print_lengths(shape)

    def against(variant: str, case: str, baseline: str = RECIPE) -> list[dict]:
        return [
            row(case, "tokens_per_second", speed[variant], speed[baseline]),
            row(case, "peak_memory", peaks[variant], peaks[baseline]),
        ]

    rows = against(CHECKPOINTING, name)
    rows += against(OURS, f"{name}/no_checkpointing/{shape}")
    rows += against(NO_REFERENCE, f"{name}/no_checkpointing/round_interval=1/{shape}")
    rows += [
        row(
            f"cost_model/checkpointing/{shape}",
            "peak_memory",
            computed_peak(bench, CHECKPOINTING),
            peaks[CHECKPOINTING],
        )
    ]
    if variants == LADDER:
        for before, after in zip(LADDER, LADDER[1:-1], strict=False):
            rung = {OURS: "chunks", CHECKPOINTING: "checkpointing"}.get(after, after)
            rows += against(after, f"breakdown/{shape}/{rung}", baseline=before)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: SDAR-4B's shape with random weights in bf16

GPU_SEQUENCES = 32
GPU_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 without sparsity, operations/s, data sheets


def gpu_rows(repeats: int) -> list[dict]:
    """FlexAttention against sdpa, each in its own process: tokens/s, MFU, peak memory with weights and moments."""
    with tempfile.TemporaryDirectory() as folder:
        config = deepcopy(cost.MODELS["SDAR-4B"])
        config.mask_token_id, config.max_position_embeddings = 151_669, 32_768
        with torch.device("cuda"):
            SDARForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(Path(folder) / "reference")
        (Path(folder) / "student").symlink_to("reference")
        torch.cuda.empty_cache()
        found = {}
        for attention in ("sdpa", "flex_attention"):
            job = json.dumps({"folder": folder, "attention": attention, "repeats": repeats})
            command = [sys.executable, "-m", "studies.benchmarks.train_step", "--gpu", job]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            found[attention] = json.loads(done.stdout.splitlines()[-1])
    flex, sdpa = found["flex_attention"], found["sdpa"]
    name = f"gpu/SDAR-4B/{torch.cuda.get_device_name()}/flex_vs_sdpa"
    return [row(name, metric, flex[metric], sdpa[metric]) for metric in flex]


def print_gpu(folder: Path, attention: str, repeats: int) -> None:
    """The process of ``gpu_rows``: whole optimizer steps with checkpointing, the first left out."""
    model = cost.MODELS["SDAR-4B"]
    shape = Shape(model.num_hidden_layers, model.hidden_size, model.vocab_size, GPU_SEQUENCES)
    bench = Bench(
        shape,
        folder,
        "model.dtype=bfloat16",
        "training.mixed_precision=bf16",
        f"model.attn_implementation={attention}",
        "training.tokens_per_batch=8192",
        "training.head_chunk=1024",
    )
    bench.step(CHECKPOINTING)
    taken = statistics.median(seconds(lambda: bench.step(CHECKPOINTING)) for _ in range(repeats))
    states = bench.trainer.draw_states(1)
    # recomputed operations count once
    useful = cost.flops(cost.Model.of(model), sum(map(len, states)), passes=4)
    found = {"tokens_per_second": bench.tokens / taken, "peak_memory": torch.cuda.max_memory_allocated() / 2**20}
    peak = next((value for name, value in GPU_PEAKS.items() if name in torch.cuda.get_device_name()), None)
    print(json.dumps(found | ({"mfu": useful / taken / peak} if peak else {})))


def print_lengths(shape: Shape) -> None:
    """The lengths that the benchmark trains on."""
    for which, values in zip(("prompts", "answers"), zip(*lengths(shape.sequences), strict=True), strict=True):
        mean = sum(values) / len(values)
        print(f"  {which}: {len(values)} lengths, mean {mean:.0f}, longest {max(values)}: {sorted(values)}")


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
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one repeat of tiny models, to check that it runs")
    parser.add_argument("--measure-lengths", action="store_true", help="print the quantiles of the real prompts")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--gpu", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gpu:
        disable_progress_bar()
        job = json.loads(args.gpu)
        return print_gpu(Path(job["folder"]), job["attention"], job["repeats"])
    if args.peak:
        disable_progress_bar()
        job = json.loads(args.peak)
        return print_peak(Shape(**job["shape"]), Path(job["folder"]), job["variant"])
    if args.measure_lengths:
        return measure_lengths()
    disable_progress_bar()
    large, small, repeats = (QUICK_LARGE, QUICK_SMALL, 1) if args.quick else (LARGE, SMALL, args.repeats)
    rows = case_rows(large, "vs_released_recipe", TARGET, max(1, repeats // 2))
    rows += case_rows(small, "vs_released_recipe/small_vocabulary", LADDER, repeats)
    if torch.cuda.is_available():
        rows += gpu_rows(repeats)
    else:
        print("no CUDA device: the GPU part (SDAR-4B's shape, FlexAttention against sdpa) has not been run")
    publish(
        "train_step",
        rows,
        machine=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        dtype="float32",
        repeats=repeats,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        allocator={name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    )


if __name__ == "__main__":
    main()

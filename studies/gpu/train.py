"""Training steps on random weights in SDAR-1.7B's shape: kernels, packing, the released recipe beside them."""

import statistics
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from studies.benchmarks.decode import shape as tiny_shape
from studies.benchmarks.measure import row, seconds
from studies.benchmarks.train_step import CHECKPOINTING, GPU_PEAKS, RECIPE, Bench, Shape
from studies.gpu.part import Row, attempt, run
from t3d.models import SDARForCausalLM
from t3d.training import cost
from t3d.training.planning import estimate

PACKED = ("training.tokens_per_batch=8192", "training.head_chunk=1024")
WAYS = {
    "flex_attention, packed": (CHECKPOINTING, ("model.attn_implementation=flex_attention", *PACKED)),
    "sdpa, by length": (CHECKPOINTING, ("model.attn_implementation=sdpa", *PACKED)),
    "flex_attention, one sequence at a time": (CHECKPOINTING, ("model.attn_implementation=flex_attention",)),
    "the released recipe": (RECIPE, ("model.attn_implementation=sdpa",)),
}
ON_CPU = ("sdpa, by length", "the released recipe")  # FlexAttention has no backward pass there


def rows(device: str) -> Iterator[Row]:
    """One case per way. The recipe sees fewer sequences, because all its sequences have one size."""
    cpu = device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_shape(2, 64, 500) if cpu else deepcopy(cost.MODELS["SDAR-1.7B"])
        model.mask_token_id = model.vocab_size - 1
        dtype = torch.float32 if cpu else torch.bfloat16
        with torch.device(device):
            SDARForCausalLM._from_config(model, dtype=dtype).save_pretrained(Path(folder) / "reference")
        (Path(folder) / "student").symlink_to("reference")
        shape = Shape(model.num_hidden_layers, model.hidden_size, model.vocab_size, 4 if cpu else 32)
        for name, (variant, overrides) in WAYS.items():
            if not cpu or name in ON_CPU:
                sized = replace(shape, sequences=4) if variant == RECIPE else shape
                yield from attempt(name, partial(measured, sized, Path(folder), name, variant, overrides, cpu))


def measured(shape: Shape, folder: Path, name: str, variant: str, overrides: tuple[str, ...], cpu: bool) -> list[Row]:
    """Tokens per second, MFU and peak memory beside the cost model's, of whole optimizer steps after a first one."""
    precision = ("model.dtype=float32", "training.mixed_precision=no")
    if not cpu:
        precision = ("model.dtype=bfloat16", "training.mixed_precision=bf16")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    bench = Bench(shape, folder, *overrides, *precision)
    bench.step(variant)

    def step() -> None:
        bench.step(variant)
        if not cpu:
            torch.cuda.synchronize()

    taken = statistics.median(seconds(step) for _ in range(2))
    found = [row(name, "tokens_per_second", bench.tokens / taken)]
    if variant == RECIPE:
        return found if cpu else [*found, row(name, "peak_memory_MiB", torch.cuda.max_memory_allocated() / 2**20)]
    states = bench.trainer.draw_states(1)
    useful = cost.flops(cost.Model.of(bench.trainer.student.config), sum(map(len, states)), passes=4)
    peak = 1e11 if cpu else next((v for key, v in GPU_PEAKS.items() if key in torch.cuda.get_device_name()), None)
    if peak:
        found.append(row(name, "mfu", useful / taken / peak))
    computed = estimate(bench.trainer, max(map(len, states))).total / 2**20
    memory = computed if cpu else torch.cuda.max_memory_allocated() / 2**20
    return [*found, row(name, "peak_memory_MiB", memory, computed)]


if __name__ == "__main__":
    run(rows)

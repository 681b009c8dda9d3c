"""Decoding on random weights in SDAR's shapes: kernels, compiled or not, lanes and steps, against the bandwidth bound.

The bound is the time of reading all weights and the cache's used slots once in every forward, at a copy's speed. The
published loop (studies/benchmarks/published_loop.py) runs beside it, one prompt at a time.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from studies.benchmarks.decode import Case, bandwidth, shape
from studies.benchmarks.measure import peak_memory, row
from studies.gpu.part import Row, attempt, run
from t3d.blocks.settings import DecodeSettings
from t3d.decode.local import LocalEngine
from t3d.decode.model_facts import bytes_per_slot
from t3d.decode.protocol import Request
from t3d.models import SDARForCausalLM
from t3d.training.cost import MODELS


@dataclass(frozen=True)
class Way:
    """One way of decoding: attention (None = the engine's choice), compiled, lanes, steps per block."""

    attention: str | None = None
    compile: bool = False
    lanes: int = 1
    steps: int = 1

    def __str__(self) -> str:
        kernel = f"{self.attention or 'default'}{', compiled' if self.compile else ''}"
        return f"{kernel}/lanes={self.lanes}/steps={self.steps}"


FLASH = "flash_attention_2"
# by worth: what the engine chooses, then each kernel, then more steps, then compiled steps
WAYS = (
    *(Way(lanes=n) for n in (1, 64, 16, 256)),
    *(Way(kernel, lanes=n) for kernel in ("sdpa", FLASH) for n in (1, 64)),
    *(Way(kernel, compile=True, lanes=n) for kernel in (FLASH, "sdpa") for n in (1, 64)),
    *(Way(lanes=n, steps=s) for s in (2, 4) for n in (1, 64, 256)),
    *(Way(kernel, lanes=256) for kernel in ("sdpa", FLASH)),
    *(Way("flex_attention", lanes=n) for n in (1, 64)),
)
ON_CPU = (Way(), Way(lanes=4), Way(FLASH), Way(lanes=4, steps=2))  # flash-attn is an error there


def rows(device: str) -> Iterator[Row]:
    """The default ways on both shapes first, then the others."""
    cpu = device == "cpu"
    at = torch.device(device)
    speed = 1e10 if cpu else bandwidth(at, 3)
    if not cpu:
        yield row("bandwidth of a copy", "GB_per_second", speed / 1e9)
    shapes = {"tiny": shape(2, 64, 500)} if cpu else {name: MODELS[name] for name in ("SDAR-1.7B", "SDAR-4B")}
    max_token = 8 if cpu else 128
    for name, config in shapes.items():
        config.mask_token_id = config.vocab_size - 1
        with at:
            model = SDARForCausalLM._from_config(
                config, dtype=torch.float32 if cpu else torch.bfloat16, attn_implementation="sdpa"
            ).eval()
        ways = ON_CPU if cpu else WAYS
        for way in ways:
            case = f"{name}/{way}"
            yield from attempt(case, partial(measured, model, way, case, speed, max_token))
            if way == ways[1]:
                yield from attempt(f"{name}/published loop", partial(loop, model, f"{name}/published loop", max_token))
        del model
        if not cpu:
            torch.cuda.empty_cache()


def measured(model: SDARForCausalLM, way: Way, name: str, speed: float, max_token: int) -> list[Row]:
    """Tokens per second against the bound, the peak memory, and the forwards' share of the time, each of a warm run."""
    case = Case.of(model, way.lanes, max_token)
    engine = LocalEngine(
        model,
        mask_id=case.mask_id,
        stop_ids=case.forbidden,
        forbidden_ids=case.forbidden,
        max_active=way.lanes,
        attention=way.attention,
        compile=way.compile,
    )
    settings = DecodeSettings(denoising_steps_per_block=way.steps, temperature=0.1, max_token=max_token)
    requests = [Request(f"bench/{i}", 0, tuple(ids)) for i, ids in enumerate(case.prompts)]
    forwards = max(answer.forwards for answer in engine.generate(requests, settings, seed=0))  # compiles too
    found = {}

    def timed() -> None:
        began = time.perf_counter()
        list(engine.generate(requests, settings, seed=0))
        found["seconds"] = time.perf_counter() - began

    memory = peak_memory(timed, model.device)
    slots = sum(len(ids) + max_token / 2 for ids in case.prompts)
    read = weights_read(model) + slots * bytes_per_slot(model.config, model.dtype)
    bound = case.tokens * speed / (read * forwards)
    rate = case.tokens / found["seconds"]
    share = model_seconds(model, timed) / found["seconds"]  # a part of the second run, which waits for each forward
    return [
        row(name, "tokens_per_second", rate, bound),
        row(name, "peak_memory_MiB", memory / 2**20),
        row(name, "model_share", share),
    ]


def model_seconds(model: SDARForCausalLM, work: Callable[[], None]) -> float:
    """Seconds of ``work`` in the model's decoder, with the device waited for before and after each forward."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    spent, decoder = [0.0], model.get_decoder()

    def before(*args) -> None:
        wait()
        spent.append(-time.perf_counter())

    def after(*args) -> None:
        wait()
        spent[-1] += time.perf_counter()

    hooks = [decoder.register_forward_pre_hook(before), decoder.register_forward_hook(after)]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(spent)


def weights_read(model: SDARForCausalLM) -> int:
    """Bytes of the weights that every forward reads: all but the embedding's table, unless it is the head too."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    unread = 0 if model.get_output_embeddings().weight is table else table.nbytes
    return sum(p.nbytes for p in model.parameters()) - unread


def loop(model: SDARForCausalLM, name: str, max_token: int) -> list[Row]:
    """The published loop's tokens per second."""
    case = Case.of(model, 2, max_token)
    settings = DecodeSettings(denoising_steps_per_block=1, temperature=0.1)
    case.loop(settings, 1)
    return [row(name, "tokens_per_second", case.loop(settings, 2))]


if __name__ == "__main__":
    run(rows)

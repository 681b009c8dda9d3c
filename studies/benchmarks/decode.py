"""Decoding: fused against unfused commits, our engine against the published loop, the shares of time and memory.

    python -m studies.benchmarks.decode [cpu | gpu] [--repeats 5] [--quick]

Prints a table and writes results/decode.json (on a GPU decode_gpu.json): rows of {case, metric, value, baseline,
ratio}. Each figure is the median of alternating repeats in one process. Peak memory is above the loaded model's, each
measured in its own process. The GPU's part has the shape of SDAR-4B in bf16 with random weights, at 4 tokens per step.
Its baseline is the bound of memory bandwidth: one reading of all parameters per forward, at a copy's speed.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from studies.benchmarks import published_loop
from studies.benchmarks.measure import alternate, in_fresh_process, peak_memory, publish, row, seconds
from studies.storymath.problems import generate as story_problem
from t3d.blocks import decoding
from t3d.blocks.settings import DecodeSettings
from t3d.common.paths import ROOT
from t3d.decode.local import LocalEngine
from t3d.decode.protocol import Request
from t3d.models import SDARConfig, SDARForCausalLM
from t3d.models.loading import load_model, load_tokenizer, special_ids
from t3d.tasks import prompt

TEACHER = str(ROOT / "models" / "embedded-teacher")


def random_model(layers: int, width: int, vocab: int) -> SDARForCausalLM:
    """An SDAR with random weights; its last two ids are the mask and a stop that nobody draws."""
    torch.manual_seed(0)
    return SDARForCausalLM._from_config(shape(layers, width, vocab), attn_implementation="sdpa").eval()


def shape(layers: int, width: int, vocab: int) -> SDARConfig:
    """The configuration of an SDAR model with heads of 64."""
    return SDARConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        mask_token_id=vocab - 1,
    )


SDAR_4B = SDARConfig(
    vocab_size=151_936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32_768,
    tie_word_embeddings=False,
    mask_token_id=151_935,
)


class Case:
    """A model, its prompts and the number of tokens of a run. Every answer has the full length."""

    def __init__(self, model, prompts: list[list[int]], mask_id: int, forbidden: list[int], max_token: int):
        self.model, self.prompts, self.mask_id = model, prompts, mask_id
        self.forbidden, self.max_token = forbidden, max_token
        self.tokens = len(prompts) * max_token

    @classmethod
    def random(cls, layers: int, width: int, vocab: int, prompts: int, max_token: int) -> "Case":
        return cls.of(random_model(layers, width, vocab), prompts, max_token)

    @classmethod
    def of(cls, model, prompts: int, max_token: int) -> "Case":
        """A model with random weights on random prompts."""
        generator, vocab = torch.Generator().manual_seed(1), model.config.vocab_size
        ids = [torch.randint(0, vocab - 2, (30 + i % 5,), generator=generator).tolist() for i in range(prompts)]
        return cls(model, ids, vocab - 1, [vocab - 2, vocab - 1], max_token)

    @classmethod
    def embedded(cls, prompts: int, max_token: int = 64) -> "Case":
        """The embedded teacher on StoryMath questions; stops are forbidden so that every answer has the same length."""
        model, tokenizer = load_model(TEACHER), load_tokenizer(TEACHER)
        ids, rng = special_ids(model.config, tokenizer, model.generation_config), random.Random(7)
        questions = [story_problem(rng, 2).question for _ in range(prompts)]
        prompt_ids = [prompt(question, tokenizer)[0].tolist() for question in questions]
        return cls(model, prompt_ids, ids.mask_id, [*ids.forbidden_ids, *ids.stop_ids], max_token)

    def engine(self, settings: DecodeSettings, slots: int, fused: bool = True) -> float:
        """Tokens per second of our engine."""
        engine = LocalEngine(
            self.model,
            mask_id=self.mask_id,
            stop_ids=self.forbidden,
            forbidden_ids=self.forbidden,
            max_active=slots,
            fused_commit=fused,
        )
        requests = [Request(f"bench/{i}", 0, tuple(ids)) for i, ids in enumerate(self.prompts)]
        settings = replace(settings, max_token=self.max_token)
        return self.tokens / seconds(lambda: list(engine.generate(requests, settings, seed=0)))

    def loop(self, settings: DecodeSettings, prompts: int) -> float:
        """Tokens per second of the published loop on the first ``prompts`` prompts, one at a time."""
        settings = replace(settings, max_token=self.max_token)

        def work():
            for ids in self.prompts[:prompts]:
                published_loop.generate(self.model, ids, settings, self.mask_id, [])

        return prompts * self.max_token / seconds(work)


def fused_rows(case: Case, name: str, slots: int, repeats: int, temperature: float = 0.0) -> list[dict]:
    """A block's last tokens written by the next block's first forward, against an extra forward."""
    rows = []
    for steps in (1, 2, 4):
        settings = DecodeSettings(denoising_steps_per_block=steps, temperature=temperature)
        fused, unfused = alternate(
            partial(case.engine, settings, slots), partial(case.engine, settings, slots, fused=False), repeats
        )
        rows.append(row(f"fused_vs_unfused/{name}steps={steps}", "tokens_per_second", fused, unfused))
    return rows


def loop_rows(case: Case, name: str, repeats: int, looped: int, steps: int = 1) -> list[dict]:
    """Against the published loop at 4 / ``steps`` tokens per step, temperature .1, all prompts in flight."""
    settings = DecodeSettings(denoising_steps_per_block=steps, temperature=0.1)
    ours, theirs = alternate(
        lambda: case.engine(settings, len(case.prompts)), lambda: case.loop(settings, looped), repeats
    )
    at = f"/steps={steps}" if steps > 1 else ""
    return [row(f"vs_published_loop/{name}prompts={len(case.prompts)}{at}", "tokens_per_second", ours, theirs)]


def model_share(case: Case, settings: DecodeSettings) -> float:
    """Share of a run's time in forwards, head included: the model's call without the drawing of tokens."""
    spent = {"forward": 0.0, "draw": 0.0}

    def timed(name, function):
        def wrapper(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - began
            return result

        return wrapper

    original_draw, original_forward = decoding.draw, case.model.forward
    decoding.draw, case.model.forward = timed("draw", decoding.draw), timed("forward", case.model.forward)
    try:
        total = case.tokens / case.engine(settings, len(case.prompts))
    finally:
        decoding.draw, case.model.forward = original_draw, original_forward
    return (spent["forward"] - spent["draw"]) / total


CASES: dict[str, tuple[Callable[..., Case], tuple[int, ...]]] = {
    "": (Case.embedded, (64,)),
    "vocab=152k/": (Case.random, (8, 512, 151_936, 64, 32)),
}


def memory_of(name: str, side: str) -> int:
    """Peak bytes above the loaded model of a run at 4 tokens per step, temperature .1, by our engine or the loop."""
    make, arguments = CASES[name]
    case = make(*arguments)
    settings = DecodeSettings(denoising_steps_per_block=1, temperature=0.1)
    work = {"engine": lambda: case.engine(settings, len(case.prompts)), "loop": lambda: case.loop(settings, 4)}
    return peak_memory(work[side], case.model.device)


def memory_rows() -> list[dict]:
    """All prompts in flight against the published loop's one at a time."""
    rows = []
    for name, (_, arguments) in CASES.items():
        ours, theirs = (in_fresh_process(memory_of, name, side) / 2**20 for side in ("engine", "loop"))
        prompts = 64 if len(arguments) == 1 else arguments[3]
        rows.append(row(f"peak_memory/{name}prompts={prompts}", "MiB", ours, theirs))
    return rows


def bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second of a copy within the device's memory, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(10):
            target.copy_(source)
        torch.cuda.synchronize(device)

    copies()
    return 10 * 2 * source.nbytes / statistics.median(seconds(copies) for _ in range(repeats))


def gpu_rows(config: SDARConfig, max_token: int, repeats: int, device: torch.device) -> list[dict]:
    """Tokens per second at batch 1, 32 and 128 against the bandwidth bound, and the peak memory."""
    speed = bandwidth(device, repeats)
    with device:
        model = SDARForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    settings = DecodeSettings(denoising_steps_per_block=1, temperature=0.1)
    rows = [row("gpu/bandwidth", "GB_per_second", speed / 1e9)]
    for batch in (1, 32, 128):
        case = Case.of(model, batch, max_token)
        case.engine(settings, batch)
        rate = statistics.median(case.engine(settings, batch) for _ in range(repeats))
        bound = batch * settings.block_size * speed / weights
        rows.append(row(f"gpu/sdar-4b/batch={batch}", "tokens_per_second", rate, bound))
        taken = peak_memory(partial(case.engine, settings, batch), device)
        rows.append(row(f"gpu/sdar-4b/batch={batch}", "peak_memory_MiB", taken / 2**20))
    return rows


def cpu_rows(repeats: int) -> list[dict]:
    """All rows of the CPU part."""
    rows = memory_rows()
    body = Case.random(16, 1024, 4096, prompts=1, max_token=64)
    rows += fused_rows(body, "", 1, repeats)
    del body
    embedded = Case.embedded(64)
    for slots in (1, 8, 64):
        rows += fused_rows(embedded, f"embedded/slots={slots}/", slots, repeats)
    rows += loop_rows(embedded, "", repeats, looped=8)
    one = Case.embedded(1)
    for steps in (1, 4):
        rows += loop_rows(one, "", 3 * repeats, looped=1, steps=steps)
    large = Case.random(8, 512, 151_936, prompts=64, max_token=32)
    rows += loop_rows(large, "vocab=152k/", min(repeats, 3), looped=4)
    for name, case, temperatures in (
        ("", embedded, (0.1,)),
        ("/embedded", embedded, (0.0,)),
        ("/vocab=152k", large, (0.0, 0.1)),
    ):
        for temperature in temperatures:
            label = f"model_share{name}" + (f"/temperature={temperature}" if name else "")
            settings = DecodeSettings(denoising_steps_per_block=1, temperature=temperature)
            share = statistics.median(model_share(case, settings) for _ in range(repeats))
            rows.append(row(label, "share", share))
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", nargs="?", choices=("cpu", "gpu"), help="run only this part; default both if there is a GPU"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat, to check that it runs")
    args = parser.parse_args()
    repeats = 1 if args.quick else args.repeats
    context = {"torch": torch.__version__, "repeats": repeats}
    if args.part != "gpu":
        machine, threads = platform.processor() or platform.machine(), torch.get_num_threads()
        publish("decode", cpu_rows(repeats), machine=machine, threads=threads, dtype="float32", **context)
    if args.part == "cpu":
        return
    if not torch.cuda.is_available():
        print("\nThe GPU's part was not run: torch sees no CUDA device.")
        return
    rows = gpu_rows(SDAR_4B, 256, repeats, torch.device("cuda"))
    publish("decode_gpu", rows, machine=torch.cuda.get_device_name(), dtype="bfloat16", **context)


if __name__ == "__main__":
    main()

"""Decoding: our engine against the published loop, the gain of each change, memory, busy cores, growth.

Every part is a function of ``python -m studies.benchmarks``. It gives rows (see ``measure.row``). Each figure is the
median of alternating repeats in one process. Peak memory is above the loaded model's, each measured in its own process.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from studies.benchmarks import published_loop
from studies.benchmarks.measure import (
    Row,
    alternate,
    alternate_all,
    endless_loops,
    in_fresh_process,
    output_of,
    peak_memory,
    row,
    seconds,
)
from studies.storymath.problems import generate as story_problem
from t3d.blocks import decoding
from t3d.blocks.settings import DecodeSettings
from t3d.common.paths import ROOT
from t3d.common.processes import cores
from t3d.decode.attention import CacheAttention
from t3d.decode.local import LocalEngine
from t3d.decode.protocol import Request
from t3d.models import SDARConfig, SDARForCausalLM
from t3d.models.loading import load_model, load_tokenizer, special_ids
from t3d.tasks import prompt

TEACHER = str(ROOT / "models" / "embedded-teacher")
LOOP = "the published loop, one prompt at a time"
REPEATING = CacheAttention("sdpa")  # transformers repeats keys and values for each query head


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

    def engine(
        self, settings: DecodeSettings, slots: int, fused: bool = True, attention: CacheAttention | None = None
    ) -> float:
        """Tokens per second of our engine. ``attention``: in place of the engine's choice."""
        engine = LocalEngine(
            self.model,
            mask_id=self.mask_id,
            stop_ids=self.forbidden,
            forbidden_ids=self.forbidden,
            max_active=slots,
            fused_commit=fused,
        )
        engine.attention = attention or engine.attention
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


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def loop_rows(quick: bool) -> Iterator[Row]:
    """Against the published loop at temperature .1, all prompts in flight: many prompts, one, a large vocabulary."""
    many, one = (Case.embedded(8, 16), Case.embedded(1, 16)) if quick else (Case.embedded(64), Case.embedded(1))
    large = Case.random(2, 64, 4000, 8, 8) if quick else Case.random(8, 512, 151_936, prompts=64, max_token=32)
    yield from beside_loop("embedded teacher", many, 1 if quick else 5, looped=8)
    for steps in (1, 4):
        yield from beside_loop("embedded teacher", one, 1 if quick else 15, looped=1, steps=steps)
    yield from beside_loop("8 layers of width 512, vocabulary 152k", large, 1 if quick else 2, looped=4)


def beside_loop(name: str, case: Case, repeats: int, looped: int, steps: int = 1) -> Iterator[Row]:
    """One case; the loop decodes the first ``looped`` prompts."""
    settings = DecodeSettings(denoising_steps_per_block=steps, temperature=0.1)
    count = len(case.prompts)
    ours, theirs = alternate(lambda: case.engine(settings, count), lambda: case.loop(settings, looped), repeats)
    label = f"{name}, {counted(count, 'prompt')}, {counted(steps, 'step')} per block"
    yield row(label, "tokens/s", ours, theirs, beside=LOOP)


def change_rows(quick: bool) -> Iterator[Row]:
    """Each change to the engine beside the engine without it."""
    small = Case.embedded(4, 16) if quick else Case.embedded(64)
    wide = Case.random(2, 64, 500, 2, 8) if quick else Case.random(16, 1024, 4096, prompts=1, max_token=32)
    long = Case.random(2, 64, 500, 2, 16) if quick else Case.random(4, 256, 4096, prompts=16, max_token=512)
    repeats = 1 if quick else 3
    for name, case, slots, steps in (
        ("embedded teacher, 1 lane", _first(small, 1 if quick else 8), 1, 1),
        ("embedded teacher, 1 lane", _first(small, 1 if quick else 8), 1, 4),
        ("embedded teacher, 64 lanes", small, 64, 1),
        ("16 layers of width 1024, 1 lane", wide, 1, 1),
        ("16 layers of width 1024, 1 lane", wide, 1, 4),
    ):
        settings = DecodeSettings(denoising_steps_per_block=steps)
        label = f"fused commits: {name}, {counted(steps, 'step')} per block"
        yield compare(label, "a commit is a forward", case, repeats, settings, slots, {"fused": False})
    settings = DecodeSettings(denoising_steps_per_block=1, temperature=0.1)
    for name, case in (("embedded teacher, 64 lanes", small), ("4 layers of width 256, 512 tokens, 16 lanes", long)):
        label = f"grouped heads share keys and values: {name}"
        yield compare(label, "repeated for each head", case, repeats, settings, 64, {"attention": REPEATING})
    few = _first(small, 16)
    ours, theirs = alternate(lambda: few.engine(settings, 16), lambda: few.engine(settings, 1), repeats)
    yield row("lanes share a forward: embedded teacher, 16 prompts", "tokens/s", ours, theirs, beside="one lane")
    yield from draw_rows(quick)


def compare(
    label: str, beside: str, case: Case, repeats: int, settings: DecodeSettings, slots: int, without: dict
) -> Row:
    """The engine, and the engine with the options ``without``."""
    ours, theirs = alternate(
        partial(case.engine, settings, slots), partial(case.engine, settings, slots, **without), repeats
    )
    return row(label, "tokens/s", ours, theirs, beside=beside)


def draw_rows(quick: bool) -> Iterator[Row]:
    """Drawing from a large vocabulary: the search in two levels, and rows in groups that fit a core's cache."""
    rows, vocab = (8, 2000) if quick else (128, 151_936)
    torch.manual_seed(0)
    logits, u = torch.randn(rows, vocab), torch.rand(rows)
    probability = logits.softmax(-1)
    repeats = 3 if quick else 15
    ours, theirs = (
        rows / taken
        for taken in alternate(
            lambda: seconds(lambda: decoding.inverse_cdf(probability, u)),
            lambda: seconds(lambda: decoding.inverse_cdf(probability, u, width=vocab)),
            repeats,
        )
    )
    name = f"{rows} draws from {vocab:,} ids"
    yield row(f"a draw in two levels: {name}", "draws/s", ours, theirs, beside="one running sum")
    settings = DecodeSettings(temperature=0.1)
    ours, theirs = (
        rows / taken
        for taken in alternate(
            lambda: seconds(lambda: decoding.draw(logits, u, settings, rows_at_once=max(1, 2**21 // vocab))),
            lambda: seconds(lambda: decoding.draw(logits, u, settings, rows_at_once=rows)),
            repeats,
        )
    )
    yield row(f"a few rows at a time: {name}", "draws/s", ours, theirs, beside="all rows at once")


CASES: dict[str, tuple[Callable[..., Case], tuple[int, ...]]] = {
    "embedded teacher, 64 prompts": (Case.embedded, (64,)),
    "8 layers of width 512, vocabulary 152k, 64 prompts": (Case.random, (8, 512, 151_936, 64, 32)),
}
QUICK_CASES = {"2 layers of width 64, 4 prompts": (Case.random, (2, 64, 500, 4, 8))}


def memory_of(name: str, side: str) -> int:
    """Peak bytes above the loaded model of a run at 4 tokens per step, temperature .1, by our engine or the loop."""
    make, arguments = (CASES | QUICK_CASES)[name]
    case = make(*arguments)
    settings = DecodeSettings(denoising_steps_per_block=1, temperature=0.1)
    work = {"engine": lambda: case.engine(settings, len(case.prompts)), "loop": lambda: case.loop(settings, 2)}
    return peak_memory(work[side], case.model.device)


def memory_rows(quick: bool) -> Iterator[Row]:
    """All prompts in flight against the published loop's one at a time."""
    for name in QUICK_CASES if quick else CASES:
        ours, theirs = (in_fresh_process(memory_of, name, side) / 2**20 for side in ("engine", "loop"))
        yield row(name, "MiB above the model", ours, theirs, beside=LOOP)


def busy_rows(quick: bool) -> Iterator[Row]:
    """Seconds of one small decode by threads and their waiting, on a quiet machine and with one busy core beside."""
    for waiting in ("PASSIVE", "ACTIVE"):
        command = [sys.executable, "-c", "from studies.benchmarks import decode; decode.print_busy()", str(int(quick))]
        for line in output_of(command, OMP_WAIT_POLICY=waiting).splitlines():
            threads, quiet, busy = line.split()
            label = f"{counted(int(threads), 'thread')}, waiting {'passively' if waiting == 'PASSIVE' else 'actively'}"
            yield row(label, "s with a busy core", float(busy), float(quiet), beside="quiet")


def print_busy() -> None:
    """The process of ``busy_rows``: for one and for all threads, seconds on a quiet machine and beside a busy core."""
    quick = sys.argv[-1] == "1"
    case = Case.embedded(4, 8) if quick else Case.embedded(32)
    settings = DecodeSettings(denoising_steps_per_block=1, temperature=0.1)
    for threads in dict.fromkeys((1, cores())):
        torch.set_num_threads(threads)
        case.engine(settings, 32)
        quiet = statistics.median(case.tokens / case.engine(settings, 32) for _ in range(3))
        with endless_loops(1):
            busy = statistics.median(case.tokens / case.engine(settings, 32) for _ in range(1 if quick else 3))
        print(threads, quiet, busy)


def share_rows(quick: bool) -> Iterator[Row]:
    """The model's share of a run of the engine."""
    small = Case.embedded(4, 8) if quick else Case.embedded(64)
    large = Case.random(2, 64, 4000, 4, 8) if quick else Case.random(8, 512, 151_936, prompts=64, max_token=16)
    for name, case in (("embedded teacher, 64 lanes", small), ("vocabulary 152k, 64 lanes", large)):
        for temperature in (0.0, 0.1):
            settings = DecodeSettings(denoising_steps_per_block=1, temperature=temperature)
            share = statistics.median(model_share(case, settings) for _ in range(1 if quick else 3))
            yield row(f"engine: {name}, temperature {temperature:g}", "share in the model", share)


def growth_rows(quick: bool) -> Iterator[Row]:
    """Microseconds per token by lanes, by the answer's length and by the block's size."""
    repeats, model = 1 if quick else 3, random_model(2, 64, 500) if quick else random_model(4, 256, 4096)
    settings = DecodeSettings(denoising_steps_per_block=1, temperature=0.1)
    cases = {n: Case.embedded(max(n, 2 if quick else 8), 8 if quick else 64) for n in lanes_of(quick)}
    speed = alternate_all({n: partial(case.engine, settings, n) for n, case in cases.items()}, repeats)
    for n, found in speed.items():
        yield curve("lanes", "embedded teacher, 64 tokens", n, found)
    inner = alternate_all({n: partial(feed_forward, case, settings, n) for n, case in cases.items()}, repeats)
    for n, share in inner.items():
        yield curve("lanes", "its feed-forward layers alone", n, speed[n] / share)
    lengths = (8, 16) if quick else (128, 256, 512, 1024)
    for name, attention in (("keys and values shared", None), ("keys and values repeated", REPEATING)):
        by_length = {n: Case.of(model, 2 if quick else 8, n) for n in lengths}
        speed = alternate_all(
            {n: partial(case.engine, settings, 8, attention=attention) for n, case in by_length.items()},
            1 if quick else 2,
        )
        for n, found in speed.items():
            yield curve("length", name, n, found)
    case = Case.of(model, 2 if quick else 16, 32 if quick else 128)
    for name, share in (("a block per step", 1), ("4 tokens per step", 4)):
        ways = {
            block: DecodeSettings(
                block_size=block, denoising_steps_per_block=1 if share == 1 else block // share, temperature=0.1
            )
            for block in ((4, 8) if quick else (4, 8, 16, 32))
        }
        speed = alternate_all({block: partial(case.engine, way, 16) for block, way in ways.items()}, repeats)
        for block, found in speed.items():
            yield curve("block", name, block, found)


def feed_forward(case: Case, settings: DecodeSettings, slots: int) -> float:
    """The share of a run's time in the feed-forward layers."""
    spent, hooks = [0.0], []

    def before(*args: object) -> None:
        spent[0] -= time.perf_counter()

    def after(*args: object) -> None:
        spent[0] += time.perf_counter()

    for name, module in case.model.named_modules():
        if name.endswith(".mlp"):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        total = case.tokens / case.engine(settings, slots)
    finally:
        for hook in hooks:
            hook.remove()
    return spent[0] / total


def lanes_of(quick: bool) -> tuple[int, ...]:
    """The numbers of lanes of the curve."""
    return (1, 4) if quick else (1, 4, 16, 64, 128, 256, 512)


def curve(of: str, name: str, x: float, tokens_per_second: float) -> Row:
    """A point of the curve ``name`` over ``of``."""
    return row(f"{name}, {of} {x}", "µs per token", 1e6 / tokens_per_second, curve=of, line=name, x=x)


def _first(case: Case, prompts: int) -> Case:
    return Case(case.model, case.prompts[:prompts], case.mask_id, case.forbidden, case.max_token)


def counted(number: int, name: str) -> str:
    """A number of things: 1 prompt, 2 prompts."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"

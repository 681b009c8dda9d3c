"""The local engine against a slow oracle that knows no cache, no batches and no lanes."""

import dataclasses
import shutil
from collections import Counter, deque
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from t3d.blocks.decoding import choose, draw, initial_tokens, stream_key, uniforms
from t3d.blocks.settings import DecodeSettings
from t3d.common.paths import ROOT
from t3d.decode import local
from t3d.decode.cache import CACHE_NAME
from t3d.decode.graphs import CAPTURES, LIMIT
from t3d.decode.local import LocalEngine, Run, places
from t3d.decode.protocol import Request
from t3d.models.loading import load_model
from tests.conftest import MASK, PAD, STOP, raises_key, tiny_model

ORDINARY = torch.arange(60)


def engine(model, **options) -> LocalEngine:
    options = {"ordinary_ids": ORDINARY, **options}
    return LocalEngine(model, mask_id=MASK, stop_ids=[STOP, PAD], forbidden_ids=[], **options)


def requests(lengths=(1, 3, 4, 6, 8, 11, 13, 2), seed=0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Request(f"p/{i}", 0, tuple(torch.randint(0, 60, (n,), generator=generator).tolist()))
        for i, n in enumerate(lengths)
    ]


def oracle(model, request: Request, settings: DecodeSettings, seed: int):
    """Decode one prompt with whole forwards over the sequence so far: ids and unmask steps of the response."""
    model.config.block_size = size = settings.block_size
    ids, steps, when = list(request.prompt_ids), 0, []
    key = torch.tensor([stream_key(seed, request.prompt, request.sample)])

    def shown(block: list[int], start: int) -> list[int]:
        first = initial_tokens(key, torch.arange(start, start + size), settings.random_init_ratio, ORDINARY, MASK)
        return [x_t if token == MASK else token for token, x_t in zip(block, first.tolist(), strict=True)]

    while True:
        start = len(ids) // size * size
        known = len(ids) - start
        block = ids[start:] + [MASK] * (size - known)
        unmasked_at = [0] * size
        for stage in range(2 * size):
            masked = torch.tensor([[token == MASK for token in block]])
            if not masked.any():
                break
            steps += 1
            with torch.no_grad():
                logits = model(torch.tensor([ids[:start] + shown(block, start)])).logits[0, start:].clone()
            logits[:, MASK] = -torch.inf
            position = torch.arange(start, start + size)
            u = uniforms(key, position, torch.tensor(steps))
            token, confidence, entropy = draw(logits, u, settings, need_entropy=True)
            at = {"key": key, "position": position[None], "step": torch.tensor([steps]), "stage": torch.tensor([stage])}
            picked = choose(masked, confidence[None], entropy[None], settings, **at)[0]
            for i in picked.nonzero().flatten().tolist():
                block[i], unmasked_at[i] = int(token[i]), steps
        ids = ids[:start] + block
        when += unmasked_at[known:]
        prompt = len(request.prompt_ids)
        answer = ids[prompt : prompt + settings.max_token]
        if STOP in answer or PAD in answer or len(ids) >= prompt + settings.max_token:
            return ids[prompt:], when


CASES = [
    DecodeSettings(temperature=0.0, max_token=18),
    DecodeSettings(temperature=0.0, max_token=18, denoising_steps_per_block=1),
    DecodeSettings(temperature=0.0, max_token=17, denoising_steps_per_block=3),
    DecodeSettings(temperature=1.0, max_token=18, denoising_steps_per_block=2),
    DecodeSettings(temperature=1.0, top_k=5, top_p=0.8, max_token=18, block_size=8, denoising_steps_per_block=3),
    DecodeSettings(temperature=0.7, top_p=0.9, max_token=18, remasking_strategy="random"),
    DecodeSettings(temperature=0.0, max_token=18, remasking_strategy="sequential", denoising_steps_per_block=2),
    DecodeSettings(temperature=0.0, max_token=18, remasking_strategy="low_confidence_dynamic", dynamic_threshold=0.3),
    DecodeSettings(temperature=0.0, max_token=18, remasking_strategy="entropy_bounded", eb_threshold=1.5),
    DecodeSettings(temperature=0.5, max_token=18, remasking_strategy="ancestral", denoising_steps_per_block=6),
    DecodeSettings(temperature=0.0, max_token=18, remasking_strategy="ancestral", ancestral_schedule="cosine"),
]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.remasking_strategy}-T{s.temperature}-B{s.block_size}")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_equals_the_oracle(model, settings, fused):
    expected = {r.id: oracle(model, r, settings, seed=5) for r in requests()}
    results = list(engine(model, max_active=3, fused_commit=fused).generate(requests(), settings, seed=5))
    assert {r.id for r in results} == set(expected) and len(results) == len(expected)
    for result in results:
        assert (result.response_ids, result.unmask_step) == expected[result.id], result.id


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_slots_and_order_change_nothing(model, temperature):
    settings = DecodeSettings(temperature=temperature, max_token=20, remasking_strategy="low_confidence_dynamic")
    runs = []
    for lanes, prompts in [(1, requests()), (3, requests()[::-1]), (64, requests())]:
        results = engine(model, max_active=lanes).generate(prompts, settings, seed=1)
        runs.append({r.id: (r.response_ids, r.unmask_step, r.length, r.finish_reason) for r in results})
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_forwards_per_block(model, steps, fused):
    """Aligned prompt of two blocks: one prefill, then `steps` forwards a block, plus a commit each but the last."""
    model.lm_head.weight.data[[STOP, PAD]] = 0
    settings = DecodeSettings(temperature=0.0, denoising_steps_per_block=steps, max_token=20)
    (result,) = engine(model, fused_commit=fused).generate(requests([8]), settings, seed=0)
    blocks = len(result.response_ids) // 4
    assert result.steps == steps * blocks
    assert result.forwards == 1 + result.steps + (0 if fused else blocks - 1)


def test_stop_and_length(model):
    model.lm_head.weight.data[:] = 0
    model.lm_head.weight.data[STOP] = 0
    settings = DecodeSettings(temperature=1.0, max_token=10)
    results = list(engine(model).generate(requests(range(1, 30)), settings, seed=3))
    assert {r.finish_reason for r in results} == {"stop", "length"}
    for r in results:
        answer = r.response_ids[: r.length]
        if r.finish_reason == "stop":
            assert answer[-1] in (STOP, PAD) and not {STOP, PAD} & set(answer[:-1])
        else:
            assert r.length == 10 and not {STOP, PAD} & set(answer)
        assert MASK not in r.response_ids


def test_a_request_that_cannot_fit_is_refused(model):
    with raises_key("rollout.max_token", "=400", "p/0/0", "256 positions"):
        list(engine(model).generate(requests([5]), DecodeSettings(max_token=400), seed=0))
    with raises_key("prompt", "p/0/0"):
        list(engine(model).generate([Request("p/0", 0, (1, MASK))], DecodeSettings(max_token=8), seed=0))


def test_samples_differ_and_repeat(model):
    settings = DecodeSettings(temperature=1.0, max_token=12)
    prompt = requests([6])[0]
    pair = [dataclasses.replace(prompt, sample=k) for k in range(2)]
    first = {r.id: r.response_ids for r in engine(model).generate(pair, settings, seed=0)}
    again = {r.id: r.response_ids for r in engine(model).generate(pair, settings, seed=0)}
    other = {r.id: r.response_ids for r in engine(model).generate(pair, settings, seed=1)}
    assert first == again and first != other
    assert len(set(map(tuple, first.values()))) == 2


def test_larger_block_model():
    settings = DecodeSettings(temperature=0.0, block_size=8, denoising_steps_per_block=8, max_token=20)
    model = tiny_model(3)
    for result in engine(model, max_active=4).generate(requests(), settings, seed=0):
        expected = oracle(model, next(r for r in requests() if r.id == result.id), settings, 0)
        assert (result.response_ids, result.unmask_step) == expected


# ---------------------------------------------------------------------------------------------------------------------
# What a step asks of the device


class HostTraffic(TorchDispatchMode):
    """Counts what makes the host wait for a device: reads of values, shapes that depend on values, uploads."""

    WAITS = {"item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "isin", "equal"}
    WAITS |= {"bincount", "lift_fresh"}

    def __enter__(self):
        self.seen, self.patch = Counter(), pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):
            self.patch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def _counted(self, name, method):
        def counted(tensor, *args, **kwargs):
            self.seen[name] += 1
            return method(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.seen[name] += 1
        if name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            self.seen["boolean index"] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_the_counter_sees_what_waits():
    x = torch.arange(4)
    for wait in (
        lambda: bool((x > 1).any()),
        lambda: int(x[2]),
        lambda: x[x > 1],
        lambda: x.masked_fill_(x > 9, 0).index_put_((x > 2,), x[:1]),
        lambda: x.nonzero(),
        lambda: x.unique(),
        lambda: torch.isin(torch.arange(1000), torch.arange(500)),
        lambda: x.tolist(),
        lambda: torch.tensor([1, 2]),
    ):
        with HostTraffic() as traffic:
            wait()
        assert traffic.seen.total() >= 1
    with HostTraffic() as traffic:
        (x > 1).byte().argsort(descending=True, stable=True)[:2]
        x[torch.arange(2)] = torch.where(x[:2] > 0, 1, 0)
    assert not traffic.seen


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.remasking_strategy}-T{s.temperature}-B{s.block_size}")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@torch.inference_mode()
def test_a_step_reads_once(model, settings, fused):
    """From prefilled lanes on, drifting apart, committing, until one is through: one read at most and no upload.

    (A nucleus without top-k over more than 1024 words asks once more: whether its candidates hold the mass.)"""
    prompts = requests()
    decoder = LocalEngine(model, mask_id=MASK, stop_ids=[STOP], forbidden_ids=[STOP], fused_commit=fused)
    run = Run(decoder, settings, 0, len(prompts), 40)
    run.refill(deque(prompts))
    steps = 0
    while True:
        with HostTraffic() as traffic:
            finished = list(run.step())
        if finished:
            break
        steps += 1
        assert traffic.seen <= Counter(tolist=1), steps
    assert steps >= 3


@pytest.mark.parametrize("strategy", ["low_confidence_static", "random", "sequential"])
@pytest.mark.parametrize("block, steps", [(4, 4), (4, 2), (8, 3), (4, 6)])
@torch.inference_mode()
def test_whole_blocks_of_a_fixed_number_of_steps_are_read_once(model, strategy, block, steps):
    """Prompts that end with blocks: only the step that ends all blocks reads. With shorter first blocks every step."""
    settings = DecodeSettings(
        block_size=block, denoising_steps_per_block=steps, remasking_strategy=strategy, temperature=0.5, max_token=24
    )
    for length, between in ((2 * block, 0), (2 * block + 1, 1)):
        prompts = [Request(f"p{i}", 0, tuple(range(10 + i, 10 + i + length))) for i in range(3)]
        decoder = LocalEngine(model, mask_id=MASK, stop_ids=[STOP], forbidden_ids=[STOP])
        run = Run(decoder, settings, 0, len(prompts), 6 * block)
        run.refill(deque(prompts))
        reads = []
        for _ in range(min(steps, block)):
            with HostTraffic() as traffic:
                list(run.step())
            reads.append(traffic.seen["tolist"])
        assert reads[0] == between and (between or (reads.count(1) == 1 and reads[-1] == 1))


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.remasking_strategy}-T{s.temperature}-B{s.block_size}")
def test_the_host_knows_the_next_steps_masks(model, monkeypatch, settings):
    """The rows that the head gets are those of the masks of the lanes at work: not one more, not one less."""
    denoise, seen = Run._denoise, []

    def watching(run, wide, turn):
        rows = []
        with monkeypatch.context() as patch:
            draw = run.runner.draw
            patch.setattr(run.runner, "draw", lambda h, *args, **kw: rows.append(len(h)) or draw(h, *args, **kw))
            result = denoise(run, wide, turn)
        assert sum(rows) == int(result.masked.sum()) > 0
        assert (run.ahead.commits > 0) >= (wide is not None) and (wide is None or bool(wide.any()))
        seen.append(sum(rows))
        return result

    monkeypatch.setattr(Run, "_denoise", watching)
    list(engine(model, max_active=3).generate(requests(), settings, seed=5))
    assert len(set(seen)) > 3


def test_a_commit_or_prefill_computes_no_logits(model):
    """Unfused: only the forwards of steps return a draw from logits; a prefill and a commit return nothing."""
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(output is not None))
    settings = DecodeSettings(temperature=0.0, max_token=8)
    model.lm_head.weight.data[[STOP, PAD]] = 0
    (result,) = engine(model, fused_commit=False).generate(requests([8]), settings, seed=0)
    assert (calls.count(False), calls.count(True)) == (2, result.steps)


# ---------------------------------------------------------------------------------------------------------------------
# Answers to the same prompt


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tokens, rows", [(2**15, [2]), (8, [1, 1]), (1, [1, 1])])
def test_one_prompt_is_prefilled_once(model, monkeypatch, temperature, tokens, rows):
    """Several samples, and another prompt with the same words: results as when each is decoded alone.

    The prompt of three tokens has no whole block; the others' two share a forward where the bound allows it."""
    prefilled = []

    def note(module, args, kwargs) -> None:
        if kwargs[CACHE_NAME].length is None:
            prefilled.append(len(args[0]))

    settings = DecodeSettings(temperature=temperature, max_token=14, denoising_steps_per_block=2)
    prompts = [dataclasses.replace(r, sample=k) for r in requests([9, 13, 3]) for k in range(3)]
    prompts.append(dataclasses.replace(prompts[0], prompt="the same words"))
    alone = [next(engine(model).generate([r], settings, seed=1)) for r in prompts]
    model.register_forward_pre_hook(note, with_kwargs=True)
    monkeypatch.setattr(local, "TOKENS_PREFILLED", tokens)
    together = {r.id: r for r in engine(model).generate(prompts, settings, seed=1)}
    assert prefilled == rows
    for one in alone:
        other = together[one.id]
        assert (one.response_ids, one.unmask_step) == (other.response_ids, other.unmask_step)
        assert one.forwards == other.forwards  # what the answer takes, whoever else took it with it
    if temperature:
        assert len({tuple(r.response_ids) for r in alone}) > 6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "settings",
    [
        DecodeSettings(temperature=0.0),
        DecodeSettings(temperature=1.0),
        DecodeSettings(temperature=1.0, top_p=0.9),
        DecodeSettings(temperature=0.7, top_k=5, top_p=0.9),
        DecodeSettings(temperature=0.0, remasking_strategy="random"),
        DecodeSettings(temperature=0.0, remasking_strategy="entropy_bounded"),
        DecodeSettings(temperature=0.0, self_verify=True),
        DecodeSettings(temperature=1.0, energy_candidates=3),
    ],
    ids=["greedy", "drawn", "nucleus", "top k", "random", "entropy", "verified", "energy"],
)
def test_logits_that_are_no_numbers_end_the_run_at_their_step(model, settings, value):
    """The weight of one token's output row: that row's logit alone is NaN, or infinite."""
    model.name_or_path = "a/broken"
    model.lm_head.weight.data[7, 3] = value
    with raises_key("model", "model a/broken: step 1 "):
        list(engine(model).generate(requests(), replace(settings, max_token=12), seed=1))


def test_the_step_of_a_late_overflow_is_named(model):
    """A token that the prompt has not, but the answer does: its embedding is infinite."""
    settings = DecodeSettings(temperature=0.0, max_token=24)
    (answer,) = engine(model).generate(requests()[:1], settings, seed=1)
    first = answer.response_ids[answer.unmask_step.index(1)]
    model.model.embed_tokens.weight.data[first] = torch.inf
    with raises_key("model", ": step 2 "):
        list(engine(model).generate(requests()[:1], settings, seed=1))


# ---------------------------------------------------------------------------------------------------------------------
# Random tokens in place of masks (ReDi's x_T)


@pytest.mark.parametrize(
    "strategy, steps", [("low_confidence_static", 4), ("low_confidence_static", 2)] + [("random", 1)]
)
@pytest.mark.parametrize("fused", [True, False])
def test_undecided_positions_show_x_T_and_are_decided_all_the_same(strategy, steps, fused):
    model, asked = tiny_model(), requests()
    settings = DecodeSettings(
        denoising_steps_per_block=steps,
        remasking_strategy=strategy,
        temperature=0.5,
        max_token=14,
        random_init_ratio=0.5,
    )
    found = {t.id: t for t in engine(model, max_active=3, fused_commit=fused).generate(asked, settings, seed=3)}
    for request in asked:
        ids, when = oracle(model, request, settings, seed=3)
        trajectory = found[request.id].validate(MASK)
        assert (trajectory.response_ids, trajectory.unmask_step) == (ids, when)
        key = torch.tensor(stream_key(3, request.prompt, request.sample))
        place = torch.arange(len(request.prompt_ids), len(request.prompt_ids) + len(ids))
        assert trajectory.initial_ids == initial_tokens(key, place, 0.5, ORDINARY, MASK).tolist()
    masks = dataclasses.replace(settings, random_init_ratio=0.0)
    plain = {t.id: t for t in engine(model).generate(asked, masks, seed=3)}
    assert all(t.initial_ids == [] for t in plain.values())
    assert any(plain[name].response_ids != found[name].response_ids for name in found), "x_T changed nothing"


def test_the_share_of_random_tokens():
    """With probability `ratio` an ordinary token, evenly; another answer has others."""
    place, ordinary = torch.arange(20_000), torch.arange(30, 40)
    first = initial_tokens(torch.tensor(5), place, 0.3, ordinary, MASK)
    random = first[first != MASK]
    assert len(random) / len(place) == pytest.approx(0.3, abs=0.015)
    counts = torch.bincount(random, minlength=64)
    assert counts[30:40].sum() == len(random) and (counts[30:40] / len(random) - 0.1).abs().max() < 0.02
    assert (initial_tokens(torch.tensor(6), place, 0.3, ordinary, MASK) != first).float().mean() > 0.3
    assert (initial_tokens(torch.tensor(5), place, 0.0, ordinary, MASK) == MASK).all()
    assert (initial_tokens(torch.tensor(5), place, 1.0, ordinary, MASK) != MASK).all()


def test_random_tokens_need_something_to_be_drawn_from(model):
    bare = engine(model, ordinary_ids=())
    with raises_key("random_init_ratio", "=0.2"):
        next(bare.generate(requests(), DecodeSettings(random_init_ratio=0.2), seed=0))


# ---------------------------------------------------------------------------------------------------------------------
# Attention kernels, and a GPU


def in_full(results) -> list[tuple]:
    return sorted((r.id, r.response_ids, r.unmask_step, r.forwards) for r in results)


def word_model(implementation: str = "sdpa", device: str = "cpu", **options):
    """The embedded teacher: it knows what it wants to say, so that rounding turns no argmax."""
    model = load_model(str(ROOT / "models" / "embedded-teacher"), attn_implementation=implementation, device=device)
    return LocalEngine(model, mask_id=model.config.mask_token_id, stop_ids=[138], forbidden_ids=[], **options)


def test_eager_equals_sdpa():
    settings = DecodeSettings(temperature=0.0, max_token=16, denoising_steps_per_block=2)
    expected = in_full(word_model().generate(requests(), settings, seed=0))
    assert in_full(word_model("eager").generate(requests(), settings, seed=0)) == expected


@pytest.mark.slow
def test_flex_attention_equals_sdpa():
    settings = DecodeSettings(temperature=0.0, max_token=8, denoising_steps_per_block=2)
    expected = in_full(word_model().generate(requests(), settings, seed=0))
    try:
        found = in_full(word_model("flex_attention").generate(requests(), settings, seed=0))
    except Exception as error:
        if "inductor" in f"{type(error)} {error}".lower():
            pytest.skip(f"FlexAttention cannot compile here: {str(error).splitlines()[0]}")
        raise
    assert found == expected


@pytest.mark.parametrize("shape", [(1, 4), (7, 8), (3, 1)])
def test_the_places_of_the_masks(shape):
    masked = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    row, column = places(masked, int(masked.sum()))
    assert torch.stack([row, column], 1).tolist() == masked.nonzero().tolist()


COMPILED = DecodeSettings(temperature=0.0, max_token=12, denoising_steps_per_block=2)
needs_capture = pytest.mark.skipif(not CAPTURES, reason="torch 2.6 cannot follow the forwards: compile is refused")


def test_compile_is_refused_by_a_torch_that_cannot_follow_the_forwards(model):
    with nullcontext() if CAPTURES else raises_key("rollout.compile", "=true"):
        engine(model, compile=True)


@needs_capture
def test_compiled_graphs_are_whole_and_few(model, monkeypatch):
    """Captured by torch.compile and run without its compiler: one graph a forward, and few shapes of them."""
    from torch._dynamo.utils import counters

    expected = in_full(engine(model, max_active=3).generate(requests(), COMPILED, seed=5))
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **kw: compile(m, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    counters.clear()
    decoder = engine(model, max_active=3, compile=True)
    assert in_full(decoder.generate(requests(), COMPILED, seed=5)) == expected
    assert 2 < counters["stats"]["unique_graphs"] <= 8 == LIMIT == torch._dynamo.config.recompile_limit
    assert len(decoder.graphs.shapes) == counters["stats"]["unique_graphs"]


@needs_capture
@pytest.mark.slow
def test_compiled_equals_eager(model):
    """Inductor's kernels on a CPU; where it has no C++ compiler, the one line that says so."""
    expected = in_full(engine(model, max_active=3).generate(requests(), COMPILED, seed=5))
    torch._dynamo.reset()
    decoder = engine(model, max_active=3, compile=True)
    if not shutil.which("g++"):
        with raises_key("rollout.compile", "=true"):
            list(decoder.generate(requests(), COMPILED, seed=5))
        pytest.skip("no g++: torch.compile refuses, as it should")
    assert in_full(decoder.generate(requests(), COMPILED, seed=5)) == expected


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_gpu_decodes_as_a_cpu_does(steps, implementation):
    """Greedy in fp32: fused, unfused, in few lanes and in many, and as on the CPU."""
    settings = DecodeSettings(temperature=0.0, max_token=32, denoising_steps_per_block=steps)
    expected = [(r.id, r.response_ids, r.unmask_step) for r in word_model().generate(requests(), settings, seed=0)]
    for options in ({}, {"fused_commit": False}, {"max_active": 3}):
        decoder = word_model(implementation, "cuda", **options)
        found = decoder.generate(requests(), settings, seed=0)
        assert sorted((r.id, r.response_ids, r.unmask_step) for r in found) == sorted(expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.remasking_strategy}-T{s.temperature}-B{s.block_size}")
@torch.inference_mode()
def test_a_gpu_waits_once_a_step(settings, fused, monkeypatch):
    """CUDA itself raises where the host would wait; only the read in `_advance` may."""
    decoder = word_model(device="cuda", fused_commit=fused)
    decoder.stop_ids = decoder.stop_ids[:0]
    run = Run(decoder, settings, 0, len(requests()), 40)
    run.refill(deque(requests()))
    reads, tolist = [], torch.Tensor.tolist

    def allowed(tensor):
        torch.cuda.set_sync_debug_mode("default")
        reads.append(tensor.shape)
        values = tolist(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return values

    list(run.step())  # what a first step loads does not count
    monkeypatch.setattr(torch.Tensor, "tolist", allowed)
    for step in range(2, 5):
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert not list(run.step())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(reads) == step - 1

"""The contract that guards most: at any state of any trajectory, training sees the logits that the decoder sees.

Training runs [clean | noisy copy] in one forward, several sequences at once, packed and padded. The decoder runs block
after block over a slotted cache that lanes share. A plain forward over [earlier blocks | x_t of this block] is the
third opinion: no cache, no layout, no packing.

With a logit shift a token is predicted by the hidden state before it, a block's first one by the last state of the
block before, which holds its final tokens.
"""

from collections import deque

import pytest
import torch

from t3d.blocks.settings import DecodeSettings
from t3d.decode import local
from t3d.decode.protocol import Request
from t3d.states.base import State, collate
from t3d.states.trajectory import TrajectoryNoise
from tests.conftest import MASK, PAD, STOP, tiny_model

CLOSE = {"rtol": 0, "atol": 1e-5}
ORDINARY = torch.arange(60)
PACKINGS = {"rows": [1] * 13, "packed": [13], "both": [1, 4, 2, 3, 3]}


def engine(model, **options) -> local.LocalEngine:
    return local.LocalEngine(model, mask_id=MASK, stop_ids=[STOP, PAD], forbidden_ids=[], **options)


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(60, (n,), generator=generator).tolist() for n in range(1, 14)]
    return [Request(f"p/{i}", 0, tuple(prompt)) for i, prompt in enumerate(prompts)]


def rollouts(model) -> list[dict]:
    """Trajectories of the prompts of 1 to 13 tokens, of different lengths: some stop, some do not."""
    settings = DecodeSettings(temperature=3.0, max_token=17)
    found = sorted(engine(model, max_active=5).generate(requests(), settings, seed=2), key=lambda r: len(r.prompt_ids))
    assert len({r.length for r in found}) > 3 and {r.finish_reason for r in found} == {"stop", "length"}
    return [vars(r) for r in found]


def draw_states(samples: list[dict], block_size: int, seed: int = 0, **options) -> list[State]:
    options = {"mask_ratios": (1.0, 0.75, 0.5, 0.25), "mask_ratio_exponent": 0.0, **options}
    noise = TrajectoryNoise(block_size, MASK, ORDINARY, **options)
    return [noise(sample, torch.Generator().manual_seed(seed + i)) for i, sample in enumerate(samples)]


@torch.no_grad()
def training_logits(model, states: list[State], packing: list[int]) -> list[torch.Tensor]:
    """Of each state, (len(noisy), vocab): what the training forward predicts at every place of the noisy copy; with a
    shift nothing predicts position 0 (0 throughout)."""
    shift = getattr(model.config, "logit_shift", False)
    rest = iter(states)
    rows = [[next(rest) for _ in range(n)] for n in packing]
    assert next(rest, None) is None
    batch = collate(rows, PAD, shift=shift)
    logits = model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids).logits
    found = []
    for r, row in enumerate(rows):
        at = 0
        for state in row:
            own = range(at + state.clean_length, at + len(state))
            sources = [before(state, at, place) for place in own] if shift else own
            found.append(torch.stack([logits[r, k] if k >= 0 else torch.zeros_like(logits[r, 0]) for k in sources]))
            at += len(state)
    # The loss looks where the targets are predicted.
    at_targets = torch.cat([x[state.position - state.start] for x, state in zip(found, states, strict=True)])
    assert torch.equal(logits.flatten(0, 1)[batch.loss_index], at_targets)
    return found


def before(state: State, at: int, place: int) -> int:
    """The place of the token before the one at ``place`` of the noisy copy, in a layout that begins ``at``; -1 = none.
    A block's first token has it in the clean copy."""
    position = state.start + place - at - state.clean_length
    if position and state.block[position] != state.block[position - 1]:
        return at + position - 1
    return place - 1 if position else -1


def plain_logits(model, state: State, block_size: int) -> torch.Tensor:
    """(len(noisy), vocab): one forward a block over [clean earlier blocks | x_t of the block], without a cache."""
    model.config.block_size = block_size
    shift = getattr(model.config, "logit_shift", False)
    found = []
    for start in range(state.start, len(state.ids), block_size):
        block = state.noisy[start - state.start : start - state.start + block_size]
        logits = model(torch.cat([state.ids[:start], block])[None]).logits[0]
        if shift:
            logits = torch.cat([torch.zeros_like(logits[:1]), logits[:-1]])
        found.append(logits[start:])
    return torch.cat(found)


@torch.inference_mode()
def decoder_logits(model, samples: list[dict], states: list[State], block_size: int, fused: bool) -> list[torch.Tensor]:
    """(len(noisy), vocab) a state: the engine's prefill, commits and block forwards, with the states' blocks put in."""
    settings = DecodeSettings(block_size=block_size, denoising_steps_per_block=1)
    prompts = [Request(sample["id"], 0, tuple(sample["prompt_ids"])) for sample in samples]
    capacity = max(len(state.ids) for state in states)
    run = local.Run(engine(model), settings, 0, len(states), capacity)
    run.refill(deque(prompts))
    lanes, found = run.lanes, [[] for _ in states]
    assert lanes.start.tolist() == [state.start for state in states]
    while bool(lanes.active.any()):
        for lane, state in enumerate(states):
            start, at = int(lanes.start[lane]), int(lanes.start[lane]) - state.start
            if lanes.active[lane]:  # the earlier blocks as they were decoded, this one at x_t
                lanes.ids[lane, :start] = state.ids[:start]
                lanes.ids[lane, start : start + block_size] = state.noisy[at : at + block_size]
        run.runner.key_slots = int((lanes.start * lanes.active).max()) + block_size
        previous = lanes.commit & lanes.active
        if not fused:
            run.runner.block_forward(previous, None)
            previous = None
        logits = run.runner.block_forward(previous, lanes.active, lambda h, w: h[:, -block_size:] @ w.T)
        for lane in lanes.active.nonzero().flatten().tolist():
            found[lane].append(logits[lane])
        lanes.commit |= lanes.active
        lanes.start += block_size * lanes.active.long()
        lanes.active &= lanes.start < torch.tensor([len(state.ids) for state in states])
    return [torch.cat(blocks) for blocks in found]


@pytest.mark.parametrize("shift", [False, True], ids=["own", "shift"])
@pytest.mark.parametrize("block_size", [4, 8], ids=["rollout's-block", "larger-block"])
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_training_equals_the_decoder_and_a_plain_forward(model, packing, block_size, shift):
    """Every position of every block, hidden or visible, with random tokens among the masks."""
    model.config.logit_shift = shift
    samples = rollouts(model)
    states = draw_states(samples, block_size, random_ratio=0.2)
    trained = training_logits(model, states, packing)
    fused = decoder_logits(model, samples, states, block_size, fused=True)
    unfused = decoder_logits(model, samples, states, block_size, fused=False)
    for state, *found in zip(states, trained, fused, unfused, strict=True):
        expected = plain_logits(model, state, block_size).detach()
        assert expected.shape == (len(state.noisy), model.config.vocab_size) and expected.std() > 0.1
        for logits in found:
            torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"denoising_steps_per_block": 2},
        {"denoising_steps_per_block": 3, "remasking_strategy": "random"},
        {"remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.2, "top_p": 0.9},
        {"block_size": 8, "denoising_steps_per_block": 5},
    ],
    ids=["static-4", "static-2", "random-3", "dynamic", "B8"],
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("shift", [False, True], ids=["own", "shift"])
def test_training_sees_what_the_decoder_saw_when_it_wrote_the_trajectory(model, steps_seen, settings, fused, shift):
    """A real decoding run is watched: the logits of its every step, by answer and by what was still masked. Then the
    training states of its trajectories are looked up: each is one the decoder was in, with the same logits. Four lanes
    decode thirteen answers, so lanes are refilled beside others that are inside a block."""
    model.config.logit_shift = shift
    settings = DecodeSettings(temperature=3.0, max_token=17, **settings)
    decoder = engine(model, max_active=4, fused_commit=fused)
    samples = [vars(r) for r in decoder.generate(requests(), settings, seed=2)]
    watched = {(seen.request.id, tuple(seen.position.tolist())): seen.logits for seen in steps_seen}
    assert len(watched) == len(steps_seen) == sum(sample["steps"] for sample in samples)

    size, looked_up = settings.block_size, set()
    real_words = torch.arange(model.config.vocab_size) != MASK  # the decoder may not draw the mask
    for ratio in (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125):
        states = draw_states(samples, size, mask_ratios=(ratio,), random_ratio=0.0)
        for sample, state, logits in zip(samples, states, training_logits(model, states, [5, 1, 3, 4]), strict=True):
            for at in range(0, len(state.noisy), size):
                hidden = at + (state.noisy[at : at + size] == MASK).nonzero().flatten()
                key = sample["id"], tuple((state.start + hidden).tolist())
                looked_up.add(key)
                seen = watched[key]  # KeyError: a training state that the decoder never was in
                torch.testing.assert_close(logits[hidden][:, real_words], seen[:, real_words], **CLOSE)
    assert len(looked_up) > 0.7 * len(watched)


def test_a_wrong_grid_is_noticed(model):
    """The check has teeth: the release's grid gives other logits for prompts that end inside a block."""
    samples = [sample for sample in rollouts(model) if len(sample["prompt_ids"]) % 4]
    wrong = draw_states(samples, 4, from_response=True, random_ratio=0.0)
    right = draw_states(samples, 4, random_ratio=0.0)
    for a, b, x, y in zip(
        wrong, right, training_logits(model, wrong, [10]), training_logits(model, right, [10]), strict=True
    ):
        start = max(a.start, b.start)
        n = min(len(a.ids), len(b.ids)) - start
        assert (x[start - a.start :][:n] - y[start - b.start :][:n]).abs().max() > 0.01


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_implementation_gives_the_same_training_logits(implementation):
    states = draw_states(rollouts(tiny_model()), 4, random_ratio=0.1)
    model = tiny_model()
    model.set_attn_implementation(implementation)
    for state, logits in zip(states, training_logits(model, states, [6, 1, 6]), strict=True):
        torch.testing.assert_close(logits, plain_logits(model, state, 4).detach(), **CLOSE)

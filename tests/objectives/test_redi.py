"""Rectified couplings against a slow loop; with an all-mask x_T they are SFT on the model's own text."""

import pytest
import torch

from t3d.blocks.settings import DecodeSettings
from t3d.objectives.redi import ReDi
from t3d.objectives.sft import SFT
from t3d.states.base import collate
from t3d.states.unordered import BlockDiffusionNoise, RectifiedNoise
from tests.conftest import MASK, PAD, tiny_model
from tests.decode.test_local import engine, requests
from tests.objectives.test_naive_td import draw
from tests.objectives.test_t3d import POST, assert_same_gradients
from tests.states.test_states import ORDINARY, trajectory
from tests.test_training_equals_decoding import plain_logits

LENGTHS = [(1, 3), (3, 9), (5, 2), (6, 17)]


def coupled(prompt: int, length: int) -> dict:
    """A trajectory whose x_T is a random token at every third response position, else the mask."""
    sample = trajectory(prompt, length)
    start = [int(ORDINARY[i % 30]) if i % 3 == 0 else MASK for i in range(len(sample["response_ids"]))]
    return sample | {"initial_ids": start}


def slow_loss(student, sample: dict, state, block_size: int, t: dict[int, float]) -> torch.Tensor:
    log_probs = plain_logits(student, state, block_size).log_softmax(-1)
    prompt = len(sample["prompt_ids"])
    end = min(prompt + len(sample["response_ids"]), prompt + sample["length"] + POST)
    total = torch.zeros(())
    for p in range(prompt, end):
        if state.noisy[p - state.start] == sample["initial_ids"][p - prompt]:  # x_0 has other ids than x_T
            total = total - log_probs[p - state.start, sample["response_ids"][p - prompt]] / t[p // block_size]
    return total / (end - prompt)


@pytest.mark.parametrize("block_size, per_block", [(4, True), (4, False), (8, True)])
def test_equals_the_slow_loop(block_size, per_block):
    student, samples = tiny_model(), [coupled(*lengths) for lengths in LENGTHS]
    noise = RectifiedNoise(block_size, MASK, t_min=0.4, per_block=per_block, post_num=POST)
    redi = ReDi(noise, chunk=5)
    states = draw(redi, samples)
    loss, metrics = redi(student, None, collate([states[:1], states[1:3], states[3:]], PAD))
    slow = []
    for i, (sample, state) in enumerate(zip(samples, states, strict=True)):
        blocks = range(state.start // block_size, len(state.ids) // block_size)
        u = torch.rand(len(blocks) if per_block else 1, generator=torch.Generator().manual_seed(i)).tolist()
        t = {block: 0.4 + 0.6 * (u[k] if per_block else u[0]) for k, block in enumerate(blocks)}
        slow.append(slow_loss(student, sample, state, block_size, t))
    torch.testing.assert_close(loss, torch.stack(slow), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["rectified"], loss.detach())
    assert_same_gradients(student, loss.sum(), sum(slow))


def test_a_state_shows_x_T_or_x_0():
    sample = coupled(5, 30)
    state = RectifiedNoise(4, MASK, t_min=0.3, post_num=99)(sample, torch.Generator().manual_seed(1))
    learnt, seen = set(state.position.tolist()), set()
    for i, (start, final) in enumerate(zip(sample["initial_ids"], sample["response_ids"], strict=True)):
        p = 5 + i
        assert state.noisy[p - state.start] == (start if p in learnt else final)
        seen.add((start == MASK, p in learnt))
    assert len(seen) == 4, "some case never came up"
    assert state.noisy[: 5 - state.start].tolist() == sample["prompt_ids"][state.start :]


@pytest.mark.parametrize("start", ["missing", "all masks"])
def test_with_an_all_mask_x_T_it_is_sft_on_the_models_own_text(start):
    """Same states, same weights, same loss, wherever both look (every token to the end of the last block)."""
    model = tiny_model()
    samples = [trajectory(*lengths) for lengths in LENGTHS]
    if start == "all masks":
        samples = [sample | {"initial_ids": [MASK] * len(sample["response_ids"])} for sample in samples]
    redi = ReDi(RectifiedNoise(4, MASK, t_min=0.2, post_num=99))
    sft = SFT(BlockDiffusionNoise(4, MASK, PAD, t_min=0.2))
    batches = [collate([draw(objective, samples)], PAD) for objective in (redi, sft)]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    losses = [objective(model, None, batch).loss for objective, batch in zip((redi, sft), batches, strict=True)]
    assert torch.equal(*losses)


def test_at_t_1_the_state_is_what_the_decoder_began_with():
    """Rollouts with random tokens in their x_T: training shows the very ids that the engine's first forward saw."""
    settings = DecodeSettings(max_token=12, temperature=0.5, random_init_ratio=0.4)
    records = [vars(t) for t in engine(tiny_model()).generate(requests(), settings, seed=1)]
    noise, some = RectifiedNoise(4, MASK, t_min=0.999999, t_max=1.0, post_num=99), 0
    for sample in records:
        state = noise(sample, torch.Generator().manual_seed(0))
        prompt = len(sample["prompt_ids"])
        assert state.noisy[prompt - state.start :].tolist() == sample["initial_ids"]
        assert state.position.tolist() == list(range(prompt, prompt + len(sample["response_ids"])))
        some += sum(token != MASK for token in sample["initial_ids"])
    assert some > 10


def test_stage_0_draws_x_T_anew_whatever_the_answer_was_decoded_from():
    """.7 random tokens, .3 masks, at the positions learnt; another draw has another x_T, and x_0 is shown elsewhere."""
    noise = RectifiedNoise(4, MASK, t_min=0.6, post_num=99, random_start_ratio=0.7, ordinary_ids=ORDINARY)
    sample = coupled(5, 1001)
    first, second = (noise(sample, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    learnt = first.position - first.start
    shown = first.noisy[learnt]
    assert (shown != MASK).float().mean() == pytest.approx(0.7, abs=0.05)
    assert set(shown.tolist()) == {MASK, *ORDINARY.tolist()}
    assert not torch.equal(first.noisy, second.noisy)
    x_0 = torch.tensor(sample["prompt_ids"] + sample["response_ids"])[first.start :]
    others = torch.ones(len(x_0), dtype=torch.bool)
    others[learnt] = False
    assert torch.equal(first.noisy[: len(x_0)][others], x_0[others])

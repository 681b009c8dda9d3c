"""The block-diffusion NELBO against a slow loop and its expectation."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from t3d.objectives.sft import SFT
from t3d.states.base import collate
from t3d.states.unordered import BlockDiffusionNoise
from tests.conftest import MASK, PAD, tiny_model
from tests.test_training_equals_decoding import plain_logits

GENERATOR = torch.Generator().manual_seed(7)
SAMPLES = [
    {
        "id": f"q/{prompt}/0",
        "prompt_ids": torch.randint(60, (prompt,), generator=GENERATOR).tolist(),
        "response_ids": torch.randint(60, (response,), generator=GENERATOR).tolist(),
    }
    for prompt, response in [(1, 7), (4, 4), (6, 11), (9, 2)]
]


def slow_nelbo(model, sample: dict, state, block_size: int) -> torch.Tensor:
    """sum over masked tokens of -log p(x_0) / t, over the response's length to the end of its last block."""
    log_probs = plain_logits(model, state, block_size).log_softmax(-1)
    prompt = len(sample["prompt_ids"])
    x0 = sample["prompt_ids"] + sample["response_ids"]
    x0 += [PAD] * (-len(x0) % block_size)
    weights = zip(state.position.tolist(), state.weight.tolist(), strict=True)
    t = {p // block_size: 1 / (weight * (len(x0) - prompt)) for p, weight in weights}
    total = 0.0
    for p in range(prompt, len(x0)):
        if state.noisy[p - state.start] == MASK:
            total = total - log_probs[p - state.start, x0[p]] / t[p // block_size]
    return total / (len(x0) - prompt)


@pytest.mark.parametrize("block_size, per_block", [(4, True), (4, False), (8, True)])
def test_equals_the_slow_loop(block_size, per_block):
    model = tiny_model()
    sft = SFT(BlockDiffusionNoise(block_size, MASK, PAD, t_min=0.3, per_block=per_block), chunk=3)
    states = [sft.noise(sample, torch.Generator().manual_seed(i)) for i, sample in enumerate(SAMPLES)]
    loss, metrics = sft(model, None, collate([states[:2], states[2:]], PAD))
    slow = [slow_nelbo(model, *pair, block_size) for pair in zip(SAMPLES, states, strict=True)]
    torch.testing.assert_close(loss, torch.stack(slow), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["nelbo"], loss.detach())
    loss.sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(slow).backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=2e-5)


def test_a_uniform_model_pays_log_vocab_a_token_on_average():
    """E over (t, x_t) of the weights is 1 a token, so the NELBO of p = 1/64 is log 64, whatever is masked."""
    model = tiny_model()
    model.lm_head.weight.data.zero_()
    sft = SFT(BlockDiffusionNoise(4, MASK, PAD, t_min=0.3))
    states = [sft.noise(SAMPLES[2], torch.Generator().manual_seed(seed)) for seed in range(400)]
    with torch.no_grad():
        loss = sft(model, None, collate([states[i : i + 20] for i in range(0, 400, 20)], PAD)).loss
    assert float(loss.mean()) == pytest.approx(4.1589, rel=0.06)


def test_a_state_without_a_mask_costs_nothing():
    sft, model = SFT(BlockDiffusionNoise(4, MASK, PAD, t_min=1e-6, t_max=1e-6)), tiny_model()
    loss = sft(model, None, collate([[sft.noise(SAMPLES[0], torch.Generator().manual_seed(0))]], PAD)).loss
    assert loss.tolist() == [0.0]
    loss.sum().backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_at_block_size_1_with_a_shift_it_is_the_next_token_loss():
    """With every token masked (t = 1): the loss and gradient of transformers' own class on the same ids."""
    model = tiny_model(block_size=1)
    model.config.logit_shift = True
    sft = SFT(BlockDiffusionNoise(1, MASK, PAD, t_min=1.0, t_max=1.0), chunk=3)
    states = [sft.noise(sample, torch.Generator()) for sample in SAMPLES]
    loss = sft(model, None, collate([states[:1], states[1:]], PAD, shift=True)).loss
    plain = Qwen3ForCausalLM(Qwen3Config(**{**model.config.to_dict(), "model_type": "qwen3"})).eval()
    plain.load_state_dict(model.state_dict())
    expected = []
    for sample in SAMPLES:
        ids, prompt = torch.tensor(sample["prompt_ids"] + sample["response_ids"]), len(sample["prompt_ids"])
        labels = torch.where(torch.arange(len(ids)) < prompt, -100, ids)
        expected.append(plain(ids[None], labels=labels[None]).loss)
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    sum(expected).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=2e-5)

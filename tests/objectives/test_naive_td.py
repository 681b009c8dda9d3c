"""Cross-entropy at trajectory states: by hand, and whole batches with their gradients against a slow loop."""

import torch

from t3d.objectives.naive_td import NaiveTD, trajectory_loss
from t3d.states.base import collate
from tests.conftest import MASK, PAD, tiny_model
from tests.objectives.test_t3d import POST, SAMPLES, assert_same_gradients, mean
from tests.states.test_states import ORDINARY, noise
from tests.test_training_equals_decoding import plain_logits


def draw(objective, samples: list[dict] = SAMPLES) -> list:
    return [objective.noise(sample, torch.Generator().manual_seed(i)) for i, sample in enumerate(samples)]


def slow_log_probs(student, sample: dict, state, block_size: int) -> dict[int, list[torch.Tensor]]:
    """Block -> log p(x_0) of its tokens that are masked (or scrambled) and learnt, by a forward a block."""
    log_probs = plain_logits(student, state, block_size).log_softmax(-1)
    prompt = len(sample["prompt_ids"])
    x0 = sample["prompt_ids"] + sample["response_ids"]
    found: dict[int, list] = {}
    for p in range(prompt, min(len(x0), prompt + sample["length"] + POST)):
        shown = int(state.noisy[p - state.start])
        if shown == MASK or shown in ORDINARY:
            found.setdefault(p // block_size, []).append(log_probs[p - state.start, x0[p]])
    return found


def test_hand_computed():
    """Sequence 0: (2 + 4) / 2 = 3. Sequence 1: nothing. Sequence 2: 5. Every token pulls with 1 / its sequence's."""
    log_prob = torch.tensor([-2.0, -4.0, -5.0], requires_grad=True)
    loss = trajectory_loss(log_prob, torch.tensor([0, 0, 2]), 3)
    assert loss.tolist() == [3.0, 0.0, 5.0]
    loss.sum().backward()
    assert log_prob.grad.tolist() == [-0.5, -0.5, -1.0]


def test_equals_the_slow_loop():
    student = tiny_model()
    naive = NaiveTD(noise(4, random_ratio=0.2, mask_ratio_exponent=0.0, post_num=POST), chunk=5)
    states = draw(naive)
    loss, metrics = naive(student, None, collate([states[:1], states[1:3], states[3:]], PAD))
    blocks = [slow_log_probs(student, *pair, 4) for pair in zip(SAMPLES, states, strict=True)]
    slow = [-mean([token for block in found.values() for token in block]) for found in blocks]
    torch.testing.assert_close(loss, torch.stack(slow), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["cross_entropy"], loss.detach())
    assert_same_gradients(student, loss.sum(), sum(slow))

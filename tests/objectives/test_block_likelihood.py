"""Block likelihood: by hand, its limit, and whole batches with their gradients against a slow loop."""

import math

import pytest
import torch

from t3d.objectives.block_likelihood import BlockLikelihood, block_likelihood_loss
from t3d.objectives.naive_td import trajectory_loss
from t3d.states.base import PER_TARGET, collate
from tests.conftest import PAD, tiny_model
from tests.objectives.test_naive_td import draw, slow_log_probs
from tests.objectives.test_t3d import POST, SAMPLES, mean
from tests.states.test_states import noise


def test_hand_computed():
    """k = 1. Sequence 0: s = -1 and -3, (1 - e^-1 + 1 - e^-3) / 2. Sequence 1: one block that is certain, 0."""
    log_prob = torch.tensor([-0.5, -1.5, -3.0, 0.0], requires_grad=True)
    sequence, block = torch.tensor([0, 0, 0, 1]), torch.tensor([2, 2, 3, 3])
    loss = block_likelihood_loss(log_prob, sequence, block, 1.0, 2)
    assert loss.tolist() == [pytest.approx((2 - math.exp(-1) - math.exp(-3)) / 2), 0.0]
    loss.sum().backward()  # -exp(s_b) shared by the block's tokens, over the sequence's blocks
    by_hand = [-math.exp(-1) / 4, -math.exp(-1) / 4, -math.exp(-3) / 2, -1.0]
    assert log_prob.grad.tolist() == pytest.approx(by_hand)


def test_k_2_hand_computed():
    """(1 - e^{2 * -1}) / 2 for one block of s = -1."""
    zero = torch.zeros(2, dtype=torch.long)
    loss = block_likelihood_loss(torch.tensor([-0.5, -1.5]), zero, zero, 2.0, 1)
    assert loss.tolist() == [pytest.approx((1 - math.exp(-2)) / 2)]


def test_as_k_vanishes_it_is_cross_entropy():
    """With blocks of one size the mean over blocks is the mean over tokens."""
    log_prob = torch.tensor([-0.5, -1.5, -3.0, -9.0])
    sequence, block = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 1, 1])
    expected = trajectory_loss(log_prob, sequence, 1)
    torch.testing.assert_close(block_likelihood_loss(log_prob, sequence, block, 0.0, 1), expected)
    torch.testing.assert_close(block_likelihood_loss(log_prob, sequence, block, 1e-4, 1), expected, rtol=1e-3, atol=0)


def test_a_hopeless_block_stays_finite():
    log_prob = torch.tensor([-1e4], requires_grad=True)
    zero = torch.zeros(1, dtype=torch.long)
    loss = block_likelihood_loss(log_prob, zero, zero, 1.0, 1)
    loss.sum().backward()
    assert loss.tolist() == [1.0] and log_prob.grad.tolist() == [0.0]


@pytest.mark.parametrize("block_size", [4, 8])
@pytest.mark.parametrize("k", [0.0, 0.5, 1.0])
def test_equals_the_slow_loop(k, block_size):
    student = tiny_model()
    noised = noise(block_size, random_ratio=0.2, mask_ratio_exponent=0.0, post_num=POST)
    objective = BlockLikelihood(noised, k=k, chunk=5)
    states = draw(objective)
    loss, metrics = objective(student, None, collate([states[:1], states[1:3], states[3:]], PAD))
    slow, cross_entropy = [], []
    for sample, state in zip(SAMPLES, states, strict=True):
        blocks = slow_log_probs(student, sample, state, block_size).values()
        s = [mean(block) for block in blocks]
        slow.append(mean([(1 - torch.exp(k * x)) / k if k else -x for x in s]))
        cross_entropy.append(-mean([token for block in blocks for token in block]))
    torch.testing.assert_close(loss, torch.stack(slow), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["block_likelihood"], loss.detach())
    torch.testing.assert_close(metrics["cross_entropy"], torch.stack(cross_entropy).detach(), rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(loss.sum(), list(student.parameters()), retain_graph=True)
    expected = torch.autograd.grad(sum(slow), list(student.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3 * float(b.abs().max()) + 1e-9)
    assert any(g.any() for g in got)


def test_a_batch_with_nothing_to_learn_gives_a_zero_gradient():
    student, objective = tiny_model(), BlockLikelihood(noise(4))
    state = draw(objective)[0]
    for name in ("position", *PER_TARGET):
        setattr(state, name, vars(state)[name][:0])
    loss = objective(student, None, collate([[state]], PAD)).loss
    loss.sum().backward()
    assert loss.tolist() == [0.0] and not any(p.grad.any() for p in student.parameters())

"""Certainty forcing: by hand, and whole batches with their gradients against a slow loop over both passes."""

import math
from dataclasses import replace

import pytest
import torch

from t3d.objectives.dparallel import DParallel, complement
from t3d.objectives.likelihood import token_certainty, token_log_probs
from t3d.states.base import collate
from t3d.states.unordered import RandomMaskNoise
from tests.conftest import MASK, PAD, tiny_model
from tests.objectives.test_naive_td import draw
from tests.objectives.test_t3d import POST, assert_same_gradients, mean
from tests.states.test_states import trajectory
from tests.test_training_equals_decoding import plain_logits

WEIGHT, TEMPERATURE = 1.5, 0.5
SAMPLES = [trajectory(*lengths) for lengths in [(1, 3), (3, 9), (5, 2), (6, 17)]]


def objective(block_size: int = 4, **options) -> DParallel:
    return DParallel(RandomMaskNoise(block_size, MASK, post_num=POST), WEIGHT, TEMPERATURE, **options)


def knowing(samples: list[dict] = SAMPLES):
    """A model that guesses some tokens right: the samples' own answers are what it would say at some masks."""
    model, samples = tiny_model(), [dict(sample) for sample in samples]
    for sample in samples:
        ids = list(sample["response_ids"])
        state = objective().noise(sample, torch.Generator().manual_seed(0))
        guess = plain_logits(model, state, 4).argmax(-1).tolist()
        for i in range(0, len(ids), 2):
            ids[i] = guess[len(sample["prompt_ids"]) + i - state.start]
        sample["response_ids"] = ids
    return model, samples


def slow_pass(student, state, masked: list[bool], block_size: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(cross-entropy, entropy of those guessed right, their share) of one pass over one sequence, token by token."""
    noisy = state.noisy.clone()
    for p, hidden in zip(state.position.tolist(), masked, strict=True):
        noisy[p - state.start] = MASK if hidden else state.ids[p]
    logits = plain_logits(student, replace(state, noisy=noisy), block_size)
    losses, entropies = [], []
    for p, hidden in zip(state.position.tolist(), masked, strict=True):
        if not hidden:
            continue
        row = logits[p - state.start]
        losses.append(-row.log_softmax(-1)[state.ids[p]])
        if int(row.argmax()) == int(state.ids[p]):
            q = (row / TEMPERATURE).softmax(-1)
            entropies.append(-(q * q.log()).sum())
    zero = logits.new_zeros(())
    return mean(losses) if losses else zero, mean(entropies) if entropies else zero, len(entropies) / len(masked)


def test_certainty_hand_computed():
    """Logits (log 3, 0): p = (3/4, 1/4); at temperature .5 it is (9/10, 1/10), entropy .3251; the argmax is token 0."""
    hidden, weight = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]]), torch.eye(2)
    log_prob, entropy, right = token_certainty(hidden, weight, torch.tensor([0, 1]), 0.5)
    assert log_prob.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4)])
    assert entropy.tolist() == pytest.approx([0.9 * math.log(1 / 0.9) + 0.1 * math.log(10)] * 2)
    assert right.tolist() == [True, False]


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_certainty_by_chunks_equals_the_whole_table(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 8, generator=generator).requires_grad_()
    weight = torch.randn(20, 8, generator=generator).requires_grad_()
    targets, upstream = torch.randint(20, (7,), generator=generator), torch.randn(2, 7, generator=generator)
    log_prob, entropy, right = token_certainty(hidden, weight, targets, 0.7, chunk)
    logits = hidden @ weight.T
    expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(log_prob, token_log_probs(hidden, weight, targets.unsqueeze(-1))[:, 0])
    assert right.tolist() == (logits.argmax(-1) == targets).tolist()
    got = torch.autograd.grad((torch.stack([log_prob, entropy]) * upstream).sum(), [hidden, weight])
    whole = torch.stack([logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1))[:, 0], expected])
    for a, b in zip(got, torch.autograd.grad((whole * upstream).sum(), [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    empty = token_certainty(hidden[:0], weight, targets[:0], 0.7, chunk)
    assert [x.shape for x in empty] == [(0,)] * 3


@pytest.mark.parametrize("block_size", [4, 8])
def test_equals_the_slow_loop(block_size):
    student, samples = knowing()
    dparallel = objective(block_size, chunk=5)
    states = draw(dparallel, samples)
    loss, metrics = dparallel(student, None, collate([states[:1], states[1:3], states[3:]], PAD))
    slow, right = [], 0
    for state in states:
        masked = state.masked.tolist()
        parts = [slow_pass(student, state, part, block_size) for part in (masked, [not x for x in masked])]
        slow.append(sum(ce + WEIGHT * entropy for ce, entropy, _ in parts))
        right += sum(share for _, _, share in parts)
    assert right > 0.2, "nothing was guessed right: the entropy was not tried"
    torch.testing.assert_close(loss, torch.stack(slow), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        metrics["cross_entropy"] + WEIGHT * metrics["certainty_entropy"], loss.detach(), rtol=1e-5, atol=1e-6
    )
    assert_same_gradients(student, loss.sum(), sum(slow))


def test_the_entropy_pulls_at_right_guesses_alone():
    """At the masked positions of its pass whose guess is x_0, and nowhere else."""
    dparallel = objective()
    batch = collate([draw(dparallel)], PAD)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(*batch.input_ids.shape, 64, generator=generator)
    right = batch.loss_index[::2]  # every other guess is right
    hidden.flatten(0, 1)[right, batch.targets[::2]] += 5
    hidden.requires_grad_()
    dparallel._pass(lambda *_, head, **__: head(hidden, torch.eye(64)), batch)[1].sum().backward()
    pulled = hidden.grad.flatten(0, 1).any(-1).nonzero().flatten().tolist()
    assert pulled == batch.loss_index[::2][batch.masked[::2]].tolist()


def test_the_passes_are_complements_and_later_tokens_are_masked():
    noise = RandomMaskNoise(4, MASK, post_num=1)
    for sample in SAMPLES:
        for seed in range(20):
            state = noise(sample, torch.Generator().manual_seed(seed))
            prompt, batch = len(sample["prompt_ids"]), collate([[state]], PAD)
            other = complement(batch, MASK)
            end = prompt + min(len(sample["response_ids"]), sample["length"] + 1)
            assert state.position.tolist() == list(range(prompt, end)) and state.masked.any()
            for ids, masked in ((batch.input_ids, batch.masked), (other.input_ids, other.masked)):
                noisy = dict(enumerate(ids[0, state.clean_length :].tolist(), state.start))
                for p, hidden in zip(state.position.tolist(), masked.tolist(), strict=True):
                    assert noisy[p] == (MASK if hidden else state.ids[p])
                assert all(noisy[p] == MASK for p in noisy if p >= end)
                assert all(noisy[p] == state.ids[p] for p in noisy if p < prompt)
            assert (batch.masked ^ other.masked).all()


def test_the_share_of_masks():
    long = trajectory(4, 4000)
    state = RandomMaskNoise(4, MASK, mask_ratio=0.3)(long, torch.Generator().manual_seed(0))
    assert float(state.masked.float().mean()) == pytest.approx(0.3, abs=0.03)

"""Self-repair: the guesses in view, and whole batches with their gradients against a slow loop."""

from dataclasses import replace

import pytest
import torch

from t3d.objectives.self_repair import SelfRepair, with_guesses
from t3d.states.base import PER_TARGET, collate
from tests.conftest import MASK, PAD, tiny_model
from tests.objectives.test_naive_td import draw
from tests.objectives.test_t3d import POST, SAMPLES, assert_same_gradients, mean
from tests.states.test_states import noise
from tests.test_training_equals_decoding import plain_logits

FORBIDDEN = torch.tensor([MASK, 5])


def objective(ratio: float = 0.5) -> SelfRepair:
    return SelfRepair(noise(4, every_target=True, mask_ratio_exponent=0.0, post_num=POST), FORBIDDEN, ratio, chunk=5)


def repaired(student, state, ratio: float):
    """The state with the guesses of a plain forward per block in the places of some masks, and these places."""
    logits = plain_logits(student, state, 4).detach()
    logits[:, FORBIDDEN] = -torch.inf
    noisy, shown = state.noisy.clone(), []
    for position, masked, u in zip(state.position.tolist(), state.masked, state.u, strict=True):
        if masked and u < ratio:
            noisy[position - state.start] = logits[position - state.start].argmax()
            shown.append(position)
    return replace(state, noisy=noisy), shown


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_equals_the_slow_loop(ratio):
    student, repair = tiny_model(), objective(ratio)
    states = draw(repair, SAMPLES)
    loss, metrics = repair(student, None, collate([states[:1], states[1:3], states[3:]], PAD))
    slow, wrong_guesses = [], []
    for state in states:
        state, shown = repaired(student, state, ratio)
        log_probs = plain_logits(student, state, 4).log_softmax(-1)
        at = state.position - state.start
        slow.append(-mean([log_probs[i, x] for i, x in zip(at.tolist(), state.targets.tolist(), strict=True)]))
        truth = dict(zip(state.position.tolist(), state.targets.tolist(), strict=True))
        wrong = [float(state.noisy[p - state.start] != truth[p]) for p in shown]
        wrong_guesses.append(mean(wrong) if wrong else 0.0)
    torch.testing.assert_close(loss, torch.stack(slow), rtol=1e-4, atol=1e-5)
    assert metrics["wrong_guesses"].tolist() == pytest.approx(wrong_guesses, abs=1e-5)
    assert bool(metrics["wrong_guesses"].any()) == (ratio > 0)
    assert_same_gradients(student, loss.sum(), sum(slow))


def test_only_chosen_masks_show_a_guess():
    batch = collate([draw(objective(), SAMPLES)], PAD)
    shown = batch.masked & (batch.u < 0.5)
    changed = with_guesses(batch, torch.full_like(batch.targets, 9), shown)
    different = (changed.input_ids != batch.input_ids).flatten().nonzero().flatten()
    assert set(different.tolist()) == set(batch.place[shown].tolist()) and (changed.targets == batch.targets).all()


def test_a_batch_with_nothing_to_learn_gives_a_zero_gradient():
    student, repair = tiny_model(), objective()
    state = draw(repair, SAMPLES)[0]
    for name in ("position", *PER_TARGET):
        setattr(state, name, vars(state)[name][:0])
    loss = repair(student, None, collate([[state]], PAD)).loss
    loss.sum().backward()
    assert loss.tolist() == [0.0] and not any(p.grad.any() for p in student.parameters())

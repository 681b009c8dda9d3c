"""Objectives with a frozen teacher's distributions as targets: by hand, and whole batches against a slow loop."""

import math
from dataclasses import replace

import pytest
import torch

from t3d.objectives.consistency import Consistency, ConsistencySettings
from t3d.objectives.naive_td import NaiveTD
from t3d.objectives.opdlm import OPDLM, OPDLMSettings
from t3d.objectives.trajectory_aware import TrajectoryAware, TrajectoryAwareSettings
from t3d.states.base import collate
from t3d.states.pairs import FewerMasks, OneStepPerBlock, StepsAhead
from tests.conftest import MASK, PAD, tiny_model
from tests.objectives.test_naive_td import draw
from tests.objectives.test_t3d import POST, SAMPLES, assert_same_gradients, mean
from tests.states.test_states import noise, trajectory
from tests.test_training_equals_decoding import plain_logits

MANY = {"mask_ratio_exponent": 0.0, "random_ratio": 0.2, "post_num": POST}


def kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p || q) of two rows of logits, from the whole softmax."""
    p, q = ((row / temperature).log_softmax(-1) for row in (teacher, student))
    return (p.exp() * (p - q)).sum()


def batch_of(states: list, **layout):
    return collate([states[:1], states[1:3], states[3:]], PAD, **layout)


def agree(objective, states: list, slow: list[torch.Tensor], **layout) -> dict[str, torch.Tensor]:
    """Loss and student's gradients against the slow loop's; the teacher gets none."""
    student, teacher = tiny_model(0), tiny_model(1)
    loss, metrics = objective(student, teacher, batch_of(states, **layout))
    torch.testing.assert_close(loss, torch.stack([one(student, teacher) for one in slow]), rtol=1e-4, atol=1e-5)
    assert loss.std() > 0
    assert_same_gradients(student, loss.sum(), sum(one(student, teacher) for one in slow))
    loss, _ = objective(student, teacher, batch_of(states, **layout))
    loss.sum().backward()
    assert all(p.grad is None for p in teacher.parameters()) and any(p.grad.any() for p in student.parameters())
    return metrics


def consistency(size: int = 4, **settings) -> Consistency:
    return Consistency(FewerMasks(noise(size, **MANY)), ConsistencySettings(**settings), chunk=5)


@pytest.mark.parametrize("size", [4, 8])
def test_consistency_equals_the_slow_loop(size):
    objective = consistency(size, consistency_temperature=1.7)
    objective.progress = 0.4
    states = draw(objective)

    def slow(state):
        def loss(student, teacher):
            mine, theirs = plain_logits(student, state, size), plain_logits(teacher, state.teacher, size).detach()
            at = [p - state.start for p in state.position.tolist()]
            both = [a for a, hidden in zip(at, state.teacher.masked.tolist(), strict=True) if hidden]
            soft = 1.7**2 * mean([kl(theirs[a], mine[a], 1.7) for a in both])
            hard = mean([-mine[a].log_softmax(-1)[x] for a, x in zip(at, state.targets.tolist(), strict=True)])
            weight = 0.5 + 0.4 * 0.5 * (1 + math.cos(math.pi * (0.4 - 0.1) / 0.9))
            return weight * soft + (1 - weight) * hard

        return loss

    metrics = agree(objective, states, [slow(state) for state in states])
    assert metrics["kl_weight"].tolist() == pytest.approx([0.8] * len(states), abs=0.01)
    assert any(len(state.position) > state.teacher.masked.sum() for state in states)


def test_the_weight_of_consistency_falls_after_a_tenth_of_the_training():
    objective = consistency(consistency_weight=0.9, consistency_weight_end=0.5)
    found = []
    for objective.progress in (0.0, 0.1, 0.55, 1.0):
        found.append(objective.weight)
    assert found == pytest.approx([0.9, 0.9, 0.7, 0.5])


def trajectory_aware(size: int = 4, k: int = 2, **settings) -> TrajectoryAware:
    states = noise(size, **MANY)
    return TrajectoryAware(StepsAhead(states, k), TrajectoryAwareSettings(near_steps=k, **settings), chunk=5)


@pytest.mark.parametrize("size", [4, 8])
def test_trajectory_aware_equals_the_slow_loop(size):
    objective = trajectory_aware(size, 1, distant_weight=0.6)
    states = draw(objective)

    def slow(state):
        def loss(student, teacher):
            mine, theirs = plain_logits(student, state, size), plain_logits(teacher, state.teacher, size).detach()
            near, distant = [torch.zeros(())], [torch.zeros(())]
            seen = zip(state.position.tolist(), state.targets.tolist(), state.teacher.masked.tolist(), strict=True)
            for p, x, hidden in seen:
                a = p - state.start
                if hidden:
                    distant.append(kl(theirs[a], mine[a]))
                else:
                    near.append(-mine[a].log_softmax(-1)[x])
            return sum(near) / max(1, len(near) - 1) + 0.6 * sum(distant) / max(1, len(distant) - 1)

        return loss

    metrics = agree(objective, states, [slow(state) for state in states])
    assert metrics["kl"].max() > 0 and metrics["cross_entropy"].min() > 0


def test_when_all_tokens_are_near_trajectory_aware_is_naive_td():
    objective, student = trajectory_aware(k=99), tiny_model()
    states = draw(objective)
    naive = NaiveTD(objective.noise.noise)(student, None, batch_of(states)).loss
    torch.testing.assert_close(objective(student, tiny_model(1), batch_of(states)).loss, naive)


def opdlm(size: int = 4, chunk: int = 5, reading: str = "causal", **settings) -> OPDLM:
    return OPDLM(
        OneStepPerBlock(size, MASK, reading=reading), OPDLMSettings(teacher_reading=reading, **settings), chunk
    )


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("size", [4, 8])
def test_opdlm_equals_the_slow_loop(size, shift):
    """The teacher predicts token i from tokens 0..i-1 in a forward of its own."""
    objective = opdlm(size)
    states = draw(objective)

    def slow(sample, state):
        def loss(student, teacher):
            x0 = torch.tensor(sample["prompt_ids"] + sample["response_ids"])
            found = []
            for p in state.position.tolist():
                teacher.config.block_size = 1
                theirs = teacher(x0[None, :p]).logits[0, -1].detach()
                mine = student_row(student, state, p, size, shift)
                found.append(kl(theirs, mine))
            return mean(found)

        return loss

    agree(objective, states, [slow(*pair) for pair in zip(SAMPLES, states, strict=True)], shift=shift)


def student_row(student, state, p: int, size: int, shift: bool) -> torch.Tensor:
    """The student's logits for the target at p: a forward over [clean earlier blocks | x_t of the block]."""
    student.config.block_size, start = size, p // size * size
    block = state.noisy[start - state.start : start - state.start + size]
    logits = student(torch.cat([state.ids[:start], block])[None]).logits[0]
    return logits[p - shift]


@pytest.mark.parametrize("shift, teacher_shift", [(False, False), (True, True), (False, True)])
def test_opdlm_with_a_block_diffusion_teacher_equals_the_slow_loop(shift, teacher_shift):
    """The teacher has the tokens of the block that were decoded before, and the clean earlier blocks."""
    objective = opdlm(reading="block", reverse_kl_weight=0.25)
    states = draw(objective)

    def slow(sample, state):
        prompt = len(sample["prompt_ids"])
        x0 = sample["prompt_ids"] + sample["response_ids"]
        step = dict(enumerate(sample["unmask_step"], prompt))

        def loss(student, teacher):
            found = []
            for p in state.position.tolist():
                start = p // 4 * 4
                block = [x0[q] if q < prompt or (step[q], q) < (step[p], p) else MASK for q in range(start, start + 4)]
                teacher.config.block_size = 4
                theirs = teacher(torch.tensor([x0[:start] + block])).logits[0, p - teacher_shift].detach()
                row = student_row(student, state, p, 4, shift)
                found.append(0.75 * kl(theirs, row) + 0.25 * kl(row, theirs))
            return mean(found)

        return loss

    slow_losses = [slow(*pair) for pair in zip(SAMPLES, states, strict=True)]
    agree(objective, states, slow_losses, shift=shift, teacher_shift=teacher_shift)


class Table(torch.nn.Module):
    """A model whose logits at a place depend on the token at that place alone: a table (vocab, vocab)."""

    def __init__(self, logits: list[list[float]]):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, ids, mask, *, head, **_):
        return head(self.table[ids], torch.eye(self.table.shape[1]))


def test_opdlm_hand_computed():
    """Tokens a, b and the mask. The teacher writes a or b after a with 3/4, 1/4 and after b with 1/2 each; the student
    has 1/2 each at a mask. Of the prompt a and the answer a b a, all masked, two tokens follow an a, one a b."""
    a, b, mask, never = 0, 1, 2, -100.0
    teacher = Table([[math.log(3), 0.0, never], [0.0, 0.0, never], [0.0, 0.0, 0.0]])
    student = Table([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, never]])
    sample = {"prompt_ids": [a], "response_ids": [a, b, a], "unmask_step": [1, 1, 1], "length": 3}
    objective = OPDLM(OneStepPerBlock(4, mask), OPDLMSettings())
    state = objective.noise(sample, torch.Generator().manual_seed(0))
    loss, metrics = objective(student, teacher, collate([[state]], pad_id=mask))
    after_a = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss.tolist() == pytest.approx([2 / 3 * after_a]) and metrics["divergence"].tolist() == loss.tolist()
    loss.sum().backward()
    assert teacher.table.grad is None
    pull = (2 * (0.5 - 0.75) + 0.0) / 3  # q - p at the mask, a mean over three tokens
    assert student.table.grad[mask].tolist() == pytest.approx([pull, -pull, 0.0], abs=1e-6)


@pytest.mark.parametrize("measure", [{}, {"reverse_kl_weight": 0.5}, {"jsd_beta": 0.3}], ids=["kl", "both", "jsd"])
def test_the_autoregressive_model_has_nothing_to_learn_from_itself(measure):
    """Block size 1 with a logit shift: the student is its teacher."""
    model, objective = tiny_model(), opdlm(1, **measure)
    states = draw(objective, [trajectory(*lengths, size=1) for lengths in [(1, 3), (3, 9), (5, 2), (6, 17)]])
    assert all(len(state.position) for state in states)
    loss = objective(model, model, batch_of(states, shift=True)).loss
    assert loss.abs().max() < 1e-5
    loss.sum().backward()
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-5
    assert objective(model, model, batch_of(states)).loss.min() > 0.01  # without the shift it is another model


def test_the_teachers_likeliest_tokens():
    """With k of the whole vocabulary nothing changes; with few the loss is another."""
    student, teacher = tiny_model(0), tiny_model(1)
    batch = batch_of(draw(opdlm()))
    whole, same, few = (
        opdlm(teacher_top_k=k)(student, teacher, batch).loss for k in (None, student.config.vocab_size, 3)
    )
    torch.testing.assert_close(same, whole)
    assert (few - whole).abs().min() > 1e-3


@pytest.mark.parametrize(
    "objective",
    [consistency(), trajectory_aware(), opdlm(), opdlm(reading="block")],
    ids=["fewer", "near", "ar", "block"],
)
def test_a_batch_with_nothing_to_learn_gives_a_zero_gradient(objective):
    student, teacher, sample = tiny_model(), tiny_model(1), trajectory(5, 3) | {"length": 0}
    make = getattr(objective.noise, "noise", None)
    if make is not None:  # no target at all, where otherwise post_num would have some
        objective = replace(objective, noise=replace(objective.noise, noise=replace(make, post_num=0)))
    state = objective.noise(sample, torch.Generator().manual_seed(0))
    loss = objective(student, teacher, collate([[state]], PAD)).loss
    loss.sum().backward()
    assert len(state.position) == 0 and loss.tolist() == [0.0]
    assert not any(p.grad.any() for p in student.parameters())

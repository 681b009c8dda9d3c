"""What the teacher sees beside what the student sees, against a replay of the trajectory."""

from collections import Counter

import pytest
import torch

from t3d.blocks.attention import Labels, dense_mask
from t3d.states.base import collate
from t3d.states.pairs import FewerMasks, OneStepPerBlock, StepsAhead
from tests.conftest import MASK, PAD, STOP
from tests.states.test_states import LENGTHS, hidden_by_block, noise, replay, trajectory


def pairs(make, lengths=LENGTHS, seeds: int = 6, **options):
    """(sample, state) over trajectories, seeds and grids' blocks."""
    for prompt, length in lengths:
        sample = trajectory(prompt, length, **options)
        for seed in range(seeds):
            yield sample, make(sample, torch.Generator().manual_seed(seed))


def sees(state, sample, size: int = 4) -> dict[int, set[int]]:
    """Block -> hidden positions that the loss looks at."""
    looked_at = set(state.position.tolist())
    return {block: hidden & looked_at for block, hidden in hidden_by_block(state, sample, size).items()}


def shown_tokens_are_the_answers(state, sample) -> None:
    x0 = dict(enumerate(sample["prompt_ids"] + sample["response_ids"]))
    for place, token in enumerate(state.noisy.tolist(), state.start):
        assert token in (MASK, x0.get(place, MASK))


@pytest.mark.parametrize("one_by_one", [True, False], ids=["full-steps", "several-a-step"])
@pytest.mark.parametrize("size", [4, 8])
def test_fewer_masks_are_a_later_moment_of_the_same_trajectory(size, one_by_one):
    make = FewerMasks(noise(size, mask_ratio_exponent=0.0, post_num=0), 0.3, 0.7)
    fewer = 0
    for sample, state in pairs(make, one_by_one=one_by_one):
        moments = replay(sample, size)
        end = len(sample["prompt_ids"]) + sample["length"]
        later = sees(state.teacher, sample, size)
        shown_tokens_are_the_answers(state.teacher, sample)
        for block, hidden in sees(state, sample, size).items():
            assert later[block] <= hidden and bool(later[block]) == bool(hidden)
            assert later[block] in [{p for p in moment if p < end} for moment in moments[block]] or not hidden
            fewer += len(hidden) - len(later[block])
        assert state.teacher.masked.tolist() == [p in later[p // size] for p in state.position.tolist()]
    assert fewer > 20


def test_the_teachers_share_of_the_masks():
    """Of 8 masks at full steps between 30 and 70 %: 2 to 6, each of these often."""
    make = FewerMasks(noise(8, mask_ratios=(1.0,)), 0.3, 0.7)
    sample, found = trajectory(8, 8, size=8, one_by_one=True), Counter()
    for seed in range(200):
        state = make(sample, torch.Generator().manual_seed(seed))
        found[int(state.teacher.masked.sum())] += 1
    assert set(found) == {2, 3, 4, 5, 6} and min(found[3], found[4], found[5]) > 30


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_steps_ahead(steps):
    make, near = StepsAhead(noise(4, mask_ratio_exponent=0.0, post_num=0), steps), 0
    for sample, state in pairs(make):
        moments, end = replay(sample, 4), len(sample["prompt_ids"]) + sample["length"]
        later = sees(state.teacher, sample)
        shown_tokens_are_the_answers(state.teacher, sample)
        for block, hidden in sees(state, sample).items():
            if not hidden:
                continue
            learnt = [{p for p in moment if p < end} for moment in moments[block]]
            learnt = [moment for i, moment in enumerate(learnt) if moment and moment not in learnt[:i]]
            at = learnt.index(hidden)
            assert later[block] == (learnt[at + steps] if at + steps < len(learnt) else set())
            near += len(hidden) - len(later[block])
    assert near > 0


def test_a_state_without_targets_has_a_teachers_state_without_targets():
    sample = trajectory(4, 4) | {"length": 0}
    for make in (FewerMasks(noise(4, post_num=0)), StepsAhead(noise(4, post_num=0))):
        state = make(sample, torch.Generator().manual_seed(0))
        assert len(state.position) == len(state.teacher.position) == 0


def test_one_step_of_each_block_uniformly():
    make, found = OneStepPerBlock(4, MASK), Counter()
    sample = trajectory(4, 16, one_by_one=True)
    for seed in range(300):
        state = make(sample, torch.Generator().manual_seed(seed))
        shown_tokens_are_the_answers(state, sample)
        moments = replay(sample, 4)
        for block, hidden in hidden_by_block(state, sample, 4).items():
            found[block, moments[block].index(hidden)] += 1
        assert state.position.tolist() == sorted(set().union(*hidden_by_block(state, sample, 4).values()))
    assert set(found) == {(block, step) for block in (1, 2, 3, 4) for step in range(4)}
    assert all(50 < count < 100 for count in found.values())  # 75 each


@pytest.mark.parametrize("learn_end", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_the_end_of_the_turn(ends, learn_end):
    sample = trajectory(5, 9)
    if ends:
        sample["response_ids"][8] = STOP
    make = OneStepPerBlock(4, MASK, (STOP,), learn_end)
    found = set()
    for seed in range(30):
        found |= set(make(sample, torch.Generator().manual_seed(seed)).position.tolist())
    assert found == set(range(5, 14 if learn_end or not ends else 13))


@pytest.mark.parametrize("size", [4, 8])
def test_the_causal_reading(size):
    """Each target at the token before it, in a row where every token sees those before it."""
    states, samples = [], []
    for sample, state in pairs(OneStepPerBlock(size, MASK), seeds=2):
        states.append(state)
        samples.append(sample)
    batch = collate([states[:3], states[3:4], states[4:]], PAD)
    teacher, at = batch.teacher, 0
    assert torch.equal(teacher.targets, batch.targets) and torch.equal(teacher.sequence, batch.sequence)
    for sample, state in zip(samples, states, strict=True):
        x0 = sample["prompt_ids"] + sample["response_ids"]
        index = teacher.loss_index[at : at + len(state.position)]
        at += len(state.position)
        assert teacher.position_ids.flatten()[index].tolist() == [p - 1 for p in state.position.tolist()]
        first = int(index[0]) - (int(state.position[0]) - 1)
        end = int(state.position[-1])
        assert teacher.input_ids.flatten()[first : first + end].tolist() == x0[:end]
    length = teacher.input_ids.shape[1]
    segment = torch.full(teacher.input_ids.shape, -1)
    for row, states_of_row in enumerate([states[:3], states[3:4], states[4:]]):
        start = 0
        for number, state in enumerate(states_of_row):
            segment[row, start : start + len(state.teacher)] = number
            start += len(state.teacher)
    position = torch.arange(length)
    causal = (segment.unsqueeze(-1) == segment.unsqueeze(-2)) & (position.unsqueeze(-1) >= position)
    real = segment >= 0
    assert torch.equal(teacher.attention_mask[:, 0][real], causal[real])


def test_one_token_at_a_time():
    """In the teacher's state of a target, its block shows the tokens that were decoded before it, and no other."""
    make = OneStepPerBlock(4, MASK, reading="block")
    for sample, state in pairs(make):
        prompt, read = len(sample["prompt_ids"]), state.teacher
        x0 = sample["prompt_ids"] + sample["response_ids"]
        step = dict(enumerate(sample["unmask_step"], prompt))
        copies = read.noisy.view(read.copies, -1)
        assert read.position.tolist() == state.position.tolist()
        for p, copy in zip(read.position.tolist(), read.copy.tolist(), strict=True):
            for q in range(p // 4 * 4, p // 4 * 4 + 4):
                before = q < prompt or (step[q], q) < (step[p], p)
                assert int(copies[copy, q - read.start]) == (x0[q] if before else MASK)


def test_several_copies_and_readings_go_through_the_layout():
    """Loss places of the teacher's batch hold the masks of the targets, copy by copy."""
    states = [state for _, state in pairs(OneStepPerBlock(4, MASK, reading="block"), seeds=1)]
    batch = collate([states[:3], states[3:]], PAD)
    assert (batch.teacher.input_ids.flatten()[batch.teacher.loss_index] == MASK).all()
    assert (batch.input_ids.flatten()[batch.loss_index] == MASK).all()
    assert torch.equal(batch.teacher.targets, batch.targets)


def test_without_a_pair_there_is_no_teachers_batch():
    sample = trajectory(4, 8)
    assert collate([[noise(4)(sample, torch.Generator().manual_seed(0))]], PAD).teacher is None
    labels = Labels(torch.zeros(1, 3), torch.arange(3)[None], torch.zeros(1, 3, dtype=torch.bool))
    assert torch.equal(dense_mask(labels)[0, 0], torch.ones(3, 3).tril().bool())  # block size 1 is causal

"""Training states against the trajectory replayed one step at a time, and their layout against separate sequences."""

import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from t3d.blocks.attention import Labels, dense_mask
from t3d.states.base import State, collate, generator_for, response_grid
from t3d.states.trajectory import TrajectoryNoise, decode_order, masked_count
from t3d.states.unordered import BlockDiffusionNoise
from tests.conftest import MASK, PAD

ORDINARY = torch.arange(30, 60)  # the trajectories below use ids under 30, so that a random token is told from x_0
LENGTHS = [(1, 3), (2, 8), (3, 9), (4, 5), (5, 1), (8, 12), (11, 6), (13, 10)]


def trajectory(prompt: int, length: int, *, size: int = 4, seed: int = 0, one_by_one: bool = False) -> dict:
    """A random rollout on the grid of ``size``: in every block some order, some tokens in the same step."""
    rng = random.Random(f"{seed}/{prompt}/{length}/{size}")
    response = length + -(prompt + length) % size
    steps, last, at = [], 0, 0
    while at < response:
        n = min(size - (prompt + at) % size, response - at)
        of_block = list(range(1, n + 1))
        if not one_by_one:
            used = rng.randint(1, n)
            of_block = [*range(1, used + 1), *(rng.randint(1, used) for _ in range(n - used))]
        rng.shuffle(of_block)
        steps += [last + step for step in of_block]
        last, at = max(steps), at + n
    return {
        "id": f"set/{prompt}/{length}",
        "prompt_ids": [rng.randrange(30) for _ in range(prompt)],
        "response_ids": [rng.randrange(30) for _ in range(response)],
        "unmask_step": steps,
        "length": length,
    }


def noise(block_size: int = 4, **options) -> TrajectoryNoise:
    return TrajectoryNoise(block_size, MASK, ORDINARY, **{"random_ratio": 0.0, **options})


def draw(noise, sample, seed: int = 0) -> State:
    return noise(sample, torch.Generator().manual_seed(seed))


def hidden_by_block(state: State, sample: dict, block_size: int) -> dict[int, set[int]]:
    """Block -> positions of response tokens that x_t hides."""
    prompt, total = len(sample["prompt_ids"]), len(sample["prompt_ids"]) + len(sample["response_ids"])
    found = {block: set() for block in range(prompt // block_size, (total - 1) // block_size + 1)}
    for place, token in enumerate(state.noisy.tolist()):
        if token == MASK and state.start + place < total:
            found[(state.start + place) // block_size].add(state.start + place)
    return found


def replay(sample: dict, block_size: int) -> dict[int, list[set[int]]]:
    """Block -> what is still masked before each of its steps, as the steps unmask one after another."""
    prompt = len(sample["prompt_ids"])
    masked = {prompt + i for i in range(len(sample["response_ids"]))}
    states = {}
    for step in range(1, max(sample["unmask_step"]) + 1):
        now = {prompt + i for i, when in enumerate(sample["unmask_step"]) if when == step}
        for block in {position // block_size for position in now}:
            states.setdefault(block, []).append({p for p in masked if p // block_size == block})
        masked -= now
    assert not masked
    return states


# ---------------------------------------------------------------------------------------------------------------------
# The decode order


def random_steps(rows: int, width: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(1, width + 1, (rows, width), generator=generator)
    present = torch.rand(rows, width, generator=generator) < 0.8
    present[:, 0] |= ~present.any(-1)
    return step, present


@pytest.mark.parametrize("width", [1, 4, 7])
def test_decode_order_equals_a_sort_of_each_block(width):
    step, present = random_steps(200, width)
    for steps, here, got in zip(step.tolist(), present.tolist(), decode_order(step, present).tolist(), strict=True):
        order = sorted((i for i in range(width) if here[i]), key=lambda i: (steps[i], i))
        assert got == [order.index(i) + 1 if here[i] else 0 for i in range(width)]


@pytest.mark.parametrize("ratio", [1.0, 0.75, 0.5, 0.25, 0.1])
def test_masked_count_is_the_boundary_nearest_to_the_ratio(ratio):
    step, present = random_steps(200, 6)
    share = Fraction(str(ratio))
    got = masked_count(step, present, ratio).tolist()
    for steps, here, count in zip(step.tolist(), present.tolist(), got, strict=True):
        steps = [s for s, is_here in zip(steps, here, strict=True) if is_here]
        boundaries = {sum(other >= s for other in steps) for s in steps}
        assert count == min(boundaries, key=lambda n: (abs(n - share * len(steps)), -n)) >= 1


# ---------------------------------------------------------------------------------------------------------------------
# States of a trajectory


@pytest.mark.parametrize("block_size", [4, 8])
def test_states_are_the_trajectorys_own(block_size):
    """Every block of every state is one the replay passes through; all of them come up; they nest."""
    for prompt, length in LENGTHS:
        sample = trajectory(prompt, length)
        real, seen = replay(sample, block_size), {}
        for ratio in (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125):
            state = draw(noise(block_size, mask_ratios=(ratio,)), sample)
            for block, hidden in hidden_by_block(state, sample, block_size).items():
                assert hidden and hidden in real[block], (prompt, length, ratio)
                assert not seen.get(block) or hidden <= seen[block][-1]
                seen.setdefault(block, []).append(hidden)
        for block, states in seen.items():
            assert states[0] == real[block][0]  # all masked
            assert states[-1] == real[block][-1]  # the last step


def test_applied_one_after_another_the_states_rebuild_x0():
    """One token a step and the four quarters: each state shows one more token of a block, in the teacher's order."""
    for prompt, length in LENGTHS:
        sample = trajectory(prompt, length, one_by_one=True)
        x0 = sample["prompt_ids"] + sample["response_ids"]
        canvas, shown = {}, []
        for ratio in (1.0, 0.75, 0.5, 0.25):
            state = draw(noise(mask_ratios=(ratio,)), sample)
            assert state.ids.tolist() == x0
            visible = {state.start + i: t for i, t in enumerate(state.noisy.tolist()) if t != MASK}
            assert visible.items() >= canvas.items()  # once shown, a token stays
            shown.append(len(visible) - len(canvas))
            canvas = visible
        blocks = -(-len(x0) // 4) - prompt // 4
        partial = prompt % 4  # prompt tokens in the first block are visible from the start
        assert shown[0] == partial and sum(shown) == partial + sum(len(b) - 1 for b in replay(sample, 4).values())
        rest = {p: x0[p] for block in replay(sample, 4).values() for p in block[-1]}
        assert len(rest) == blocks
        assert canvas | rest == dict(enumerate(x0[state.start :], state.start))


def test_what_was_decoded_first_is_visible_first():
    for seed in range(20):
        sample = trajectory(3, 9, seed=seed)
        state = draw(noise(mask_ratios=(0.5,)), sample)
        prompt = len(sample["prompt_ids"])
        for block, hidden in hidden_by_block(state, sample, 4).items():
            response = [p for p in range(block * 4, block * 4 + 4) if p >= prompt]
            step = {p: sample["unmask_step"][p - prompt] for p in response}
            shown = [step[p] for p in response if p not in hidden]
            assert max(shown, default=0) < min(step[p] for p in hidden)


def test_reversed_trace_hides_what_was_decoded_first():
    for seed in range(20):
        sample = trajectory(3, 9, seed=seed)
        state = draw(noise(mask_ratios=(0.5,), reversed_trace=True), sample)
        prompt = len(sample["prompt_ids"])
        for block, hidden in hidden_by_block(state, sample, 4).items():
            response = [p for p in range(block * 4, block * 4 + 4) if p >= prompt]
            step = {p: sample["unmask_step"][p - prompt] for p in response}
            shown = [step[p] for p in response if p not in hidden]
            assert hidden and min(shown, default=10**9) > max(step[p] for p in hidden)


def test_random_trace_masks_the_same_number_anywhere():
    sample, where = trajectory(4, 4, one_by_one=True), Counter()
    for seed in range(200):
        state = draw(noise(mask_ratios=(0.5,), random_trace=True), sample, seed)
        (hidden,) = hidden_by_block(state, sample, 4).values()
        assert len(hidden) == 2
        where.update([frozenset(hidden)])
    assert len(where) == 6 and min(where.values()) > 15


def test_targets_are_the_masked_positions_with_their_ranks():
    for prompt, length in LENGTHS:
        sample = trajectory(prompt, length)
        state = draw(noise(mask_ratios=(0.75,), post_num=100), sample)
        hidden = sorted(p for positions in hidden_by_block(state, sample, 4).values() for p in positions)
        assert state.position.tolist() == hidden and state.masked.all()
        step = dict(enumerate(sample["unmask_step"], prompt))
        for position, rank in zip(hidden, state.rank.tolist(), strict=True):
            rivals = sorted((when, p) for p, when in step.items() if p // 4 == position // 4)
            assert rank == rivals.index((step[position], position)) + 1
        assert len(state.u) == len(state.weight) == len(hidden) and (state.u >= 0).all() and (state.u < 1).all()


def test_every_target_adds_what_is_visible():
    sample = trajectory(5, 9)
    plain = draw(noise(mask_ratios=(0.5,), post_num=0), sample)
    state = draw(noise(mask_ratios=(0.5,), post_num=0, every_target=True), sample)
    assert torch.equal(state.noisy, plain.noisy)
    assert state.position.tolist() == list(range(5, 14))
    assert state.position[state.masked].tolist() == plain.position.tolist()
    assert (state.rank > 0).all()


@pytest.mark.parametrize("post_num, last", [(0, 12), (1, 13), (2, 14), (9, 15)])
def test_targets_end_at_the_answers_end_plus_post_num(post_num, last):
    sample = trajectory(6, 7)
    assert len(sample["response_ids"]) == 10  # the block ends at position 15
    state = draw(noise(mask_ratios=(1.0,), post_num=post_num), sample)
    assert state.position.tolist() == list(range(6, last + 1))
    assert (state.noisy[2:] == MASK).all()  # what is no target is hidden all the same: the end must not show


def test_a_larger_training_block_stays_masked_beyond_the_response():
    sample = trajectory(6, 10)  # ends at 16; the training block [16, 24) does not exist, [8, 16) is full
    assert len(draw(noise(8), sample).ids) == 16
    sample = trajectory(6, 12)  # ends at 20, in the middle of [16, 24)
    for ratio in (1.0, 0.25):
        state = draw(noise(8, mask_ratios=(ratio,), post_num=9), sample)
        assert state.start == 0 and len(state.ids) == len(state.noisy) == 24
        assert (state.noisy[20:] == MASK).all() and state.position.max() < 20
        assert state.clean_length == 16  # no clean copy of the last block, so the masks above are never context
    assert state.rank[(state.position >= 8) & (state.position < 16)].max() == 8


def test_random_tokens_replace_masks_and_still_count():
    sample = trajectory(5, 51)
    masks = replaced = 0
    values = Counter()
    for seed in range(60):
        clean = draw(noise(mask_ratios=(0.75,)), sample, seed)
        state = draw(noise(mask_ratios=(0.75,), random_ratio=0.1), sample, seed)
        assert torch.equal(clean.position, state.position)  # the same positions are learnt
        changed = state.noisy != clean.noisy
        assert (clean.noisy[changed] == MASK).all()
        values.update(state.noisy[changed].tolist())
        masks, replaced = masks + int((clean.noisy == MASK).sum()), replaced + int(changed.sum())
        assert state.masked.all() and set((state.start + changed.nonzero().flatten()).tolist()) <= set(
            state.position.tolist()
        )
    assert abs(replaced / masks - 0.1) < 0.02  # 2,400 positions: three standard errors
    assert set(values) <= set(ORDINARY.tolist()) and len(values) == len(ORDINARY)


@pytest.mark.parametrize("exponent", [1.0, 8.0])
def test_mask_ratios_are_drawn_with_ratio_to_the_exponent(exponent):
    ratios, n = (1.0, 0.75, 0.5, 0.25), 1500
    sample, drawn = trajectory(4, 4, one_by_one=True), Counter()
    for seed in range(n):
        state = draw(noise(mask_ratios=ratios, mask_ratio_exponent=exponent), sample, seed)
        drawn[len(state.position) / 4] += 1
    total = sum(ratio**exponent for ratio in ratios)
    for ratio in ratios:
        assert abs(drawn[ratio] / n - ratio**exponent / total) < 0.04


def test_response_grid_counts_blocks_from_the_prompts_end():
    grid = response_grid(5, 11, 4)
    assert grid.block.tolist() == [0] + [1] * 4 + [2] * 4 + [3] * 4
    assert grid.start == 5 and grid.rows.tolist() == [[5, 6, 7, 8], [9, 10, -1, -1]]
    sample = trajectory(5, 11)
    state = draw(noise(from_response=True, mask_ratios=(0.5,), post_num=9), sample)
    assert state.block.tolist() == [0] + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert state.clean_length == 13 and state.start == 5
    step = dict(enumerate(sample["unmask_step"], 5))
    for position, rank in zip(state.position.tolist(), state.rank.tolist(), strict=True):
        rivals = sorted((when, p) for p, when in step.items() if (p - 5) // 4 == (position - 5) // 4)
        assert rank == rivals.index((step[position], position)) + 1


@pytest.mark.parametrize("prompt", [3, 4, 5, 9])
def test_response_grid_gives_the_releases_attention(prompt):
    """Its mask row by row: of the prompt, blocks from its end backwards; of the answer, blocks from there on."""
    length, size = prompt + 8, 4
    end = [prompt - (prompt - 1 - p) // size * size for p in range(prompt)]
    end += [p + size - (p - prompt) % size for p in range(prompt, length)]
    block = response_grid(prompt, length, size).block
    clean = dense_mask(Labels(torch.zeros(1, length), block[None], torch.zeros(1, length, dtype=torch.bool)))
    assert clean[0, 0].sum(-1).tolist() == end and torch.equal(clean, clean.sort(-1, descending=True).values)


def same(a: State, b: State) -> bool:
    tensors = {name: x for name, x in vars(a).items() if name not in ("sample_id", "teacher")}
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(vars(b)[name])) for name, x in tensors.items())


def test_states_are_a_pure_function_of_seed_epoch_and_id():
    sample, make = trajectory(3, 40), noise(random_ratio=0.3, mask_ratio_exponent=0.0)
    first = make(sample, generator_for(1, 0, sample["id"]))
    torch.rand(7)  # nothing else that is drawn matters
    assert same(first, make(sample, generator_for(1, 0, sample["id"])))
    for other in (generator_for(2, 0, sample["id"]), generator_for(1, 1, sample["id"]), generator_for(1, 0, "x/0/0")):
        assert not same(first, make(sample, other))


# ---------------------------------------------------------------------------------------------------------------------
# States of the NELBO


def diffusion(**options) -> BlockDiffusionNoise:
    return BlockDiffusionNoise(4, MASK, PAD, **options)


@pytest.mark.parametrize("t", [0.2, 0.7, 1.0])
def test_a_share_t_is_masked_with_weight_one_over_t(t):
    sample, rate = trajectory(5, 100), []
    for seed in range(30):
        state = draw(diffusion(t_min=t, t_max=t), sample, seed)
        rate.append(len(state.position) / 103)
        torch.testing.assert_close(state.weight, torch.full_like(state.weight, 1 / t / 103))
        shown = state.noisy.clone()
        assert (shown[state.position - state.start] == MASK).all()
        shown[state.position - state.start] = state.ids[state.position]
        assert torch.equal(shown, state.ids[state.start :])
        assert state.position.min() >= 5
    assert abs(sum(rate) / 30 - t) < 0.025  # 3,090 tokens


def test_the_weights_make_the_masks_unbiased():
    """E[sum of the weights] = 1: every response token counts once, whatever t was drawn."""
    total = [float(draw(diffusion(t_min=0.3), trajectory(3, 60), seed).weight.sum()) for seed in range(200)]
    assert abs(sum(total) / len(total) - 1) < 0.04


def test_one_t_a_block_or_one_a_sequence():
    sample = trajectory(3, 61)
    for seed in range(5):
        state = draw(diffusion(), sample, seed)
        t = (1 / (state.weight * 61)).tolist()
        by_block = {}
        for position, value in zip(state.position.tolist(), t, strict=True):
            assert 0.05 <= round(value, 5) <= 1
            by_block.setdefault(position // 4, set()).add(round(value, 5))
        assert all(len(values) == 1 for values in by_block.values())
        assert len(set.union(*by_block.values())) == len(by_block)
        assert draw(diffusion(per_block=False), sample, seed).weight.unique().numel() == 1


def test_pads_of_the_last_block_are_hidden_and_learnt_like_any_token():
    sample = {"id": "q/0/0", "prompt_ids": [1, 2], "response_ids": [3, 4, 5]}
    state = draw(diffusion(t_min=1.0), sample)
    assert state.ids.tolist() == [1, 2, 3, 4, 5, PAD, PAD, PAD] and state.start == 0
    assert state.noisy.tolist() == [1, 2] + [MASK] * 6
    assert state.position.tolist() == list(range(2, 8))
    torch.testing.assert_close(state.weight, torch.full((6,), 1 / 6))
    hidden = Counter(
        p for seed in range(200) for p in draw(diffusion(t_min=0.5, t_max=0.5), sample, seed).position.tolist()
    )
    assert min(hidden.values()) > 75 and max(hidden.values()) < 125 and set(hidden) == set(range(2, 8))


# ---------------------------------------------------------------------------------------------------------------------
# The layout


def states(block_size: int = 4) -> list[State]:
    make = noise(block_size, random_ratio=0.2)
    return [draw(make, trajectory(prompt, length), seed) for seed, (prompt, length) in enumerate(LENGTHS)]


@pytest.mark.parametrize("block_size", [4, 8])
def test_a_state_lies_clean_first_then_noisy(block_size):
    for state in states(block_size):
        batch = collate([[state]], PAD)
        total = len(state.ids)
        assert total % block_size == 0 and state.start % block_size == 0 and state.clean_length == total - block_size
        clean, noisy = range(state.clean_length), range(state.start, total)
        assert batch.position_ids.tolist() == [[*clean, *noisy]]
        assert batch.input_ids.tolist() == [state.ids[: len(clean)].tolist() + state.noisy.tolist()]
        block = torch.tensor([[p // block_size for p in (*clean, *noisy)]])
        is_noisy = torch.arange(len(state))[None] >= len(clean)
        assert torch.equal(batch.attention_mask, dense_mask(Labels(torch.zeros_like(block), block, is_noisy)))
        assert batch.tokens == len(state) == batch.input_ids.numel()


@pytest.mark.parametrize("packing", [[8], [3, 5], [1] * 8, [2, 2, 4]], ids=str)
def test_packed_rows_hold_the_same_sequences(packing):
    everything = states()
    rest = iter(everything)
    rows = [[next(rest) for _ in range(n)] for n in packing]
    batch = collate(rows, PAD)
    assert batch.sequences == 8 and len(batch) == sum(len(state.position) for state in everything)
    assert batch.tokens == sum(map(len, everything)) and batch.sequence.diff().min() >= 0
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    length, covered = batch.input_ids.shape[1], torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    number = 0
    for r, row in enumerate(rows):
        at = 0
        for state in row:
            alone, mine = collate([[state]], PAD), batch.sequence == number
            here = slice(at, at + len(state))
            assert torch.equal(batch.input_ids[r, here], alone.input_ids[0])
            assert torch.equal(batch.position_ids[r, here], alone.position_ids[0])
            assert torch.equal(batch.attention_mask[r, 0, here, here], alone.attention_mask[0, 0])
            outside = torch.ones(length, dtype=torch.bool)
            outside[here] = False
            assert not batch.attention_mask[r, 0, here][:, outside].any()
            assert not batch.attention_mask[r, 0][outside][:, here].any()
            covered[r, here] = True
            assert torch.equal(batch.loss_index[mine] - r * length - at, alone.loss_index)
            for name in ("targets", "masked", "weight", "rank", "u", "block"):
                assert torch.equal(vars(batch)[name][mine], vars(alone)[name]), name
            assert torch.equal(positions[batch.loss_index[mine]], state.position)
            assert torch.equal(ids[batch.loss_index[mine]], state.noisy[state.position - state.start])
            assert torch.equal(batch.targets[mine], state.ids[state.position])
            at, number = at + len(state), number + 1
    assert (batch.input_ids[~covered] == PAD).all()
    assert batch.attention_mask.any(-1).all()


@pytest.mark.parametrize("block_size", [4, 8])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_own_states_are_those_before_each_step_of_the_replay(lengths, block_size):
    """One more copy for each step of a block: it hides this step's tokens and later ones, and looks at this step's."""
    sample = trajectory(*lengths)
    shared, state = (draw(noise(block_size, own_states=own), sample) for own in (False, True))
    width, steps = len(shared.noisy), replay(sample, block_size)
    assert state.copies == 1 + max(map(len, steps.values()))
    noisy = state.noisy.view(state.copies, width)
    assert torch.equal(noisy[0], shared.noisy)
    assert torch.equal(state.position[state.copy == 0], shared.position)
    learnt, prompt = sample["length"] + 2, lengths[0]
    for copy in range(1, state.copies):
        hidden = hidden_by_block(replace(shared, noisy=noisy[copy]), sample, block_size)
        looked_at = set(state.position[state.copy == copy].tolist())
        for block, masked in steps.items():
            before = masked[copy - 1] if copy <= len(masked) else set()
            after = masked[copy] if copy < len(masked) else set()
            assert hidden[block] == before
            now = {p for p in before - after if p < prompt + learnt}
            assert {p for p in looked_at if p // block_size == block} == now

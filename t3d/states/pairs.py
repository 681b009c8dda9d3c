"""Pairs of states of one trajectory: the student's state, and the state in which a frozen teacher gives distributions.

Both have the same targets in the same order. The teacher's state (``State.teacher``) shows more of the other tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from t3d.states.base import Grid, State, clean_sequence, state_without_order
from t3d.states.trajectory import TrajectoryNoise, decode_order, masked_count, step_at, step_number, step_table

# ---------------------------------------------------------------------------------------------------------------------
# The teacher sees a later moment of the trajectory


@dataclass
class LaterState(ABC):
    """A state of ``noise``; the teacher's state is the same with some masked targets visible."""

    noise: TrajectoryNoise

    def __call__(self, sample: dict[str, Any], generator: torch.Generator) -> State:
        state = self.noise(sample, generator)
        step, present = by_block(state, step_at(sample, state.position))
        return replace(state, teacher=revealed(state, self.shown(step, present, generator)[present]))

    @abstractmethod
    def shown(self, step: Tensor, present: Tensor, generator: torch.Generator) -> Tensor:
        """(blocks, width) bool: the targets that the teacher sees.

        Args:
            step: (blocks, width) the step that decoded each target. present: where a block has a target.
        """


@dataclass
class FewerMasks(LaterState):
    """The teacher's state hides a share of a block's masked tokens, drawn uniformly per sequence. It hides the tokens
    decoded last, to a boundary of the decode order, and at least one.

    Attributes:
        least, most: bounds of the share.
    """

    least: float = 0.3
    most: float = 0.7

    def shown(self, step: Tensor, present: Tensor, generator: torch.Generator) -> Tensor:
        share = self.least + (self.most - self.least) * float(torch.rand((), generator=generator))
        kept = present.sum(-1) - masked_count(step, present, share)
        return present & (decode_order(step, present) <= kept.unsqueeze(-1))


@dataclass
class StepsAhead(LaterState):
    """The teacher's state is the state after the block's next ``steps`` denoising steps."""

    steps: int = 2

    def shown(self, step: Tensor, present: Tensor, generator: torch.Generator) -> Tensor:
        return present & (step_number(step, present) <= self.steps)


def by_block(state: State, values: Tensor) -> tuple[Tensor, Tensor]:
    """(targets,) values as (blocks, width), a row per block with targets; and (blocks, width) bool, true at targets."""
    count = state.block[state.position].unique_consecutive(return_counts=True)[1]
    present = torch.arange(max([1, *count.tolist()])) < count.unsqueeze(-1)
    table = torch.zeros(present.shape, dtype=values.dtype)
    table[present] = values
    return table, present


def revealed(state: State, shown: Tensor) -> State:
    """The state with the targets ``shown`` (targets,) bool visible."""
    noisy = state.noisy.clone()
    noisy[state.position[shown] - state.start] = state.targets[shown]
    return replace(state, noisy=noisy, masked=state.masked & ~shown)


# ---------------------------------------------------------------------------------------------------------------------
# One step of each block, and a teacher that writes one token after another


@dataclass
class OneStepPerBlock:
    """The state before one of a block's denoising steps, drawn uniformly and independently for every block.

    Targets are the masked tokens of the answer. The teacher reads each target after the tokens that come earlier in its
    own order. That order is from left to right (``causal``), or the trajectory's order inside the block (``block``).
    In the second case it reads one token at a time, after the clean earlier blocks.

    Attributes:
        stop_ids: an answer that ends with one of them has finished.
        learn_end: the token that ends the answer is a target as well.
        reading: causal or block.
    """

    block_size: int
    mask_id: int
    stop_ids: tuple[int, ...] = ()
    learn_end: bool = False
    reading: str = "causal"

    def __call__(self, sample: dict[str, Any], generator: torch.Generator) -> State:
        x0, grid = clean_sequence(sample, self.block_size, self.mask_id)
        step, present = step_table(sample, grid)
        number = step_number(step, present)
        first = 1 + (torch.rand(len(number), generator=generator) * number.amax(-1)).long()
        hidden = hide(x0, grid, number >= first.unsqueeze(-1), self.mask_id)
        learnt = torch.zeros(len(x0), dtype=torch.bool)
        learnt[max(1, len(sample["prompt_ids"])) : self._end(sample)] = True  # nothing predicts a token at position 0
        position = (learnt & (hidden == self.mask_id)).nonzero().squeeze(-1)
        state = state_without_order(x0, grid, hidden[grid.start :], position)
        if self.reading == "causal":
            return replace(state, teacher=read_causally(state))
        return replace(state, teacher=read_one_by_one(state, grid, decode_order(step, present), self.mask_id))

    def _end(self, sample: dict[str, Any]) -> int:
        """The position after the last target."""
        ended = sample["response_ids"][sample["length"] - 1] in self.stop_ids
        return len(sample["prompt_ids"]) + sample["length"] - (ended and not self.learn_end)


def hide(x0: Tensor, grid: Grid, hidden: Tensor, mask_id: int) -> Tensor:
    """x_0 with the places of the grid ``hidden`` (blocks, width) masked."""
    ids = x0.clone()
    ids[grid.rows[hidden]] = mask_id
    return ids


def read_causally(state: State) -> State:
    """The clean sequence up to the last target, for a model that predicts a token from the tokens before it.

    Its blocks have one token, so the block-causal mask is the causal mask. It needs no noisy copy: the hidden state
    before a target predicts it.
    """
    end = max(2, int(state.position[-1]) + 1 if len(state.position) else 0)
    one_each, none = torch.arange(end), state.noisy[:0]
    return replace(state, ids=state.ids[:end], block=one_each, start=end, noisy=none, causal=True)


def read_one_by_one(state: State, grid: Grid, rank: Tensor, mask_id: int) -> State:
    """A noisy copy for every rank (blocks, width) of a decode order: it shows the tokens of lower ranks."""
    rank_of = torch.zeros(len(state.ids), dtype=torch.long)
    rank_of[grid.rows[rank > 0]] = rank[rank > 0]
    of_target = rank_of[state.position]
    copies = max([1, *of_target.tolist()])
    noisy = [hide(state.ids, grid, rank > number, mask_id)[grid.start :] for number in range(copies)]
    return replace(state, noisy=torch.cat(noisy), rank=of_target, copies=copies, copy=(of_target - 1).clamp(min=0))

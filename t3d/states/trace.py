"""The steps of a recorded trajectory as actions: each step's tokens, in the state just before it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from t3d.states.base import Grid, State, clean_sequence, learnt, state_without_order
from t3d.states.pairs import hide
from t3d.states.trajectory import step_number, step_table


@dataclass
class TraceStates:
    """The states of a trajectory's steps. A target is a token at the step that unmasked it.

    With ``one_step`` every block shows one of its steps, drawn uniformly and independently. Without it there is a noisy
    copy for every step. In both cases the targets of a block and a copy are one action.

    A target's ``weight`` is its action's. Without ``one_step`` it is 1 / blocks. With it, it is steps of the block /
    blocks, so that a sum over the actions has the same expectation.

    Attributes:
        shrink: so many neighbouring steps of a block are one action, in the state before the first of them.
        post_num: positions after the answer's end that are targets.
    """

    block_size: int
    mask_id: int
    shrink: int = 1
    one_step: bool = False
    post_num: int = 2

    def __call__(self, sample: dict[str, Any], generator: torch.Generator) -> State:
        """A state of ``sample``: prompt_ids, response_ids, unmask_step, length, and after a rewarded round also
        old_log_prob and advantage. An advantage of None leaves no targets: the question's answers are equally good.
        """
        x0, grid, number = self._numbered(sample)
        wanted = learnt(sample, grid, self.post_num)
        if sample.get("advantage", 0.0) is None:
            wanted[:] = False
        if not self.one_step:
            return self._scored(self._every_step(x0, grid, number, wanted), sample)
        count = number.amax(-1)
        chosen = 1 + (torch.rand(len(number), generator=generator) * count).long()
        noisy = hide(x0, grid, number >= chosen.unsqueeze(-1), self.mask_id)[grid.start :]
        position = _where(grid, number == chosen.unsqueeze(-1), wanted)
        block = grid.block[position] - grid.block[grid.start]
        state = state_without_order(x0, grid, noisy, position, weight=count[block] / len(number))
        return self._scored(state, sample)

    def whole(self, sample: dict[str, Any]) -> State:
        """Every step's state, with every token of the response as a target."""
        x0, grid, number = self._numbered(sample)
        return self._every_step(x0, grid, number, torch.ones(len(x0), dtype=torch.bool))

    def _numbered(self, sample: dict[str, Any]) -> tuple[Tensor, Grid, Tensor]:
        """x_0, its grid, and (blocks, width) the number of the action that unmasked each token, from 1."""
        x0, grid = clean_sequence(sample, self.block_size, self.mask_id)
        return x0, grid, -(-step_number(*step_table(sample, grid)) // self.shrink)

    def _every_step(self, x0: Tensor, grid: Grid, number: Tensor, wanted: Tensor) -> State:
        copies = int(number.max())
        noisy = [hide(x0, grid, number >= step, self.mask_id)[grid.start :] for step in range(1, copies + 1)]
        positions = [_where(grid, number == step, wanted) for step in range(1, copies + 1)]
        position = torch.cat(positions)
        copy = torch.cat([torch.full_like(of_step, k) for k, of_step in enumerate(positions)])
        weight = torch.full((len(position),), 1 / len(number))
        state = state_without_order(x0, grid, noisy[0], position, weight=weight)
        return replace(state, noisy=torch.cat(noisy), copies=copies, copy=copy)

    def _scored(self, state: State, sample: dict[str, Any]) -> State:
        if recorded := sample.get("old_log_prob"):
            state.old_log_prob = torch.tensor(recorded)[state.position - len(sample["prompt_ids"])]
        state.advantage.fill_(sample.get("advantage") or 0.0)
        return state


def _where(grid: Grid, chosen: Tensor, wanted: Tensor) -> Tensor:
    """The wanted positions (length,) at the places ``chosen`` (blocks, width) of the grid, ascending."""
    position = grid.rows[chosen].sort().values
    return position[wanted[position]]

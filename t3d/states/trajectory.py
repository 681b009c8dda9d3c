"""The training states of a trajectory: x_0 with the tokens of later steps hidden (DESIGN: training states)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from t3d.states.base import Grid, State, clean_sequence, learnt


def step_at(sample: dict[str, Any], position: Tensor) -> Tensor:
    """The unmask steps of a trajectory's tokens at absolute positions."""
    return torch.tensor(sample["unmask_step"])[position - len(sample["prompt_ids"])]


def step_table(sample: dict[str, Any], grid: Grid) -> tuple[Tensor, Tensor]:
    """(blocks, width) unmask steps of the response, and where the block holds a response token."""
    present = grid.rows >= 0
    step = torch.zeros_like(grid.rows)
    step[present] = step_at(sample, grid.rows[present])
    return step, present


def decode_order(unmask_step: Tensor, present: Tensor) -> Tensor:
    """Rank of each token in its block's decode order: by unmask step, ties by position; 1-based.

    Args:
        unmask_step: (blocks, width).
        present: (blocks, width) bool, true at response tokens.

    Returns:
        (blocks, width) ranks 1..n, 0 where not present.
    """
    last = torch.iinfo(unmask_step.dtype).max
    order = unmask_step.masked_fill(~present, last).argsort(dim=-1, stable=True)
    return (order.argsort(-1) + 1) * present


def step_number(unmask_step: Tensor, present: Tensor) -> Tensor:
    """(blocks, width) the number of the block's step that decoded each token: 1, 2, ...; 0 where not ``present``."""
    order = unmask_step.masked_fill(~present, torch.iinfo(unmask_step.dtype).max).sort(-1)
    first = torch.nn.functional.pad(order.values[:, 1:] > order.values[:, :-1], (1, 0), value=True)
    return torch.zeros_like(unmask_step).scatter(-1, order.indices, first.cumsum(-1)) * present


def masked_count(unmask_step: Tensor, present: Tensor, ratio: float) -> Tensor:
    """The number of tokens of each block that a state of the given mask ratio hides.

    A state of the trajectory lies on a boundary of the decode order: all tokens of a step appear together. Among the
    boundaries with masked tokens, the nearest to ratio x (response tokens of the block) is taken. A tie masks more.

    Returns:
        (blocks,) counts, at least 1.
    """
    # later[i] = number of tokens decoded at token i's step or later = number masked just before that step
    later = ((unmask_step.unsqueeze(-2) >= unmask_step.unsqueeze(-1)) & present.unsqueeze(-2)).sum(-1)
    wanted = ratio * present.sum(-1, keepdim=True)
    distance = (later - wanted.double()).abs() - 1e-6 * later  # the small term breaks ties towards more masks
    best = distance.masked_fill(~present, torch.inf).argmin(-1, keepdim=True)
    return later.gather(-1, best).squeeze(-1)


@dataclass
class TrajectoryNoise:
    """How (x_0, x_t) is drawn from a trajectory (DESIGN: training states).

    Attributes:
        block_size: the student's block B.
        mask_ratios: one is drawn per sequence with probability proportional to ratio ** exponent.
        random_ratio: probability that a masked position shows a uniform ordinary token instead of the mask. The
            position still counts in the loss.
        post_num: positions after the answer's end that stay in the loss.
        reversed_trace: hide the tokens decoded first (the release's quirk) instead of the tokens decoded last.
        random_trace: mask positions at random instead of along the trajectory (``mask_strategy: random``).
        from_response: count blocks from the prompt's end (the release's quirk).
        every_target: the loss reads every response token, masked or not (as the release's path loss does).
        own_states: add a noisy copy for every step of the blocks. It hides the tokens of this step and of all later
            steps; its targets are the tokens of this step. So each token has the state just before its decoding.
    """

    block_size: int
    mask_id: int
    ordinary_ids: Tensor
    mask_ratios: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    mask_ratio_exponent: float = 8.0
    random_ratio: float = 0.1
    post_num: int = 2
    reversed_trace: bool = False
    random_trace: bool = False
    from_response: bool = False
    every_target: bool = False
    own_states: bool = False

    def __call__(self, sample: dict, generator: torch.Generator) -> State:
        """Draw a state of ``sample`` (prompt_ids, response_ids, unmask_step, length).

        A training block larger than the rollout's may reach beyond the response. The positions there stay masked, as
        when the student decodes that block, and are no targets.
        """
        x0, grid = clean_sequence(sample, self.block_size, self.mask_id, self.from_response)
        step, present = step_table(sample, grid)
        rank = decode_order(step, present)

        hidden_first = step
        if self.random_trace:
            hidden_first = torch.rand(step.shape, generator=generator).argsort(-1)
        elif self.reversed_trace:
            hidden_first = -step
        count = masked_count(hidden_first, present, self._ratio(generator))
        revealed = present.sum(-1) - count
        masked = present & (decode_order(hidden_first, present) > revealed.unsqueeze(-1))

        hidden = grid.rows[masked].sort().values
        noisy = self._hide(x0, grid, hidden, generator)

        rank_of = torch.zeros(len(x0), dtype=torch.long)
        rank_of[grid.rows[present]] = rank[present]
        if self.every_target:  # the release's path loss stops at the answer's end; DDO continues to post_num
            rank_of[~learnt(sample, grid, 0)] = 0
        is_masked = torch.zeros(len(x0), dtype=torch.bool)
        is_masked[hidden] = True
        looked_at = learnt(sample, grid, self.post_num)
        position = (looked_at if self.every_target else looked_at & is_masked).nonzero().squeeze(-1)
        state = State(
            ids=x0,
            block=grid.block,
            start=grid.start,
            noisy=noisy,
            position=position,
            targets=x0[position],
            masked=is_masked[position],
            weight=torch.ones(len(position)),
            rank=rank_of[position],
            u=torch.rand(len(position), generator=generator),
        )
        if not self.own_states:
            return state
        number = step_number(step, present)
        return self._with_own_states(state, grid, number, rank_of, looked_at, generator)

    def _hide(self, x0: Tensor, grid: Grid, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """The noisy blocks of x_0 with the positions ``hidden`` (n,) masked; some show random tokens instead."""
        noisy = x0[grid.start :].clone()
        scrambled = torch.rand(len(hidden), generator=generator) < self.random_ratio
        lottery = torch.randint(len(self.ordinary_ids), (len(hidden),), generator=generator)
        noisy[hidden - grid.start] = torch.where(scrambled, self.ordinary_ids[lottery], self.mask_id)
        return noisy

    def _with_own_states(
        self,
        state: State,
        grid: Grid,
        number: Tensor,
        rank_of: Tensor,
        looked_at: Tensor,
        generator: torch.Generator,
    ) -> State:
        """The state with a noisy copy for each ``number`` (blocks, width) of a step in its block."""
        x0, copies, more = state.ids, [state.noisy], []
        for step in range(1, int(number.max()) + 1):
            copies.append(self._hide(x0, grid, grid.rows[number >= step].sort().values, generator))
            now = grid.rows[number == step].sort().values
            more.append(now[looked_at[now]])
        position = torch.cat(more)
        return replace(
            state,
            noisy=torch.cat(copies),
            copies=len(copies),
            position=torch.cat([state.position, position]),
            targets=torch.cat([state.targets, x0[position]]),
            masked=torch.cat([state.masked, torch.zeros(len(position), dtype=torch.bool)]),
            weight=torch.cat([state.weight, torch.ones(len(position))]),
            rank=torch.cat([state.rank, rank_of[position]]),
            u=torch.cat([state.u, torch.zeros(len(position))]),
            copy=torch.cat([state.copy, *(torch.full_like(of, k) for k, of in enumerate(more, 1))]),
        )

    def _ratio(self, generator: torch.Generator) -> float:
        ratios = torch.tensor(self.mask_ratios)
        chance = (ratios / ratios.max()) ** self.mask_ratio_exponent
        return float(ratios[torch.multinomial(chance, 1, generator=generator)])

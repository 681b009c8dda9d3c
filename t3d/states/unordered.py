"""Training states that follow no decode order: random masks, the NELBO's, and rectified couplings."""

from dataclasses import dataclass

import torch
from torch import Tensor

from t3d.states.base import Grid, State, absolute_grid, clean_sequence, learnt, state_without_order


@dataclass
class RandomMaskNoise:
    """Every token of the answer is masked with probability ``mask_ratio``; all tokens after the answer are masked.

    The loss reads every token of the answer, masked or not. So an objective may use the complement of the masks in a
    second pass. At least one token is masked.

    Attributes: as in TrajectoryNoise.
    """

    block_size: int
    mask_id: int
    mask_ratio: float = 0.5
    post_num: int = 2

    def __call__(self, sample: dict, generator: torch.Generator) -> State:
        ids, grid = clean_sequence(sample, self.block_size, self.mask_id)
        looked_at = learnt(sample, grid, self.post_num)
        position = looked_at.nonzero().squeeze(-1)
        masked = torch.rand(len(position), generator=generator) < self.mask_ratio
        if not masked.any():
            masked = ~masked
        shown = torch.zeros_like(looked_at)
        shown[: len(sample["prompt_ids"])] = True
        shown[position[~masked]] = True
        noisy = torch.where(shown, ids, self.mask_id)[grid.start :]
        return state_without_order(ids, grid, noisy, position, masked=masked)


@dataclass
class BlockDiffusionNoise:
    """q(z_t | x): every response token of a block is masked with probability t, t ~ U(t_min, t_max).

    Source: MDLM (arXiv 2406.07524, eq. 10), BD3-LM (arXiv 2503.09573, eq. 7) with the log-linear schedule: mask
    probability t, weight 1/t; clipped schedules (BD3-LM, section 5) narrow [t_min, t_max].

    Attributes:
        per_block: one t per block, else one per sequence.
        pad_id: fills the last block after the answer. These positions are masked and learnt like all others, so that
            visible padding does not reveal the end.
    """

    block_size: int
    mask_id: int
    pad_id: int
    t_min: float = 0.05
    t_max: float = 1.0
    per_block: bool = True

    def __call__(self, sample: dict, generator: torch.Generator) -> State:
        """``sample`` has prompt_ids and response_ids. ``weight`` is 1/t over the response's length.

        By chance a state may have no target.
        """
        prompt = len(sample["prompt_ids"])
        tokens = list(sample["prompt_ids"]) + list(sample["response_ids"])
        ids = torch.tensor(tokens + [self.pad_id] * (-len(tokens) % self.block_size))
        grid = absolute_grid(prompt, len(ids), self.block_size)
        position, t = draw_by_time(grid, self.t_min, self.t_max, self.per_block, generator)
        noisy = ids[grid.start :].clone()
        noisy[position - grid.start] = self.mask_id
        return state_without_order(ids, grid, noisy, position, weight=1 / t / (len(ids) - prompt))


def draw_by_time(
    grid: Grid, t_min: float, t_max: float, per_block: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws response positions, each with the probability t of its block, t ~ U(t_min, t_max): (positions, their t)."""
    t = torch.rand(len(grid.rows) if per_block else 1, generator=generator)
    t = (t_min + (t_max - t_min) * t).expand(len(grid.rows)).unsqueeze(-1)
    drawn = (grid.rows >= 0) & (torch.rand(grid.rows.shape, generator=generator) < t)
    return grid.rows[drawn], t.expand(grid.rows.shape)[drawn]


@dataclass
class RectifiedNoise:
    """A state between the ends of a rectified coupling (x_T, x_0): x_T with probability t, else x_0, per position.

    x_T is the decoder's start of the trajectory (``initial_ids``): masks, with ``rollout.random_init_ratio`` random
    tokens. Without ``initial_ids`` x_T is all masks, and this is the noise of the NELBO on the model's text.

    Attributes: as of BlockDiffusionNoise and TrajectoryNoise, and
        random_start_ratio: above 0 every state draws an x_T of its own, with this share of ``ordinary_ids`` among the
            masks: the two ends are independent.
    """

    block_size: int
    mask_id: int
    t_min: float = 0.05
    t_max: float = 1.0
    per_block: bool = True
    post_num: int = 2
    random_start_ratio: float = 0.0
    ordinary_ids: Tensor | None = None

    def __call__(self, sample: dict, generator: torch.Generator) -> State:
        ids, grid = clean_sequence(sample, self.block_size, self.mask_id)
        start = self._start(sample, ids, generator)
        looked_at = learnt(sample, grid, self.post_num)
        position, t = draw_by_time(grid, self.t_min, self.t_max, self.per_block, generator)
        noisy = ids[grid.start :].clone()
        noisy[position - grid.start] = start[position]
        kept = looked_at[position]
        position, t = position[kept], t[kept]
        return state_without_order(ids, grid, noisy, position, weight=1 / t / int(looked_at.sum()))

    def _start(self, sample: dict, ids: Tensor, generator: torch.Generator) -> Tensor:
        """x_T, as long as ``ids``; masks wherever it is not known."""
        start = torch.full_like(ids, self.mask_id)
        if self.random_start_ratio and self.ordinary_ids is not None:
            which = torch.randint(len(self.ordinary_ids), ids.shape, generator=generator)
            shown = torch.rand(ids.shape, generator=generator) < self.random_start_ratio
            return torch.where(shown, self.ordinary_ids[which], start)
        if sample.get("initial_ids"):
            prompt = len(sample["prompt_ids"])
            start[prompt : prompt + len(sample["response_ids"])] = torch.tensor(sample["initial_ids"])
        return start

"""Means and sums over the targets of a sequence or of a block."""

import torch
from torch import Tensor


def group_sum(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum of (N,) values by (N,) group index; (groups,), 0 for an empty group."""
    return torch.zeros(groups, dtype=values.dtype, device=values.device).index_add(0, group, values)


def group_mean(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Mean of (N,) values by (N,) group index; (groups,), 0 for an empty group."""
    count = group_sum(torch.ones_like(values), group, groups)
    return group_sum(values, group, groups) / count.clamp(min=1)


def block_groups(sequence: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) sequence and block indices -> ((blocks,) the sequence of each block, (N,) the block of each target).

    Targets lie in ascending order of sequence and position, so the targets of a block are neighbours.
    """
    (of_sequence, _), group = torch.stack([sequence, block]).unique_consecutive(dim=1, return_inverse=True)
    return of_sequence, group


def step_groups(sequence: Tensor, copy: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """``block_groups`` for states whose noisy copies are the steps of their blocks: a group is one step of one block.

    (N,) sequence, copy and block indices -> ((steps,) the sequence of each step, (N,) the step of each target).
    """
    (of_sequence, _, _), group = torch.stack([sequence, copy, block]).unique_consecutive(dim=1, return_inverse=True)
    return of_sequence, group

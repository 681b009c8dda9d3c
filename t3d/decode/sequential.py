"""The model at block size 1 over drafted blocks: its token-by-token predictions, in one forward.

A block-diffusion model at block size 1 is autoregressive. In a forward over [drafted block | block of masks] mask i
sees the earlier blocks, the drafted tokens j < i, and itself. So it predicts token i of that draft. With a logit shift
the drafted token i - 1 predicts it; it sees the same tokens without the mask. Several drafts of one block go side by
side and read the same cache. A draft's masks see two ranges of keys, which flash-attn does not know, so this forward
uses sdpa.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from t3d.blocks.attention import visible
from t3d.decode.runner import ModelRunner

Result = TypeVar("Result")


def sequential_mask(start: Tensor, block_size: int, cache_slots: int, drafts: int = 1) -> Tensor:
    """The training layout's mask at block size 1, over a cache in which slot = absolute position.

    Queries are, draft by draft, [the block's drafted tokens (clean) | its masks (noisy)]. Keys are [cache | queries].
    Only the earlier blocks of the cache are visible, the slots below ``start``. Drafts do not see each other.

    Args:
        start: (rows,) first position of each row's block.

    Returns:
        (rows, 1, width, cache_slots + width) bool, width = 2 * block_size * drafts.
    """
    column = torch.arange(2 * block_size * drafts, device=start.device)
    position = start.unsqueeze(-1) + column % block_size
    noisy = (column // block_size % 2 == 1).expand_as(position)
    slot = torch.arange(cache_slots, device=start.device).expand(len(start), -1)
    query = [label.unsqueeze(-1) for label in (torch.zeros_like(position), position, noisy)]
    key_segment = torch.cat([-(slot >= start.unsqueeze(-1)).long(), torch.zeros_like(position)], 1)
    key_position = torch.cat([slot, position], 1)
    key_noisy = torch.cat([torch.zeros_like(slot, dtype=torch.bool), noisy], 1)
    mask = visible(*query, *(label.unsqueeze(-2) for label in (key_segment, key_position, key_noisy)))
    draft = column // (2 * block_size)
    mask[:, :, cache_slots:] &= draft.unsqueeze(-1) == draft
    return mask.unsqueeze(1)


def sequential_forward(
    runner: ModelRunner, lanes: Tensor, token: Tensor, head: Callable[[Tensor, Tensor], Result]
) -> Result:
    """A forward at block size 1 over drafts of the lanes' current blocks. It reads the cache and does not change it.

    Args:
        lanes: (rows,). token: (rows, drafts, block).
        head: gets the hidden states that predict the drafts' tokens (rows, drafts, block, width) and the projection's
            weight.

    Returns:
        The result of ``head``.
    """
    rows, drafts, block = token.shape
    start = runner.lanes.start[lanes]
    ids = torch.stack([token, torch.full_like(token, runner.mask_id)], 2).flatten(1)
    position = (start.unsqueeze(-1) + runner.column).repeat(1, 2 * drafts)
    cache = runner.cache
    cache.lanes, cache.write, cache.length = lanes, None, runner.key_slots
    mask = sequential_mask(start, block, runner.key_slots, drafts)

    def predicting(hidden: Tensor) -> Tensor:
        clean, noisy = hidden.view(rows, drafts, 2, block, -1).unbind(2)
        if not runner.shift:
            return noisy
        before = runner.lanes.before[lanes, None, None].expand(-1, drafts, -1, -1).to(hidden.dtype)
        return torch.cat([before, clean[:, :, :-1]], 2)

    return runner.forward(ids, position, mask, lambda hidden, weight: head(predicting(hidden), weight))

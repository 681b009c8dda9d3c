"""Training states under full attention, where every position sees every other: one moment of a decoding each.

The decoder goes through the blocks from left to right over a sequence of fixed length. While it is at a block, the
earlier blocks are shown as they were decided, this block is at x_t, and all later positions are masks, to the end of
the longest answer. There is no clean copy, and one state looks at one block.

Source of the semi-autoregressive decoder: LLaDA (arXiv 2502.09992, section 2.4).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from t3d.states.base import State


def sequence_end(prompt_length: int, max_token: int, block_size: int) -> int:
    """The fixed length of a sequence: prompt and longest answer, to the end of the last block."""
    return -(-(prompt_length + max_token) // block_size) * block_size


@dataclass
class WholeSequence:
    """A noise for full attention, made of one for the block-causal layout: its state at one of its blocks.

    The block is drawn uniformly among those with a masked target. The weights are multiplied by the number of these
    blocks, so a weighted sum has the mean that all blocks together have.

    Attributes:
        noise: draws the block-causal state, with one noisy copy.
        max_token: the longest answer, of samples that do not say theirs.
    """

    noise: Callable[[dict, torch.Generator], State]
    block_size: int
    mask_id: int
    max_token: int

    def __call__(self, sample: dict, generator: torch.Generator) -> State:
        state = self.noise(sample, generator)
        assert state.copies == 1
        blocks = state.block[state.position[state.masked]].unique()
        if not len(blocks):  # it teaches nothing, as the state it is made of
            blocks = state.block[state.start :].unique()
        chosen = blocks[torch.randint(len(blocks), (), generator=generator)]
        kept = state.block[state.position] == chosen

        longest = sample.get("max_token") or self.max_token
        end = max(len(state.ids), sequence_end(len(sample["prompt_ids"]), longest, self.block_size))
        x = torch.full((end,), self.mask_id)
        earlier, here = (relation.nonzero().squeeze(-1) for relation in (state.block < chosen, state.block == chosen))
        x[earlier], x[here] = state.ids[earlier], state.noisy[here - state.start]
        fields = ("position", "targets", "masked", "rank", "u", "copy")
        per_target = {name: getattr(state, name)[kept] for name in fields}
        return replace(
            state,
            ids=x,
            noisy=x,
            start=0,
            block=torch.zeros_like(x),  # one block: everything sees everything
            weight=state.weight[kept] * len(blocks),
            **per_target,
        )

"""Decoding under full attention, where every position sees every other (LLaDA, Dream).

An answer has a fixed length: prompt and ``max_token``, to the end of the last block, all masks at first. Blocks are
decoded from left to right, and each step is a forward over the whole sequence: what a position's keys and values are
depends on all later positions too, so no cache is exact. An answer ends with the block that holds a stop id.

Source: LLaDA (arXiv 2502.09992, section 2.4, semi-autoregressive sampling with low-confidence remasking).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t3d.decode.runner import ModelRunner

NOT_WITH_FULL_ATTENTION = {
    "self_verify": "needs a model with block-causal attention; leave it off",
    "edit_threshold": "needs a model with block-causal attention; leave it at 1",
    "energy_candidates": "needs a model with block-causal attention; leave it at 1",
    "random_init_ratio": "needs a model with block-causal attention; leave it at 0",
}


class WholeRunner(ModelRunner):
    """A runner without a cache: the sequences of all lanes go through the model whole."""

    cached = False

    def prefill(self, lanes: Tensor, width: int) -> None:
        raise AssertionError("there is no cache to fill")

    def block_forward(
        self,
        previous: Tensor | None,
        current: Tensor | None,
        head: Callable[[Tensor, Tensor], Any] | None = None,
        again: bool = False,
    ) -> Any:
        """Forward over all lanes; ``head`` gets the hidden states that predict the current blocks' tokens."""
        state, block = self.lanes, self.settings.block_size
        end = ((state.limit + block - 1) // block * block).clamp(min=1)  # a lane without a request shows one token
        position = torch.arange(self.capacity, device=end.device).expand(len(end), -1)
        seen = (position < end.unsqueeze(-1))[:, None, None].expand(-1, -1, self.capacity, -1)
        source = (state.start.unsqueeze(-1) + self.column - int(self.shift)).clamp(0, self.capacity - 1)
        lane = torch.arange(len(end), device=end.device).unsqueeze(-1)

        def of_block(hidden: Tensor, weight: Tensor) -> Any:
            return head(hidden[lane, source], weight) if head is not None else None

        return self.forward(state.ids, position, seen, of_block, eager=False)

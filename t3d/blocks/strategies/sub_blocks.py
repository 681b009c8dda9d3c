"""Unmasks a block in sub-blocks of 8 from left to right, each by the dynamic rule (low_confidence_dynamic).

Source: Fast-dLLM v2 (arXiv 2509.26328), with blocks of 32 and at least one token per step.
"""

import torch
from torch import Tensor

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import StepView, Strategy, top


class SubBlocks(Strategy):
    """``width``: positions of a sub-block."""

    needs_order = False
    threshold = "dynamic_threshold"
    width = 8

    def choose(self, view: StepView, settings: DecodeSettings) -> Tensor:
        part = torch.arange(view.masked.shape[1], device=view.masked.device) // self.width
        first = view.masked.byte().argmax(-1, keepdim=True) // self.width
        here = view.masked & (part == first)
        above = (here & (view.confidence > settings.dynamic_threshold)).sum(-1)
        return top(view.confidence, here, torch.maximum(view.share, above))

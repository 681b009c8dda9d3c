"""Each step unmasks its share of the block from left to right."""

import torch
from torch import Tensor

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import StepView, Strategy, top


class Sequential(Strategy):
    needs_order = False
    fixed_steps = even = True

    def choose(self, view: StepView, settings: DecodeSettings) -> Tensor:
        column = torch.arange(view.masked.shape[1], device=view.masked.device, dtype=torch.float32)
        return top(-column.expand(view.masked.shape), view.masked, view.share)

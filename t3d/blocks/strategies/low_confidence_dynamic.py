"""Each step unmasks every token with a confidence above the threshold, and at least its share (SDAR, 2510.06303)."""

import torch
from torch import Tensor

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import StepView, Strategy, top


class LowConfidenceDynamic(Strategy):
    needs_order = False
    threshold = "dynamic_threshold"
    label = "dynamic"

    def choose(self, view: StepView, settings: DecodeSettings) -> Tensor:
        above = (view.masked & (view.confidence > settings.dynamic_threshold)).sum(-1)
        return top(view.confidence, view.masked, torch.maximum(view.share, above))

"""Each step unmasks positions in the order of their entropy while the sum stays within the bound, and one at least.

Source: SDAR (arXiv 2510.06303), after EB-Sampler (arXiv 2505.24857).
"""

import torch
from torch import Tensor

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import StepView, Strategy, top


class EntropyBounded(Strategy):
    needs_entropy = True
    threshold = "eb_threshold"

    def choose(self, view: StepView, settings: DecodeSettings) -> Tensor:
        total = view.entropy.masked_fill(~view.masked, torch.inf).sort(-1).values.cumsum(-1)
        number = (total <= settings.eb_threshold).sum(-1).clamp(min=1)
        return top(-view.entropy, view.masked, number)

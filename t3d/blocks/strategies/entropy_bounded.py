"""Each step unmasks positions in the order of their entropy H while the bound holds, and at least one position.

    eb_bound=sum:               sum of H           <= eb_threshold    SDAR's code (arXiv 2510.06303)
    eb_bound=sum_less_largest:  sum of H - max H   <= eb_threshold    EB-Sampler (arXiv 2505.24857)

The second formula bounds the loss of drawing the tokens independently. It always allows a single token.
"""

import torch
from torch import Tensor

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import StepView, Strategy, top


class EntropyBounded(Strategy):
    needs_order = False
    needs_entropy = True
    threshold = "eb_threshold"

    def choose(self, view: StepView, settings: DecodeSettings) -> Tensor:
        assert view.entropy is not None  # needs_entropy
        total = view.entropy.masked_fill(~view.masked, torch.inf).sort(-1).values.cumsum(-1)
        if settings.eb_bound == "sum_less_largest":  # in ascending order the largest is the last one added
            total = total.roll(1, -1)
            total[:, 0] = 0
        number = (total <= settings.eb_threshold).sum(-1).clamp(min=1)
        return top(-view.entropy, view.masked, number)

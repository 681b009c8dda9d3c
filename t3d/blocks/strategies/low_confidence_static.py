"""Each step unmasks its share of the block, the most confident tokens first: MaskGIT's rule, as SDAR uses it."""

from torch import Tensor

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import StepView, Strategy, top


class LowConfidenceStatic(Strategy):
    needs_order = False
    fixed_steps = even = True
    label = "static"

    def choose(self, view: StepView, settings: DecodeSettings) -> Tensor:
        return top(view.confidence, view.masked, view.share)

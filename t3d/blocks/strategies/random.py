"""Each step unmasks its share of the block at positions drawn uniformly."""

from torch import Tensor

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import StepView, Strategy, top


class Random(Strategy):
    fixed_steps = even = True

    def choose(self, view: StepView, settings: DecodeSettings) -> Tensor:
        return top(view.order, view.masked, view.share)

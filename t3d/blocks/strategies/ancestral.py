"""Ancestral sampling of masked diffusion: each step reveals each masked token at random, independently of the others.

Step k = 1..S of a block goes from time t = (S - k + 1) / S to s = (S - k) / S. It reveals a masked token with the
probability (alpha_s - alpha_t) / (1 - alpha_t), so the number of tokens that it reveals is binomial, and may be 0. The
last step goes to s = 0 and reveals all tokens that are left. S may be larger than the block. The larger S is, the fewer
steps reveal several tokens at once. A block ends with its last mask, so it may take fewer than S steps.

Source: MDLM (arXiv 2406.07524); the formula is in t3d.blocks.posterior.
"""

from torch import Tensor

from t3d.blocks.posterior import reveal_probability
from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import StepView, Strategy


class Ancestral(Strategy):
    may_choose_none = True

    def choose(self, view: StepView, settings: DecodeSettings) -> Tensor:
        steps = settings.denoising_steps_per_block
        left = (steps - view.stage).clamp(min=1)  # steps to go, this one included
        reveal = reveal_probability((left - 1) / steps, left / steps, settings.ancestral_schedule)
        return view.masked & (view.order < reveal.unsqueeze(-1))

"""The base of unmasking strategies. Every strategy is one object in one file of ``t3d/blocks/strategies``.

Your own strategy is a class like them: ``rollout.remasking_strategy=my_module:MyStrategy``, with ``my_module.py`` in
the working folder or installed. Engines, ``generate``, the chat and the names of results all ask the object.
"""

from __future__ import annotations

from functools import cache
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from t3d.blocks import plugins

if TYPE_CHECKING:
    from torch import Tensor

    from t3d.blocks.settings import DecodeSettings

PACKAGE = "t3d.blocks.strategies"


class StepView(NamedTuple):
    """One denoising step of some blocks, before positions are chosen.

    Attributes:
        masked: (rows, block) bool, the positions still masked.
        confidence: (rows, block), of the drawn tokens; meaningless at unmasked positions.
        entropy: (rows, block) nats, of the distributions of the draws; None unless the strategy needs it.
        order: (rows, block) uniforms in [0, 1), new ones in every step; meaningless if the strategy needs no order.
        stage: (rows,) steps done in the block.
        share: (rows,) positions that an even split of the block over its steps gives this step.
    """

    masked: Tensor
    confidence: Tensor
    entropy: Tensor | None
    order: Tensor
    stage: Tensor
    share: Tensor


class Strategy:
    """The base of all strategies.

    Attributes:
        fixed_steps: a whole block always takes ``denoising_steps_per_block`` steps.
        even: each of these steps unmasks exactly ``StepView.share`` positions of a whole block.
        needs_entropy: ``choose`` reads the entropies.
        needs_order: ``choose`` reads the random order.
        may_choose_none: a step may unmask nothing; then a block may have more steps than positions.
        threshold: the field of DecodeSettings that names of results carry; None = none.
        label: the name in tables; "" = the strategy's own name.
    """

    fixed_steps = False
    even = False
    needs_entropy = False
    needs_order = True
    may_choose_none = False
    threshold: str | None = None
    label = ""

    def choose(self, view: StepView, settings: DecodeSettings) -> Tensor:
        """(rows, block) bool, the positions to unmask. Unmasked positions in it are ignored."""
        raise NotImplementedError


def top(score: Tensor, masked: Tensor, number: Tensor) -> Tensor:
    """The ``number`` (rows,) or (rows, 1) masked positions with the highest score of each row. Ties go left.

    score, masked: (rows, block). Returns (rows, block) bool.
    """
    ranked = score.masked_fill(~masked, -inf).argsort(dim=-1, descending=True, stable=True)
    return masked & (ranked.argsort(-1) < number.view(-1, 1))


def names() -> tuple[str, ...]:
    """The strategies that have a file here."""
    return plugins.names(PACKAGE)


@cache
def strategy_named(name: str) -> Strategy:
    """The strategy of ``remasking_strategy=name``. Raises ValueError, with the remedy as its text, if there is none."""
    found = plugins.load(name, PACKAGE)
    strategy = found() if isinstance(found, type) else found
    if not callable(getattr(strategy, "choose", None)):
        raise ValueError(f"{name} has no method choose; give a subclass of t3d.blocks.strategy.Strategy")
    return strategy

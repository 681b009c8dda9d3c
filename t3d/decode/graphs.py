"""The block forwards that are compiled: their shapes, a bound on their number, and a log of each.

A step's forward has few shapes, because a compiled run keeps its lanes: one or two blocks wide, over a quarter, a half,
three quarters or all of the cache's slots. flash-attn takes the lanes' lengths as a tensor and always gets the whole
cache, so two shapes are left. On a CUDA GPU torch.compile captures each as a CUDA graph (``reduce-overhead``). The
drawing of tokens is not in the graph: its number of rows is a value that the host knows, the masks of the step.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from t3d.common.errors import fault

log = logging.getLogger(__name__)

CAPTURES = Version(torch.__version__) >= Version("2.7")  # 2.6 cannot follow transformers' forwards
LIMIT = 8  # torch's own limit of recompilations


class Graphs:
    """The compiled decoder of a model, which is compiled in place.

    Attributes:
        shapes: (lanes, width, slots read, slots) of every graph.

    Raises:
        UserError: with PyTorch 2.6.
    """

    def __init__(self, model: Any):
        if not CAPTURES:
            raise fault(
                "rollout.compile", True, f"needs PyTorch 2.7 or newer, this is {torch.__version__}; leave it off"
            )
        self.shapes: set[tuple[int, ...]] = set()
        on_gpu = model.device.type == "cuda"
        model.get_decoder().compile(dynamic=False, **({"mode": "reduce-overhead"} if on_gpu else {}))

    def step(self, ids: Tensor, length: int | None, slots: int) -> AbstractContextManager:
        """The context of a block forward on ``ids`` (lanes, width): compiled, unless that is one shape too many."""
        shape = (*ids.shape, -1 if length is None else length, slots)
        if shape not in self.shapes:
            if len(self.shapes) >= LIMIT:
                log.warning("rollout.compile: %d graphs are there; %s runs without one", LIMIT, shape)
                return eager_forward()
            self.shapes.add(shape)
            log.info("rollout.compile: graph %d of at most %d, %s", len(self.shapes), LIMIT, shape)
        torch.compiler.cudagraph_mark_step_begin()  # the outputs of the forward before are no longer read
        return nullcontext()


def eager_forward() -> AbstractContextManager:
    """Inside, a compiled model runs as it was."""
    return torch.compiler.set_stance("force_eager")

"""An exponential moving average of the student's weights, exported in addition to the student."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- decay * average + (1 - decay) * theta of the trained weights, in fp32, after every optimizer step."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().float().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        current = [parameter.detach().float() for parameter in self.trained.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside the block."""
        own = {name: parameter.data for name, parameter in self.trained.items()}
        for name, parameter in self.trained.items():
            parameter.data = self.average[name].to(parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self.trained.items():
                parameter.data = own[name]

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, average: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(average[name])

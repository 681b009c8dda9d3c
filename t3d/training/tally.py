"""The sums of an optimizer step."""

from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor


class Tally:
    """The sums of an optimizer step's losses and metrics. They stay on the device until they are all read at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=device))
        self.losses: list[Tensor] = []  # (sequences,) of each micro-batch
        self.names: list[str] = []  # of their samples
        self.tokens = 0

    def add(self, loss: Tensor, metrics: dict[str, Tensor], tokens: int, names: list[str]) -> None:
        self.losses.append(loss.detach())
        self.names += names
        self.tokens += tokens
        for name, value in metrics.items():
            self.sums[name] += value.double().sum()

    def read(self, accelerator: Accelerator, norm: Tensor | None, stop: bool) -> tuple[dict, list[float], float | None]:
        """Read the sums. This is the step's only wait for the device.

        Returns:
            (sums, this process's losses, the norm). The sums are over all processes: the metrics, "loss", "tokens",
            "faults" (losses that are not finite) and "stopping" (processes with a request to stop).
        """
        losses = torch.cat([torch.zeros(0, device=self.device), *self.losses]).double()
        self.sums["loss"] += losses.sum()
        self.sums["faults"] += (~losses.isfinite()).sum()
        self.sums["tokens"] += self.tokens
        self.sums["stopping"] += stop
        names = sorted(self.sums)
        sums = accelerator.reduce(torch.stack([self.sums[name] for name in names]), "sum")
        norms = [] if norm is None else [norm.detach().double().reshape(1)]
        values = torch.cat([sums, losses, *norms]).tolist()
        norm = values.pop() if norms else None
        return dict(zip(names, values[: len(names)], strict=True)), values[len(names) :], norm

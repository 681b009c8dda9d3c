"""The order in which training visits the samples."""

import hashlib
from dataclasses import dataclass, field

import torch


@dataclass
class SampleOrder:
    """The endless order of training: the shuffled samples of epoch 0, then of epoch 1, ..., cut into global batches.

    It is a pure function of (num_samples, seed). So a resumed run continues at its place, and the number of processes
    does not change the batch of a step. A batch may span epochs. Every epoch has each sample once.

    Attributes:
        offset: shift of the batches after a resume with another global batch (`resumed`), else 0. It is the number of
            sequences drawn before the resume, minus the number that equally many batches of the present size hold.
        group: this many neighbouring samples stay together, such as the answers to one question.
    """

    num_samples: int
    global_batch: int
    seed: int
    offset: int = 0
    group: int = 1
    _permutations: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.num_samples < 1 or self.global_batch < 1:
            raise ValueError(f"num_samples {self.num_samples} and global_batch {self.global_batch} must be at least 1")
        if self.num_samples % self.group or self.global_batch % self.group:
            raise ValueError(
                f"groups of {self.group} split {self.num_samples} samples or batches of {self.global_batch}"
            )

    def indices(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, sample index) pairs of optimizer step `step` (from 0), exactly `global_batch` of them."""
        first = self.consumed(step)
        batch: list[tuple[int, int]] = []
        while len(batch) < self.global_batch:
            epoch, start = divmod(first + len(batch), self.num_samples)
            part = self._permutation(epoch)[start : start + self.global_batch - len(batch)]
            batch += [(epoch, index) for index in part]
        return batch

    def consumed(self, steps: int) -> int:
        """Sequences drawn in the first `steps` optimizer steps."""
        return self.offset + steps * self.global_batch

    def resumed(self, steps: int, consumed: int) -> "SampleOrder":
        """The same order in batches of this size, for a run that drew `consumed` sequences in `steps` steps."""
        offset = consumed - steps * self.global_batch
        return SampleOrder(self.num_samples, self.global_batch, self.seed, offset, self.group)

    def share(self, step: int, rank: int, world: int) -> list[tuple[int, int]]:
        """The part of `indices(step)` of process `rank` of `world`: every world-th pair. `world` divides the batch."""
        if world < 1 or self.global_batch % world or not 0 <= rank < world:
            raise ValueError(f"process {rank} of {world} cannot share a global batch of {self.global_batch} evenly")
        return self.indices(step)[rank::world]

    def steps(self, epochs: float) -> int:
        """Optimizer steps of `epochs` epochs: whole batches, at least one."""
        return max(1, int((epochs * self.num_samples - self.offset) // self.global_batch))

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._permutations:
            digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            if len(self._permutations) > 1:  # steps only increase, so two epochs are enough
                del self._permutations[min(self._permutations)]
            groups = torch.randperm(self.num_samples // self.group, generator=generator)
            samples = groups.unsqueeze(-1) * self.group + torch.arange(self.group)
            self._permutations[epoch] = samples.flatten().tolist()
        return self._permutations[epoch]

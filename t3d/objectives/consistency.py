"""Consistency distillation: with many masks the student learns its teacher's distributions with fewer masks.

    L = lambda T^2 mean_{i in M_t} KL( p_T,ref(. | x_s)^i || p_T,theta(. | x_t)^i )
        + (1 - lambda) mean_{i in M} -log p_theta(x_0^i | x_t)

x_s is a later moment of the trajectory of x_t. Its masks M_t are a part of M, the masks of x_t. The distribution at
temperature T is p_T, and ref is the model from which training started. The weight lambda keeps its first value for a
tenth of the training, and then falls along a cosine.
Source: CD4LM (arXiv 2601.02236) and its code: T 2, lambda .9 to .5, the share of M_t in M uniform in [.3, .7].

The paper masks at random and takes the KL at all of M. Here masks follow the trajectory, like T3D's. At tokens that the
teacher sees there is no KL. Block diffusion does not train a model's distribution at visible tokens, and the
cross-entropy covers these tokens. The paper's code clips both terms at 5, which stops their gradients; nothing is
clipped here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from t3d.common.errors import fault
from t3d.common.options import option
from t3d.objectives.base import Context, FrozenSettings, Objective, Terms, read, read_teacher, register
from t3d.objectives.divergence import divergence
from t3d.objectives.likelihood import token_log_probs
from t3d.objectives.naive_td import trajectory_loss
from t3d.objectives.states import SoftTargets, TrajectoryStates
from t3d.states.base import Batch
from t3d.states.groups import group_mean
from t3d.states.pairs import FewerMasks

HELD = 0.1  # share of the training with lambda's first value


@dataclass
class ConsistencySettings(SoftTargets, TrajectoryStates):
    """Keys of the objective ``consistency``."""

    consistency_temperature: float = option(2.0, "consistency: T of both distributions in the KL", gt=0)
    consistency_weight: float = option(0.9, "consistency: lambda, the KL's weight, at the start", ge=0, le=1)
    consistency_weight_end: float = option(0.5, "consistency: lambda at the end", ge=0, le=1)
    teacher_masks: list[float] = option(
        [0.3, 0.7], "consistency: bounds of the teacher's share of the student's masks", gt=0, le=1
    )

    def check(self, training) -> None:
        super().check(training)
        if len(self.teacher_masks) != 2 or self.teacher_masks[0] > self.teacher_masks[1]:
            raise fault("training.teacher_masks", self.teacher_masks, "give the least and the most, such as [0.3, 0.7]")


@register("consistency", "CD4LM's agreement with a teacher that sees fewer masks")
@dataclass
class Consistency(Objective):
    """The loss above, means per sequence."""

    noise: FewerMasks
    settings: ConsistencySettings
    chunk: int = 1024
    Settings = ConsistencySettings
    block_causal = True  # the teacher's state is paired with all blocks of the student's
    head_tables = 5  # both models' logits and their log-softmax (divergence)

    @classmethod
    def build(cls, settings: ConsistencySettings, context: Context) -> "Consistency":
        noise = FewerMasks(settings.noise(context), *settings.teacher_masks)
        return cls(noise, settings, context.head_chunk)

    @property
    def reference(self) -> FrozenSettings:
        return self.settings

    @property
    def weight(self) -> float:
        """lambda at this point of the training."""
        first, last = self.settings.consistency_weight, self.settings.consistency_weight_end
        fallen = max(0.0, self.progress - HELD) / (1 - HELD)
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * fallen))

    def __call__(self, student: Callable, reference: Callable | None, batch: Batch) -> Terms:
        assert reference is not None and batch.teacher is not None
        both, temperature = batch.teacher.masked_index, self.settings.consistency_temperature
        teacher, teacher_head = read_teacher(reference, batch, both)
        measure = self.settings.measure(temperature)

        def head(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            soft = divergence(rows[both], weight, teacher.to(rows.dtype), teacher_head, measure, self.chunk)
            return soft, token_log_probs(rows, weight, batch.targets.unsqueeze(-1), self.chunk)[:, 0]

        soft, log_prob = read(student, batch, head)
        kl = temperature**2 * group_mean(soft, batch.sequence[both], batch.sequences)
        cross_entropy = trajectory_loss(log_prob, batch.sequence, batch.sequences)
        loss = self.weight * kl + (1 - self.weight) * cross_entropy
        metrics = {"kl": kl.detach(), "cross_entropy": cross_entropy.detach()}
        return Terms(loss, metrics | {"kl_weight": loss.detach().new_full((batch.sequences,), self.weight)})

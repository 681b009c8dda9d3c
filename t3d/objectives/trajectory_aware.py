"""Trajectory-aware distillation: hard targets for the tokens that the teacher decodes next, soft ones for later tokens.

    L = mean_{i near} -log p_theta(x_0^i | x_t) + w mean_{i distant} KL( p_ref(. | x_{t+k})^i || p_theta(. | x_t)^i )

A masked token is near if the teacher's trajectory decodes it within the next k steps of its block, else distant. The
model ref is the one from which training started.
Source: TAD (arXiv 2605.09536) and its code: w 1, temperature 1, k 8 for blocks of 32.

The paper's teacher reads x_t with the right answer in its prompt. T3D learns without labels. So here the teacher sees
x_{t+k}, the state after those k steps; the trajectory's own model wrote it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from t3d.common.options import option
from t3d.objectives.base import Context, FrozenSettings, Objective, Terms, read, read_teacher, register
from t3d.objectives.divergence import divergence
from t3d.objectives.likelihood import token_log_probs
from t3d.objectives.naive_td import trajectory_loss
from t3d.objectives.states import SoftTargets, TrajectoryStates
from t3d.states.base import Batch
from t3d.states.groups import group_mean
from t3d.states.pairs import StepsAhead


@dataclass
class TrajectoryAwareSettings(SoftTargets, TrajectoryStates):
    """Keys of the objective ``trajectory_aware``."""

    near_steps: int = option(2, "trajectory_aware: k; tokens decoded within the next k steps have hard targets", ge=1)
    distant_weight: float = option(1.0, "trajectory_aware: weight of the soft targets of the others", ge=0)


@register("trajectory_aware", "TAD's hard targets for near tokens, soft ones for distant")
@dataclass
class TrajectoryAware(Objective):
    """The loss above, means per sequence; without distant tokens it is ``naive_td``."""

    noise: StepsAhead
    settings: TrajectoryAwareSettings
    chunk: int = 1024
    Settings = TrajectoryAwareSettings
    block_causal = True  # the teacher's state is paired with all blocks of the student's
    head_tables = 5  # both models' logits and their log-softmax (divergence)

    @classmethod
    def build(cls, settings: TrajectoryAwareSettings, context: Context) -> "TrajectoryAware":
        return cls(StepsAhead(settings.noise(context), settings.near_steps), settings, context.head_chunk)

    @property
    def reference(self) -> FrozenSettings:
        return self.settings

    def __call__(self, student: Callable, reference: Callable | None, batch: Batch) -> Terms:
        assert reference is not None and batch.teacher is not None
        near, distant = batch.teacher.shown_index, batch.teacher.masked_index
        teacher, teacher_head = read_teacher(reference, batch, distant)

        def head(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            log_probs = token_log_probs(rows[near], weight, batch.targets[near].unsqueeze(-1), self.chunk)
            soft = (rows[distant], weight, teacher.to(rows.dtype), teacher_head)
            return log_probs[:, 0], divergence(*soft, self.settings.measure(), self.chunk)

        log_prob, soft = read(student, batch, head)
        cross_entropy = trajectory_loss(log_prob, batch.sequence[near], batch.sequences)
        kl = group_mean(soft, batch.sequence[distant], batch.sequences)
        metrics = {"cross_entropy": cross_entropy.detach(), "kl": kl.detach()}
        return Terms(cross_entropy + self.settings.distant_weight * kl, metrics)

"""Naive trajectory distillation: cross-entropy of the teacher's answer at the states that the teacher visited.

    L_traj = -mean_{i in M} log p_theta(x_0^i | x_t)

Up to a constant this is the forward KL from the teacher's answers to the student. It covers modes; DDO seeks modes.
Source: L_traj of T3D (arXiv 2602.12262), the baseline "Naive TD" of its tables.
"""

from dataclasses import dataclass

from torch import Tensor

from t3d.objectives.base import Context, Objective, Terms, register, score
from t3d.objectives.states import TrajectoryStates
from t3d.states.base import Batch
from t3d.states.groups import group_mean
from t3d.states.trajectory import TrajectoryNoise


def trajectory_loss(log_prob: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """(sequences,) from (M,) log-probabilities of the masked x_0 tokens, in nats."""
    return group_mean(-log_prob, sequence, sequences)


@register("naive_td", "cross-entropy on trajectories")
@dataclass
class NaiveTD(Objective):
    """L_traj, a mean per sequence; the trainer takes the mean over sequences."""

    noise: TrajectoryNoise
    chunk: int = 1024
    Settings = TrajectoryStates

    @classmethod
    def build(cls, settings: TrajectoryStates, context: Context) -> "NaiveTD":
        return cls(settings.noise(context), context.head_chunk)

    def __call__(self, student, reference, batch: Batch) -> Terms:
        log_probs, _ = score(student, batch, chunk=self.chunk)
        loss = trajectory_loss(log_probs[:, 0], batch.sequence, batch.sequences)
        return Terms(loss, {"cross_entropy": loss.detach()})

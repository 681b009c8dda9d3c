"""Self-repair: the student learns to replace its own wrong tokens, for decoding with ``rollout.edit_threshold``.

    L = mean_{i in block} -log p_theta(x_0^i | x~_t),   x~_t = x_t with some masks replaced by argmax p_theta(. | x_t)

x_t is a state of a teacher's trajectory. Every masked token shows the student's own guess with probability
``repair_ratio``; the guess comes from the present weights, without gradient. The loss reads all tokens of the answer:
masks, guesses, and tokens of the teacher. So a guess that is wrong has the right token as its target, and a token that
is right has itself.
Source: on-policy uniform training as in DMax; the targets are a teacher's trajectories here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from t3d.common.options import option
from t3d.objectives.base import Context, Objective, Terms, read, register, score
from t3d.objectives.likelihood import Draw, Projection
from t3d.objectives.naive_td import trajectory_loss
from t3d.objectives.states import TrajectoryStates
from t3d.states.base import Batch
from t3d.states.groups import group_mean
from t3d.states.trajectory import TrajectoryNoise


@dataclass
class SelfRepairSettings(TrajectoryStates):
    """Keys of the objective ``self_repair``."""

    repair_ratio: float = option(
        0.5, "self_repair: share of the masked tokens that show the student's own guess", ge=0, le=1
    )


@register("self_repair", "the student's own wrong tokens in view")
@dataclass
class SelfRepair(Objective):
    """The loss above, a mean per sequence. ``forbidden_ids``: ids that a guess never has."""

    noise: TrajectoryNoise
    forbidden_ids: Tensor
    ratio: float = 0.5
    chunk: int = 1024
    Settings = SelfRepairSettings

    @classmethod
    def build(cls, settings: SelfRepairSettings, context: Context) -> "SelfRepair":
        noise = settings.noise(context, every_target=True)
        return cls(noise, torch.as_tensor(context.ids.forbidden_ids), settings.repair_ratio, context.head_chunk)

    def __call__(self, student: Callable, reference: Callable | None, batch: Batch) -> Terms:
        guess = self._guess(student, batch)
        shown = batch.masked & (batch.u < self.ratio)
        log_prob = score(student, with_guesses(batch, guess, shown), chunk=self.chunk)[0][:, 0]
        loss = trajectory_loss(log_prob, batch.sequence, batch.sequences)
        wrong = shown & (guess != batch.targets)
        metrics = {
            "wrong_guesses": _mean_over(wrong.float(), shown, batch),
            "cross_entropy": _mean_over(-log_prob.detach(), batch.masked & ~shown, batch),
            "repair_cross_entropy": _mean_over(-log_prob.detach(), wrong, batch),
        }
        return Terms(loss, metrics)

    @torch.no_grad()
    def _guess(self, student: Callable, batch: Batch) -> Tensor:
        """(N,) the student's argmax at each target of x_t."""
        self.forbidden_ids = forbidden = self.forbidden_ids.to(batch.targets.device)  # moves only the first time
        draw = Draw(0.0, forbidden, batch.u)

        def head(rows: Tensor, weight: Tensor) -> Tensor:
            parts = [draw(logits, at) for at, logits in Projection(rows, weight, self.chunk)]
            return torch.cat([batch.targets[:0], *parts])

        return read(student, batch, head)


def with_guesses(batch: Batch, guess: Tensor, shown: Tensor) -> Batch:
    """The batch with the guesses (N,) in view at the targets ``shown`` (N,) bool."""
    ids = batch.input_ids.flatten().clone()
    ids[batch.place] = torch.where(shown, guess, ids[batch.place])
    return replace(batch, input_ids=ids.view_as(batch.input_ids))


def _mean_over(values: Tensor, chosen: Tensor, batch: Batch) -> Tensor:
    """(sequences,) means of (N,) values over the chosen targets (N,) bool."""
    values = values.masked_fill(~chosen, 0)
    count = group_mean(chosen.float(), batch.sequence, batch.sequences)
    return group_mean(values, batch.sequence, batch.sequences) / count.clamp(min=1e-9)

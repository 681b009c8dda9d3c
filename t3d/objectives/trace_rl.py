"""Reinforcement learning on recorded trajectories: the steps of a few-step decoder are the actions.

An action a is what one step of a block unmasked. Its log-probability, given the state s before the step, is the sum
over its tokens:

    log pi(a | s) = sum_{i in a} log softmax(logits_i(s) / T)[x_0^i],    T the temperature that drew them
    r_a = pi_theta(a | s) / pi_old(a | s),   pi_old: the weights that drew the answer
    L = mean_b sum_{a of b} [ -min(r_a A, clip(r_a, 1 - eps, 1 + eps) A) + beta k3_a ]
    k3_a = exp(d_a) - 1 - d_a,   d_a = log pi_ref(a | s) - log pi_theta(a | s)

The mean is over the blocks b of an answer, then over the answers. A is the answer's advantage over the other answers to
its question; pi_ref is pi_old or a frozen model. With one step per block a block is one action, and log pi is the exact
likelihood of what was drawn. With more steps it leaves out the choice of the positions, as TraceRL does. ``shrink``
merges neighbouring steps into one action, in the state before the first of them.
Sources: TraceRL (arXiv 2509.06949), eps .2; k3: J. Schulman's estimator of KL(pi_theta || pi_ref) (2020). TraceRL takes
a ratio for each token; here a step has one, because its tokens were drawn together.

The rounds (training.refresh_rollouts) draw ``samples_per_question`` answers, reward them (t3d/training/rewards.py), and
record log pi_old. A question whose answers are equally good teaches nothing; its answers are skipped and counted.
There is no value head: a mean over a question's own answers is the baseline, which needs no second model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t3d.common.errors import fault
from t3d.common.options import option
from t3d.objectives.base import Context, FrozenSettings, Terms, read, register
from t3d.objectives.likelihood import policy_log_probs
from t3d.objectives.rewarded import RewardedObjective, RewardedRounds
from t3d.objectives.states import AnswerEnd
from t3d.states.base import Batch, State
from t3d.states.groups import group_mean, group_sum, step_groups
from t3d.states.trace import TraceStates

FURTHEST = 20.0  # nats; beyond it an action's ratio would overflow, and its gradient is 0


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """PPO's loss of each action (actions,), and whether the clip takes its gradient (arXiv 1707.06347, eq. 7)."""
    ratio = log_ratio.clamp(-FURTHEST, FURTHEST).exp()
    free, bounded = ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
    return -torch.minimum(free, bounded), bounded < free


def k3(log_prob: Tensor, reference: Tensor) -> Tensor:
    """(actions,) the estimate exp(d) - 1 - d of KL(pi_theta || pi_ref), d = log pi_ref - log pi_theta; at least 0."""
    difference = (reference - log_prob).clamp(-FURTHEST, FURTHEST)
    return torch.expm1(difference) - difference


@dataclass
class TraceRLSettings(FrozenSettings, RewardedRounds, AnswerEnd):
    """Keys of the objective ``trace_rl``."""

    clip_epsilon: float = option(0.2, "trace_rl: eps, the ratio counts within 1 - eps to 1 + eps", gt=0, lt=1)
    kl_weight: float = option(0.01, "trace_rl: beta, the weight of the KL estimate k3; 0 = off", ge=0)
    kl_to: str = option(
        "old",
        "trace_rl: pi_ref of k3: the weights that drew the answers, or a frozen model with the weights of the start",
        choices=("old", "reference"),
    )
    shrink: int = option(1, "trace_rl: so many neighbouring steps of a block are one action", ge=1)
    trace_states: str = option(
        "all", "trace_rl: learn all steps of a block, or one of them, drawn uniformly", choices=("all", "one")
    )

    def check(self, training: Any) -> None:
        super().check(training)
        if self.kl_to == "reference" and not self.kl_weight:
            raise fault("training.kl_to", "reference", "works only with a KL; set training.kl_weight above 0")


@register("trace_rl", "reinforcement learning on the student's own trajectories")
@dataclass
class TraceRL(RewardedObjective):
    """The loss above. ``forbidden``: ids that are never drawn. ``temperature``: T. ``steps``: of a block, at most."""

    noise: TraceStates
    forbidden: Tensor
    settings: TraceRLSettings
    temperature: float = 1.0
    chunk: int = 1024
    steps: int | None = None
    Settings = TraceRLSettings
    block_causal = True
    head_tables = 2  # logits and their exponentials

    @classmethod
    def build(cls, settings: TraceRLSettings, context: Context) -> "TraceRL":
        ids, one = context.ids, settings.trace_states == "one"
        noise = TraceStates(context.block_size, ids.mask_id, settings.shrink, one, settings.pads_learnt(context))
        forbidden = torch.tensor(sorted({ids.mask_id, *ids.forbidden_ids}))
        return cls(noise, forbidden, settings, context.temperature, context.head_chunk, context.steps_per_block)

    @property
    def copies(self) -> int:
        return 1 if self.noise.one_step else -(-(self.steps or self.noise.block_size) // self.noise.shrink)

    @property
    def reference(self) -> FrozenSettings | None:
        return self.settings if self.settings.kl_to == "reference" and self.settings.kl_weight else None

    @property
    def rewarded(self) -> RewardedRounds:
        return self.settings

    def whole(self, sample: dict[str, Any]) -> State:
        return self.noise.whole(sample)

    def policy(self, model: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        self.forbidden = forbidden = self.forbidden.to(batch.targets.device)  # moves only the first time

        def head(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return policy_log_probs(rows, weight, batch.targets, self.temperature, forbidden, self.chunk)

        return read(model, batch, head)

    def __call__(self, student: Callable, reference: Callable | None, batch: Batch) -> Terms:
        token, entropy = self.policy(student, batch)
        old_token = torch.where(batch.old_log_prob.isposinf(), token.detach(), batch.old_log_prob)  # drawn just now
        of_sequence, action = step_groups(batch.sequence, batch.copy, batch.block)
        actions, sequences = len(of_sequence), batch.sequences
        new, old = group_sum(token, action, actions), group_sum(old_token, action, actions)
        advantage, weight = (group_mean(x, action, actions) for x in (batch.advantage, batch.weight))
        loss, clipped = clipped_surrogate(new - old, advantage, self.settings.clip_epsilon)
        kl = k3(new, old if reference is None else group_sum(self._frozen(reference, batch), action, actions))
        if self.settings.kl_weight:
            loss = loss + self.settings.kl_weight * kl
        metrics = {
            "kl": group_sum(weight * kl.detach(), of_sequence, sequences),
            "clip_share": group_mean(clipped.float(), of_sequence, sequences),
            "entropy": group_mean(entropy, batch.sequence, sequences),
        }
        return Terms(group_sum(weight * loss, of_sequence, sequences), metrics)

    @torch.no_grad()
    def _frozen(self, reference: Callable, batch: Batch) -> Tensor:
        return self.policy(reference, batch)[0]

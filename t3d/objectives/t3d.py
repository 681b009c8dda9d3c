"""T3D: trajectory self-distillation with direct discriminative optimisation and path consistency.

    L = L_DDO + lambda L_path,    ref <- stopgrad(theta) every round_interval optimizer steps

Source: T3D (arXiv 2602.12262, section 4 and algorithm 1). All terms are a mean per sequence, then a mean over the
global batch. A micro-batch needs one forward of the student and at most one of the reference.

For the paper's ablation each part can be left out or exchanged: L = w L_DDO + v L_traj + lambda L_path, by default
w = 1 and v = 0. Without DDO there is no reference.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from t3d.common.errors import fault
from t3d.common.options import option
from t3d.objectives.base import Context, Objective, ReferenceSettings, Terms, register, score
from t3d.objectives.ddo import ddo_terms
from t3d.objectives.likelihood import Draw
from t3d.objectives.naive_td import trajectory_loss
from t3d.objectives.path import level_path_loss, path_loss
from t3d.objectives.states import TrajectoryStates
from t3d.states.base import Batch
from t3d.states.groups import block_groups, group_mean, group_sum
from t3d.states.trajectory import TrajectoryNoise


@dataclass
class T3DSettings(ReferenceSettings, TrajectoryStates):
    """Keys of the objective ``t3d``."""

    reference_temp: float = option(0.0, "temperature at which the reference draws y; 0 = argmax", ge=0)
    alpha: float = option(0.5, "DDO: weight of the term on the reference's draw", ge=0)
    beta: float = option(0.1, "DDO: scale of the log-probability ratio", gt=0)
    ddo_weight: float = option(1.0, "t3d: weight of DDO; 0 = off, and no reference model is held", ge=0)
    ddo_level: str = option(
        "sequence", "DDO: take log-probabilities per sequence or per block", choices=("sequence", "block")
    )
    ddo_reduce: str = option(
        "mean",
        "DDO: a log-probability is the mean over its masked tokens (the release), or their sum (the paper); a sum "
        "needs a smaller beta",
        choices=("mean", "sum"),
    )
    forward_kl_weight: float = option(
        0.0, "t3d: weight of the cross-entropy on trajectories, instead of DDO or in addition", ge=0
    )
    lambda_path: float = option(0.2, "weight of the path-consistency term; 0 = off", ge=0)
    path_loss: str = option(
        "rank", "weights by decode rank, or a mean over levels of k tokens (the release)", choices=("rank", "levels")
    )
    path_k_steps: int = option(4, "path_loss levels: tokens per level", ge=1)
    path_states: str = option(
        "shared",
        "states of the path term: DDO's one x_t, or each token's own (the paper), just before it was decoded; own "
        "needs a noisy copy for every step of a block",
        choices=("shared", "own"),
    )

    def check(self, training) -> None:
        super().check(training)
        if not any((self.ddo_weight, self.forward_kl_weight, self.lambda_path)):
            raise fault("training.ddo_weight", 0.0, "every term is off; set it, forward_kl_weight or lambda_path")
        if self.path_states == "own" and self.path_loss == "levels":
            raise fault("training.path_states", "own", "levels need all tokens in one state; set path_loss=rank")


@register("t3d", "DDO + path on trajectories")
@dataclass
class T3D(Objective):
    """The T3D loss on states of teacher trajectories. ``forbidden_ids``: ids that y never has."""

    noise: TrajectoryNoise
    forbidden_ids: Tensor
    settings: T3DSettings = field(default_factory=T3DSettings)
    chunk: int = 1024
    Settings = T3DSettings
    PRESETS = {  # `release` keeps the quirks of the paper's own scripts, to compare with it
        "t3d": {},
        "algorithm1": {"round_interval": 1},
        "release": {
            "trace_order": "reversed",
            "path_loss": "levels",
            "block_grid": "response",
            "instruction": False,
            "block_size": 8,
        },
    }

    @classmethod
    def build(cls, settings: T3DSettings, context: Context) -> "T3D":
        own = settings.path_states == "own"
        noise = settings.noise(context, every_target=settings.path_loss == "levels", own_states=own)
        return cls(noise, torch.as_tensor(context.ids.forbidden_ids), settings, context.head_chunk)

    @property
    def copies(self) -> int:  # one more for each step of a block
        return 1 + self.noise.block_size if self.settings.path_states == "own" else 1

    @property
    def reference(self) -> ReferenceSettings | None:
        return self.settings if self.settings.ddo_weight > 0 else None

    def __call__(self, student, reference, batch: Batch) -> Terms:
        settings = self.settings
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        loss = batch.u.new_zeros(())
        if settings.ddo_weight > 0:
            log_probs, reference_log_probs = self._with_reference(student, reference, batch)
            terms, metrics = self._ddo(log_probs, reference_log_probs, batch)
            loss = settings.ddo_weight * (terms["ddo_real"] + terms["ddo_fake"])
            metrics |= {"ddo": terms["ddo_real"] + terms["ddo_fake"]}
        else:
            log_probs, _ = score(student, batch, chunk=self.chunk)
        masked, sequences = batch.masked_index, batch.sequences
        if settings.forward_kl_weight > 0:
            terms["forward_kl"] = trajectory_loss(log_probs[masked, 0], batch.sequence[masked], sequences)
            loss = loss + settings.forward_kl_weight * terms["forward_kl"]
        terms["path"] = self._path(log_probs[:, 0], batch)  # also logged at weight 0, because DDO alone may collapse
        if settings.lambda_path > 0:
            loss = loss + settings.lambda_path * terms["path"]
        return Terms(loss, {name: value.detach() for name, value in (metrics | terms).items()})

    def _with_reference(self, student, reference, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N, 2) log-probabilities of x_0 and y ~ p_ref, by the student and by the reference."""
        self.forbidden_ids = forbidden = self.forbidden_ids.to(batch.targets.device)  # moves only the first time
        draw = Draw(self.settings.reference_temp, forbidden, batch.u)
        if reference is None:  # ref = stopgrad(theta): its forward is the student's own
            log_probs, _ = score(student, batch, draw=draw, chunk=self.chunk)
            return log_probs, log_probs.detach()
        with torch.no_grad():
            reference_log_probs, y = score(reference, batch, draw=draw, chunk=self.chunk)
        return score(student, batch, negatives=y, chunk=self.chunk)[0], reference_log_probs

    def _ddo(self, log_probs: Tensor, reference_log_probs: Tensor, batch: Batch) -> tuple[dict, dict]:
        """DDO's two terms, and its metrics."""
        masked = batch.masked_index
        mine, theirs = log_probs[masked], reference_log_probs[masked]
        sequence = batch.sequence[masked]
        log_p, log_ref = (self._reduce(part, sequence, batch.sequences) for part in (mine, theirs))
        if self.settings.ddo_level == "block":
            real, fake = self._block_terms(mine, theirs, batch)
        else:
            real, fake = ddo_terms(log_p, log_ref, self.settings.alpha, self.settings.beta)
        ratio = (log_p - log_ref).detach()
        metrics = {
            "logp_student_real": log_p[:, 0],
            "logp_student_fake": log_p[:, 1],
            "logp_reference_real": log_ref[:, 0],
            "logp_reference_fake": log_ref[:, 1],
            "reward_margin": self.settings.beta * (ratio[:, 0] - ratio[:, 1]),
            "ddo_accuracy": (ratio[:, 0] > ratio[:, 1]).float(),
        }
        return {"ddo_real": real, "ddo_fake": fake}, metrics

    def _reduce(self, log_probs: Tensor, group: Tensor, groups: int) -> Tensor:
        """(groups, 2) log p of x_0 and y, from (M, 2) log p of their tokens."""
        reduce = group_sum if self.settings.ddo_reduce == "sum" else group_mean
        return torch.stack([reduce(log_probs[:, k], group, groups) for k in (0, 1)], -1)

    def _path(self, log_prob: Tensor, batch: Batch) -> Tensor:
        block_size = self.noise.block_size
        if self.settings.path_loss == "rank":
            at = batch.own_index if self.settings.path_states == "own" else batch.masked_index
            return path_loss(log_prob[at], batch.rank[at], block_size, batch.sequence[at], batch.sequences)
        k = self.settings.path_k_steps
        return level_path_loss(log_prob, batch.rank, block_size, k, batch.sequence, batch.sequences)

    def _block_terms(self, mine: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """DDO with a log p per block, averaged over the blocks of each sequence."""
        sequence, group = block_groups(batch.sequence[batch.masked_index], batch.block[batch.masked_index])
        log_p, log_ref = (self._reduce(part, group, len(sequence)) for part in (mine, theirs))
        real, fake = ddo_terms(log_p, log_ref, self.settings.alpha, self.settings.beta)
        return group_mean(real, sequence, batch.sequences), group_mean(fake, sequence, batch.sequences)

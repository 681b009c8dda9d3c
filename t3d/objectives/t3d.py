"""T3D: trajectory self-distillation with direct discriminative optimisation and path consistency.

    L = L_DDO + lambda L_path,    ref <- stopgrad(theta) every round_interval optimizer steps

Source: T3D (arXiv 2602.12262, section 4 and algorithm 1). All terms are a mean per sequence, then a mean over the
global batch. One student and at most one reference forward a micro-batch.

For the paper's ablation each part can be left out or exchanged: L = w L_DDO + v L_traj + lambda L_path, with w, v =
1, 0. Without DDO no reference takes part.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from t3d.objectives.base import Terms, score
from t3d.objectives.ddo import ddo_terms
from t3d.objectives.likelihood import Draw
from t3d.objectives.naive_td import trajectory_loss
from t3d.objectives.path import level_path_loss, path_loss
from t3d.states.base import Batch
from t3d.states.groups import block_groups, group_mean
from t3d.states.trajectory import TrajectoryNoise


@dataclass
class T3D:
    """The T3D loss on states of teacher trajectories.

    Attributes:
        forbidden_ids: ids y may never be (the mask, ids beyond the tokenizer).
        reference_temp: temperature of y ~ p_ref; 0 takes the argmax.
        per_block: log p is a mean per block and DDO a mean over blocks, in place of one log p per sequence.
        path_k_steps: with a number, the release's level-wise path loss.
        ddo_weight, forward_kl_weight: w and v above.
    """

    noise: TrajectoryNoise
    forbidden_ids: Tensor
    alpha: float = 0.5
    beta: float = 0.1
    lambda_path: float = 0.2
    reference_temp: float = 0.0
    per_block: bool = False
    path_k_steps: int | None = None
    chunk: int = 1024
    ddo_weight: float = 1.0
    forward_kl_weight: float = 0.0

    @property
    def needs_reference(self) -> bool:
        return self.ddo_weight > 0

    def __call__(self, student, reference, batch: Batch) -> Terms:
        terms, metrics, loss = {}, {}, 0.0
        if self.needs_reference:
            log_probs, reference_log_probs = self._with_reference(student, reference, batch)
            terms, metrics = self._ddo(log_probs, reference_log_probs, batch)
            loss = self.ddo_weight * (terms["ddo_real"] + terms["ddo_fake"])
            metrics |= {"ddo": terms["ddo_real"] + terms["ddo_fake"]}
        else:
            log_probs, _ = score(student, batch, chunk=self.chunk)
        masked, sequences = batch.masked_index, batch.sequences
        if self.forward_kl_weight > 0:
            terms["forward_kl"] = trajectory_loss(log_probs[masked, 0], batch.sequence[masked], sequences)
            loss = loss + self.forward_kl_weight * terms["forward_kl"]
        terms["path"] = self._path(log_probs[:, 0], batch)  # logged at weight 0 too: DDO alone may collapse
        if self.lambda_path > 0:
            loss = loss + self.lambda_path * terms["path"]
        return Terms(loss, {name: value.detach() for name, value in (metrics | terms).items()})

    def _with_reference(self, student, reference, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N, 2) log-probabilities of x_0 and y ~ p_ref, by the student and by the reference."""
        self.forbidden_ids = forbidden = self.forbidden_ids.to(batch.targets.device)  # moves the first time only
        draw = Draw(self.reference_temp, forbidden, batch.u)
        if reference is None:  # ref = stopgrad(theta): its forward is the student's own
            log_probs, _ = score(student, batch, draw=draw, chunk=self.chunk)
            return log_probs, log_probs.detach()
        with torch.no_grad():
            reference_log_probs, y = score(reference, batch, draw=draw, chunk=self.chunk)
        return score(student, batch, negatives=y, chunk=self.chunk)[0], reference_log_probs

    def _ddo(self, log_probs: Tensor, reference_log_probs: Tensor, batch: Batch) -> tuple[dict, dict]:
        """DDO's two terms, and what is logged beside them."""
        masked = batch.masked_index
        mine, theirs = log_probs[masked], reference_log_probs[masked]
        of_sequence = partial(group_mean, group=batch.sequence[masked], groups=batch.sequences)
        log_p = torch.stack([of_sequence(mine[:, k]) for k in (0, 1)], -1)  # (sequences, 2)
        log_ref = torch.stack([of_sequence(theirs[:, k]) for k in (0, 1)], -1)
        if self.per_block:
            real, fake = self._block_terms(mine, theirs, batch)
        else:
            real, fake = ddo_terms(log_p, log_ref, self.alpha, self.beta)
        ratio = (log_p - log_ref).detach()
        metrics = {
            "logp_student_real": log_p[:, 0],
            "logp_student_fake": log_p[:, 1],
            "logp_reference_real": log_ref[:, 0],
            "logp_reference_fake": log_ref[:, 1],
            "reward_margin": self.beta * (ratio[:, 0] - ratio[:, 1]),
            "ddo_accuracy": (ratio[:, 0] > ratio[:, 1]).float(),
        }
        return {"ddo_real": real, "ddo_fake": fake}, metrics

    def _path(self, log_prob: Tensor, batch: Batch) -> Tensor:
        block_size, masked = self.noise.block_size, batch.masked_index
        if self.path_k_steps is None:
            return path_loss(log_prob[masked], batch.rank[masked], block_size, batch.sequence[masked], batch.sequences)
        return level_path_loss(log_prob, batch.rank, block_size, self.path_k_steps, batch.sequence, batch.sequences)

    def _block_terms(self, mine: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """DDO with a log p per block, averaged over the blocks of each sequence."""
        sequence, group = block_groups(batch.sequence[batch.masked_index], batch.block[batch.masked_index])
        log_p = torch.stack([group_mean(mine[:, k], group, len(sequence)) for k in (0, 1)], -1)
        log_ref = torch.stack([group_mean(theirs[:, k], group, len(sequence)) for k in (0, 1)], -1)
        return tuple(
            group_mean(term, sequence, batch.sequences) for term in ddo_terms(log_p, log_ref, self.alpha, self.beta)
        )

"""Block likelihood: few-step decoding needs whole blocks to be likely, not tokens.

    L = mean_b (1 - exp(k s_b)) / k,    s_b = mean_{i in M_b} log p_theta(x_0^i | x_t)

The mean is over the blocks b of a sequence; M_b are the masked positions of b. The weight exp(k s_b) is the probability
that the block's masked tokens are drawn at once, to the power k / |M_b|. As k -> 0 the loss becomes -s_b,
cross-entropy. With k > 0 the gradient of a block has the weight exp(k s_b). So the student learns little from blocks
that it cannot write in one step, and becomes certain of blocks that it nearly can. It seeks modes without a reference
model.
Source: AlphaDLM (arXiv 2609.38066), on states of teacher trajectories.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from t3d.common.options import option
from t3d.objectives.base import Context, Objective, Terms, register, score
from t3d.objectives.naive_td import trajectory_loss
from t3d.objectives.states import TrajectoryStates
from t3d.states.base import Batch
from t3d.states.groups import block_groups, group_mean
from t3d.states.trajectory import TrajectoryNoise


def block_likelihood_loss(log_prob: Tensor, sequence: Tensor, block: Tensor, k: float, sequences: int) -> Tensor:
    """(sequences,) from (M,) log-probabilities in nats of the masked x_0 tokens, their sequences and their blocks."""
    of_sequence, group = block_groups(sequence, block)
    s = group_mean(log_prob, group, len(of_sequence))
    return group_mean(-torch.expm1(k * s) / k if k > 0 else -s, of_sequence, sequences)


@dataclass
class BlockLikelihoodSettings(TrajectoryStates):
    """Keys of the objective ``block_likelihood``."""

    likelihood_k: float = option(
        1.0, "block_likelihood: k of (1 - exp(k s))/k; a larger k seeks modes more, 0 = cross-entropy", ge=0
    )


@register("block_likelihood", "AlphaDLM's likelihood of whole blocks")
@dataclass
class BlockLikelihood(Objective):
    """The loss above, a mean per sequence. k = 0 is its limit, the mean over blocks of their mean cross-entropy."""

    noise: TrajectoryNoise
    k: float = 1.0
    chunk: int = 1024
    Settings = BlockLikelihoodSettings

    @classmethod
    def build(cls, settings: BlockLikelihoodSettings, context: Context) -> "BlockLikelihood":
        return cls(settings.noise(context), settings.likelihood_k, context.head_chunk)

    def __call__(self, student, reference, batch: Batch) -> Terms:
        log_prob = score(student, batch, chunk=self.chunk)[0][:, 0]
        loss = block_likelihood_loss(log_prob, batch.sequence, batch.block, self.k, batch.sequences)
        cross_entropy = trajectory_loss(log_prob.detach(), batch.sequence, batch.sequences)
        return Terms(loss, {"block_likelihood": loss.detach(), "cross_entropy": cross_entropy})

"""The block-diffusion NELBO on ground-truth answers: the supervised baseline, and the loss of the embedded teacher.

    L = E_t E_{x_t} [ 1/t  sum_{masked l} -log p_theta(x_0^l | x_t) ] / length        (log-linear schedule)

Sources: MDLM (arXiv 2406.07524, eq. 10); BD3-LM (arXiv 2503.09573, eq. 8), earlier blocks clean as context.
"""

from dataclasses import dataclass

from torch import Tensor

from t3d.objectives.base import Context, Objective, Terms, register, score
from t3d.objectives.states import MaskTimes
from t3d.states.base import Batch
from t3d.states.unordered import BlockDiffusionNoise


@register("sft", "block NELBO on given answers")
@dataclass
class SFT(Objective):
    """NELBO per response token in nats, one (t, x_t) per sequence; the trainer takes the mean over sequences."""

    noise: BlockDiffusionNoise
    chunk: int = 1024
    Settings = MaskTimes
    data = "examples"
    counts_empty = True

    @classmethod
    def build(cls, settings: MaskTimes, context: Context) -> "SFT":
        ids = context.ids
        noise = BlockDiffusionNoise(context.block_size, ids.mask_id, ids.pad_id, **settings.times())
        return cls(noise, context.head_chunk)

    def __call__(self, student, reference, batch: Batch) -> Terms:
        loss = weighted_cross_entropy(student, batch, self.chunk)
        return Terms(loss, {"nelbo": loss.detach()})


def weighted_cross_entropy(student, batch: Batch, chunk: int) -> Tensor:
    """(sequences,) sums of -weight log p_theta(x_0 | x_t)."""
    log_probs, _ = score(student, batch, chunk=chunk)
    return log_probs.new_zeros(batch.sequences).index_add(0, batch.sequence, -batch.weight * log_probs[:, 0])

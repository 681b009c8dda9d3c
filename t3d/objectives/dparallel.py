"""dParallel: certainty-forcing distillation. The student learns its teacher's answer, and to be certain of it early.

    L = sum over a random mask M and its complement M' of
        mean_{i in M} -log p_theta(x_0^i | x_t) + w mean_{i in C} H(softmax(logits_i / tau))

C are the positions of M where the student's argmax is already x_0. There the entropy at temperature tau is lowered, so
that a position becomes certain before its neighbours. Each position of the region is masked with probability .5. A
second pass masks the others. All positions after the region are masked.
Source: dParallel (arXiv 2509.26488), its code for the values: w 2 (LLaDA) or 1 (Dream), tau .5, LoRA of rank 128 or 32.

Here every block of the answer is a region. Under block-causal attention a block sees only itself and clean earlier
blocks, so one forward trains all regions. The paper's code has full attention and draws one region per step.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from t3d.common.options import option
from t3d.objectives.base import Context, Objective, Terms, read, register
from t3d.objectives.likelihood import token_certainty
from t3d.objectives.states import AnswerEnd
from t3d.states.base import Batch
from t3d.states.groups import group_mean
from t3d.states.unordered import RandomMaskNoise


@dataclass
class DParallelSettings(AnswerEnd):
    """Keys of the objective ``dparallel``."""

    certainty_weight: float = option(2.0, "dparallel: weight of the entropy of tokens guessed right", ge=0)
    certainty_temperature: float = option(0.5, "dparallel: temperature of that entropy", gt=0)
    region_mask_ratio: float = option(
        0.5, "dparallel: probability of a mask in the first pass; the second pass masks the others", gt=0, lt=1
    )


@register("dparallel", "certainty forcing")
@dataclass
class DParallel(Objective):
    """The loss above, means per sequence, in two forwards of the student.

    Attributes:
        certainty_weight: w. temperature: tau.
    """

    noise: RandomMaskNoise
    certainty_weight: float = 2.0
    temperature: float = 0.5
    chunk: int = 1024
    Settings = DParallelSettings
    forwards = 2
    head_tables = 6  # logits, their sharpened log-softmax and its exponential (token_certainty), each with its gradient

    @classmethod
    def build(cls, settings: DParallelSettings, context: Context) -> "DParallel":
        noise = RandomMaskNoise(
            context.block_size,
            context.ids.mask_id,
            mask_ratio=settings.region_mask_ratio,
            post_num=settings.pads_learnt(context),
        )
        return cls(noise, settings.certainty_weight, settings.certainty_temperature, context.head_chunk)

    def __call__(self, student, reference, batch: Batch) -> Terms:
        first, second = (self._pass(student, part) for part in (batch, complement(batch, self.noise.mask_id)))
        cross_entropy, entropy = first[0] + second[0], first[1] + second[1]
        metrics = {"cross_entropy": cross_entropy, "certainty_entropy": entropy, "correct": (first[2] + second[2]) / 2}
        loss = cross_entropy + self.certainty_weight * entropy
        return Terms(loss, {name: value.detach() for name, value in metrics.items()})

    def _pass(self, student, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(sequences,) each: cross-entropy of the masked tokens, entropy of correctly guessed tokens, their share."""
        masked = batch.masked_index

        def head(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return token_certainty(rows[masked], weight, batch.targets[masked], self.temperature, self.chunk)

        log_prob, entropy, right = read(student, batch, head)
        sequence, sequences = batch.sequence[masked], batch.sequences
        return (
            group_mean(-log_prob, sequence, sequences),
            group_mean(entropy[right], sequence[right], sequences),
            group_mean(right.float(), sequence, sequences),
        )


def complement(batch: Batch, mask_id: int) -> Batch:
    """The batch with shown targets masked, and masked targets shown."""
    ids = batch.input_ids.flatten().clone()
    ids[batch.place] = torch.where(batch.masked, batch.targets, mask_id)
    return replace(
        batch,
        input_ids=ids.view_as(batch.input_ids),
        masked=~batch.masked,
        masked_index=batch.shown_index,
        shown_index=batch.masked_index,
    )

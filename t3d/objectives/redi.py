"""ReDi: rectified couplings. The student learns the direct way from the decoder's start to its result.

    L = E_t [ 1/t  sum_{l from x_T} -log p_theta(x_0^l | x_t) ] / length
    x_t^l = x_T^l with probability t, else x_0^l

(x_T, x_0) is a coupling: x_0 is the teacher's full decode of this x_T, which has masks and random tokens. With
independent ends few-step decoding has a total correlation that it cannot express. A decoder's coupling has less. The
student's own coupling, decoded for the next round, has even less (iterated rectification: training.refresh_rollouts).
Source: ReDi (arXiv 2507.15897), with the 1/t weight of the NELBO as for SFT.

Couplings differ by the random part of x_T (rollout.random_init_ratio at the rollouts). With an all-mask x_T every
answer has the same start, and the loss is SFT's on the model's own text (a test checks this).
"""

from dataclasses import dataclass

from t3d.common.options import fault
from t3d.objectives.base import Context, Objective, Terms, register
from t3d.objectives.sft import weighted_cross_entropy
from t3d.objectives.states import AnswerEnd, MaskTimes
from t3d.states.base import Batch
from t3d.states.unordered import RectifiedNoise


@dataclass
class ReDiSettings(AnswerEnd, MaskTimes):
    """Keys of the objective ``redi``."""


@register("redi", "rectified couplings")
@dataclass
class ReDi(Objective):
    """The loss above per token of the answer in nats, with one (t, x_t) per sequence."""

    noise: RectifiedNoise
    chunk: int = 1024
    Settings = ReDiSettings
    counts_empty = True

    @classmethod
    def build(cls, settings: ReDiSettings, context: Context) -> "ReDi":
        pads = settings.pads_learnt(context)
        noise = RectifiedNoise(context.block_size, context.ids.mask_id, **settings.times(), post_num=pads)
        return cls(noise, context.head_chunk)

    def warning(self, sample: dict) -> str | None:
        if sample["initial_ids"]:
            return None
        return (
            "every x_T is all masks, so ReDi is SFT on the model's own text; roll out with "
            "rollout.random_init_ratio above 0"
        )

    def check_refresh(self, sample: dict, training) -> None:
        if sample["initial_ids"] and not training.refresh_random_init_ratio:
            raise fault(
                "training.refresh_random_init_ratio",
                training.refresh_random_init_ratio,
                "the data's x_T hold random tokens, and a refresh would have none; set it to the rollouts' "
                "rollout.random_init_ratio",
            )

    def __call__(self, student, reference, batch: Batch) -> Terms:
        loss = weighted_cross_entropy(student, batch, self.chunk)
        return Terms(loss, {"rectified": loss.detach()})

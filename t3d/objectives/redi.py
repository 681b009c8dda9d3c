"""ReDi: rectified couplings. The student learns the direct way from the decoder's start to its result.

    L = E_t [ 1/t  sum_{l from x_T} -log p_theta(x_0^l | x_t) ] / length
    x_t^l = x_T^l with probability t, else x_0^l

(x_T, x_0) is a coupling: x_0 is the teacher's full decode of this x_T, which has masks and random tokens. With
independent ends few-step decoding has a total correlation that it cannot express. A decoder's coupling has less. The
student's own coupling, decoded for the next round, has even less (iterated rectification: training.refresh_rollouts).
A masked model must first learn to decode an x_T with random tokens. Stage 0 teaches it: the same loss with a new x_T
for every state, independent of x_0 (random_start_ratio). The couplings then come from that model.
Source: ReDi (arXiv 2507.15897), with the 1/t weight of the NELBO as for SFT. Its scripts for images have .3 masks in
x_T at every stage.
"""

from dataclasses import dataclass

import torch

from t3d.common.errors import fault
from t3d.common.options import option
from t3d.objectives.base import Context, Objective, Terms, register
from t3d.objectives.sft import weighted_cross_entropy
from t3d.objectives.states import AnswerEnd, MaskTimes
from t3d.states.base import Batch
from t3d.states.unordered import RectifiedNoise


@dataclass
class ReDiSettings(AnswerEnd, MaskTimes):
    """Keys of the objective ``redi``."""

    random_start_ratio: float = option(
        0.0,
        "redi, stage 0: every state draws a new x_T with this share of random tokens; 0 = use the x_T from which the "
        "answer was decoded",
        ge=0,
        le=1,
    )


@register("redi", "rectified couplings")
@dataclass
class ReDi(Objective):
    """The loss above per token of the answer in nats, with one (t, x_t) per sequence."""

    noise: RectifiedNoise
    chunk: int = 1024
    Settings = ReDiSettings
    counts_empty = True
    block_causal = True  # later blocks would have to show their x_T

    @classmethod
    def build(cls, settings: ReDiSettings, context: Context) -> "ReDi":
        noise = RectifiedNoise(
            context.block_size,
            context.ids.mask_id,
            **settings.times(),
            post_num=settings.pads_learnt(context),
            random_start_ratio=settings.random_start_ratio,
            ordinary_ids=torch.as_tensor(context.ids.ordinary_ids),
        )
        return cls(noise, context.head_chunk)

    def warning(self, sample: dict) -> str | None:
        if sample["initial_ids"] or self.noise.random_start_ratio:
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

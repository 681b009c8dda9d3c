"""ReDi: rectified couplings. The student learns to go straight from where the decoder began to where it ended.

    L = E_t [ 1/t  sum_{l from x_T} -log p_theta(x_0^l | x_t) ] / length
    x_t^l = x_T^l with probability t, else x_0^l

(x_T, x_0) is a coupling: x_0 is the teacher's full decode of this very x_T, masks and random tokens. Independent ends
give few-step decoding a total correlation that it cannot express; a coupling by a decoder has less of it, and decoding
the student's own coupling for the next round has less again (iterated rectification: training.refresh_rollouts).
Source: ReDi (arXiv 2507.15897), with the 1/t weight of the NELBO as for SFT.

What tells couplings apart is the random part of x_T (rollout.random_init_ratio at the rollouts). With an all-mask x_T,
where every answer begins alike, the loss is SFT's on the model's own text (a test holds it to that).
"""

from dataclasses import dataclass

from t3d.objectives.base import Terms
from t3d.objectives.sft import weighted_cross_entropy
from t3d.states.base import Batch
from t3d.states.unordered import RectifiedNoise


@dataclass
class ReDi:
    """The loss above per token of the answer in nats, one (t, x_t) a sequence."""

    noise: RectifiedNoise
    chunk: int = 1024
    needs_reference = False

    def __call__(self, student, reference, batch: Batch) -> Terms:
        loss = weighted_cross_entropy(student, batch, self.chunk)
        return Terms(loss, {"rectified": loss.detach()})

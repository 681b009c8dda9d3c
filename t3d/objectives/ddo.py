"""Direct discriminative optimisation: the likelihood ratio to a frozen reference is the discriminator.

    L_DDO = -log sigma(beta [log p_theta(x_0) - log p_ref(x_0)])
            - alpha log sigma(-beta [log p_theta(y) - log p_ref(y)])

x_0 is the teacher's answer ("real"), y ~ p_ref(. | x_t) the reference's own few-step guess ("fake").
Sources: DDO (arXiv 2503.01103, eq. 10); T3D (arXiv 2602.12262, section 4), log p a mean over the masked positions.
"""

import torch.nn.functional as F
from torch import Tensor


def ddo_terms(student: Tensor, reference: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """(real, fake) terms, each (...,), from (..., 2) mean log-probabilities in nats: [..., 0] of x_0, [..., 1] of y."""
    ratio = student - reference
    return -F.logsigmoid(beta * ratio[..., 0]), -alpha * F.logsigmoid(-beta * ratio[..., 1])

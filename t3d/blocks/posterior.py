"""The reverse step of masked diffusion: from a sequence at time t to the sequence at an earlier time s.

The forward process masks each token independently. At time t a token is unmasked with probability alpha_t, which falls
from alpha_0 = 1 to alpha_1 = 0. Given z_t and the clean x, an earlier z_s has at each position the distribution

    q(z_s | z_t, x) = Cat(z_s; z_t)                                                       z_t is not the mask m,
    q(z_s | z_t, x) = Cat(z_s; [(1 - alpha_s) m + (alpha_s - alpha_t) x] / (1 - alpha_t))   z_t is the mask m.

Source: MDLM (arXiv 2406.07524, section 3; the cosine schedule is the one of its code).
"""

import math

import torch
from torch import Tensor


def alpha(t: Tensor, schedule: str) -> Tensor:
    """The probability that a token is not masked at time ``t`` in [0, 1]: 1 - t (linear) or cos(pi t / 2) (cosine)."""
    return 1 - t if schedule == "linear" else torch.cos(math.pi / 2 * t)


def reveal_probability(s: Tensor, t: Tensor, schedule: str) -> Tensor:
    """(alpha_s - alpha_t) / (1 - alpha_t): the probability that a token masked at ``t`` > 0 is revealed at ``s`` < t.

    Exactly 1 at s = 0. ``s`` and ``t`` broadcast.
    """
    at_s, at_t = alpha(s, schedule), alpha(t, schedule)
    return torch.where(s == 0, 1.0, (at_s - at_t) / (1 - at_t))


def posterior(z_t: Tensor, x: Tensor, s: Tensor, t: Tensor, schedule: str, mask_id: int) -> Tensor:
    """q(z_s | z_t, x) at every position: (..., vocab) probabilities.

    Args:
        z_t: (...) ids. x: (..., vocab), one-hot or a model's distribution, with 0 at ``mask_id``.
        s, t: (...) times, 0 <= s < t <= 1.
    """
    reveal = reveal_probability(s, t, schedule).unsqueeze(-1)
    mask = torch.nn.functional.one_hot(torch.full_like(z_t, mask_id), x.shape[-1])
    kept = torch.nn.functional.one_hot(z_t, x.shape[-1])
    return torch.where((z_t == mask_id).unsqueeze(-1), (1 - reveal) * mask + reveal * x, kept.to(x.dtype))

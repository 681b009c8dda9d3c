"""Path consistency: tokens that the teacher decoded early in a block have more weight.

    L_path = -mean_{i in M} w_i log p_theta(x_0^i | x_t),    w_i = (B - r_i + 1) / B

r_i is the rank of token i in its block's decode order, 1..B. In the paper's slides every token of the answer has its
own state x_t^(i), just before token i was decoded. The release and our default use one x_t for all tokens.
Source: T3D (arXiv 2602.12262, section 4).
"""

import torch
from torch import Tensor

from t3d.states.groups import group_mean


def path_loss(log_prob: Tensor, rank: Tensor, block_size: int, sequence: Tensor, sequences: int) -> Tensor:
    """(sequences,) from (M,) log-probabilities of the masked x_0 tokens, in nats."""
    weight = (block_size - rank + 1) / block_size
    return group_mean(-weight * log_prob, sequence, sequences)


def level_path_loss(
    log_prob: Tensor, rank: Tensor, block_size: int, k: int, sequence: Tensor, sequences: int
) -> Tensor:
    """The release's variant: the mean over levels s = 1..ceil(B/k) of the mean cross-entropy of the first s*k decoded
    tokens of each block. It takes every response token, masked or not; rank 0 is left out.
    Returns (sequences,).
    """
    levels = -(-block_size // k)
    total = torch.zeros(sequences, dtype=log_prob.dtype, device=log_prob.device)
    for level in range(1, levels + 1):
        within = (rank > 0) & (rank <= level * k)
        total = total + group_mean(-log_prob[within], sequence[within], sequences)
    return total / levels

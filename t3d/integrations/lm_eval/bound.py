"""The block-diffusion bound on the log-likelihood of a continuation x of a context c.

    log p(x | c)  >=  sum_b E_k E_M [ n_b / k  sum_{i in M} log p_theta(x^i | x_b without M, x_<b, c) ]

b runs over the blocks of the absolute grid. n_b is the number of the continuation's tokens in b, k ~ U{1..n_b}, and M
is a set of k of them, drawn uniformly. This is the NELBO with t ~ U(0, 1), mask probability t and weight 1/t, after the
integral over t: a set of k tokens has the weight (k - 1)! (n - k)! / n!. Drawing k instead of t has the same mean and a
finite variance. Sources: MDLM (arXiv 2406.07524, eq. 10), BD3-LM (arXiv 2503.09573, eq. 7); k instead of t: LLaDA
(arXiv 2502.09992, section 2.4).

In the last block the positions after the continuation stay masked and are no targets. So the bound holds for decoding
that unmasks the continuation in random order before the rest of the block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from t3d.common.errors import UserError
from t3d.decode.model_facts import full_attention, logit_shift
from t3d.objectives.base import score
from t3d.states.base import State, absolute_grid, collate, state_without_order


def mask_sets(tokens: int, blocks: int, mc_num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The sets of masked tokens of a bound, for several blocks with ``tokens`` tokens each.

    If 2^tokens - 1 is at most ``mc_num``, all sets are used, and the bound has no variance. Otherwise ``mc_num`` sets
    are drawn. The sizes of a block cycle through 1..tokens from a random start, so that every size has its share.

    Returns:
        (sets, blocks, tokens) bool, true at masked tokens; (sets, blocks) the sets' weights.
    """
    if 2**tokens - 1 <= mc_num:
        masked = (torch.arange(1, 2**tokens).unsqueeze(-1) >> torch.arange(tokens)) % 2 == 1
        size = masked.sum(-1).double()
        weight = torch.exp(
            torch.lgamma(size) + torch.lgamma(tokens - size + 1) - torch.lgamma(torch.tensor(tokens + 1.0))
        )
        return masked.unsqueeze(1).expand(-1, blocks, -1), weight.unsqueeze(-1).expand(-1, blocks)
    first = torch.randint(tokens, (blocks,), generator=generator)
    size = 1 + (torch.arange(mc_num).unsqueeze(-1) + first) % tokens
    rank = torch.rand(mc_num, blocks, tokens, generator=generator).argsort(-1).argsort(-1)
    return rank < size.unsqueeze(-1), tokens / size / mc_num


def bound_states(
    context: Sequence[int],
    continuation: Sequence[int],
    *,
    block_size: int,
    mask_id: int,
    mc_num: int,
    generator: torch.Generator,
) -> list[State]:
    """The training states whose weighted log-probabilities add up to the bound.

    Blocks share states: a state has a set of every block that still has one.
    """
    end = len(context) + len(continuation)
    grid = absolute_grid(len(context), end, block_size)
    ids = torch.full((len(grid.block),), mask_id)
    ids[:end] = torch.tensor([*context, *continuation])
    present = grid.rows >= 0
    tokens = present.sum(-1)
    parts = {n: mask_sets(n, int((tokens == n).sum()), mc_num, generator) for n in tokens.unique().tolist()}
    sets = max(len(masked) for masked, _ in parts.values())
    masked = torch.zeros(sets, *present.shape, dtype=torch.bool)
    weight = torch.zeros(sets, len(present))
    for n, (part, part_weight) in parts.items():
        here = tokens == n
        masked[: len(part), present & here.unsqueeze(-1)] = part.flatten(1)
        weight[: len(part), here] = part_weight.float()
    states = []
    for hidden, block_weight in zip(masked, weight, strict=True):
        position = grid.rows[hidden]
        noisy = ids[grid.start :].clone()
        noisy[position - grid.start] = mask_id
        target_weight = block_weight.unsqueeze(-1).expand(present.shape)[hidden]
        states.append(state_without_order(ids, grid, noisy, position, weight=target_weight))
    return states


@torch.no_grad()
def weighted_log_probs(model, states: Sequence[State], pad_id: int) -> list[float]:
    """Each state's part of its bound, in nats, by one forward in the training layout."""
    if full_attention(model.config):
        raise UserError(
            "log-likelihoods: the bound needs block-causal attention; score generated answers only", "log-likelihoods"
        )
    batch = collate([[state] for state in states], pad_id, shift=logit_shift(model.config), device=model.device)
    log_probs, _ = score(model, batch)
    terms = (batch.weight * log_probs[:, 0]).cpu().double()
    return torch.zeros(batch.sequences, dtype=torch.float64).index_add(0, batch.sequence.cpu(), terms).tolist()

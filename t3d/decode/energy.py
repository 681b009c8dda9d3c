"""EDLM: draft several fillings of a block, and choose one by its energy under the same weights at block size 1.

A step draws the tokens of a block independently of each other. EDLM corrects that draw by an energy of all of x_0,

    p(x_0 | x_t) = 1/Z prod_i p_theta(x_0^i | x_t) exp(-E(x_0, x_t)),   E = -log p_AR(x_0) + log p_theta(x_0 | x_t),

and samples it by self-normalised importance sampling: it draws k candidates from the factorised p_theta and chooses one
with weights exp(-E). The factorised distribution cancels. So as k grows, the choice follows p_AR(x_0 | tokens that x_t
shows).

Here x_0 is the current block after decided blocks. No second model is needed: p_AR is the model itself at block size 1
(t3d.decode.sequential) and the decode temperature. The sampling distribution p_theta has temperature, top-k and top-p.
Every step

- proposes k fillings of all masked positions;
- scores each whole block, including visible tokens to the right of a mask (EDLM-AR; its coAR leaves these out);
- commits the strategy's share of the chosen filling, with the draft's confidence in the chosen tokens.

As k grows, the answers at one step per block follow sequential sampling at block size 1. Sequential sampling reads the
same cache, which the model's own block size wrote. It is limited to tokens that the draft's top-k and top-p allow. With
more steps this holds for each step's filling. It holds for the answer only if the strategy ignores the drawn tokens.

The first candidate is the draw of decoding without an energy. Scoring costs k forwards per step. They are counted so,
although they go through the model side by side.

Source: EDLM (arXiv 2410.21357), algorithm 1 with the window w = 1, that is in every step.
"""

import torch
from torch import Tensor

from t3d.blocks.decoding import inverse_cdf, uniforms
from t3d.decode.runner import ModelRunner
from t3d.decode.sequential import sequential_forward

TOKENS_SCORED = 2**15  # most tokens in one forward; this bounds its memory for any number of lanes and candidates


def candidate_uniforms(key: Tensor, position: Tensor, step: Tensor, candidates: int) -> Tensor:
    """The uniforms of every candidate's tokens: (rows, candidates) for (rows,) of each. Stream 0, then 5, 6, ..."""
    stream = torch.arange(4, 4 + candidates, device=key.device)
    stream[0] = 0
    return uniforms(key.unsqueeze(-1), position.unsqueeze(-1), step.unsqueeze(-1), stream)


class Energy:
    """Chooses among the candidates in a run of the local engine. It works on the run's lanes and cache."""

    def __init__(self, runner: ModelRunner):
        self.runner, self.candidates = runner, runner.settings.energy_candidates

    def choose(self, tokens: Tensor, confidence: Tensor, masked: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Choose one candidate for each lane ``turn``.

        Args:
            tokens: (lanes, block, candidates), drawn at masked positions.
            confidence: (lanes, block, candidates), the probabilities of the tokens.
            masked: (lanes, block) bool.

        Returns:
            The tokens and confidences of the chosen candidates, (lanes, block) both, meaningless at unmasked positions.
        """
        state = self.runner.lanes
        lanes = turn.nonzero().flatten()
        shown = state.ids[lanes.unsqueeze(-1), state.start[lanes, None] + self.runner.column]
        filled = torch.where(masked[lanes].unsqueeze(-1), tokens[lanes], shown.unsqueeze(-1)).transpose(1, 2)
        drafted = torch.where(masked[lanes].unsqueeze(-1), confidence[lanes].log(), 0).sum(1)
        weight = (self.log_likelihood(lanes, filled, masked[lanes]) - drafted).softmax(-1)
        u = uniforms(state.key[lanes], state.start[lanes], state.steps[lanes] + 1, stream=4)
        state.forwards[lanes] += self.candidates
        chosen = torch.zeros_like(turn, dtype=torch.long)
        chosen[lanes] = inverse_cdf(weight, u)
        chosen = chosen[:, None, None].expand(*masked.shape, 1)
        return tokens.gather(-1, chosen).squeeze(-1), confidence.gather(-1, chosen).squeeze(-1)

    def log_likelihood(self, lanes: Tensor, filled: Tensor, masked: Tensor) -> Tensor:
        """log p_AR of fillings of the lanes' blocks, in nats, without the terms of tokens before the first mask.

        Args:
            lanes: (rows,).
            filled: (rows, candidates, block).
            masked: (rows, block) bool, the positions at which the fillings may differ.

        Returns:
            (rows, candidates) fp32.
        """
        runner, (rows, _, block) = self.runner, filled.shape
        scored = masked.cumsum(-1) > 0

        def score(token: Tensor) -> Tensor:
            at = scored.unsqueeze(1).expand_as(token)

            def head(hidden: Tensor, weight: Tensor) -> Tensor:
                parts = zip(*(x[at].split(runner.rows_at_once) for x in (hidden, token)), strict=True)
                scores = [log_probability(runner.logits(h, weight) / runner.settings.temperature, t) for h, t in parts]
                return torch.zeros(token.shape, device=token.device).masked_scatter_(at, torch.cat(scores)).sum(-1)

            return sequential_forward(runner, lanes, token, head)

        at_once = max(1, TOKENS_SCORED // (2 * block * rows))
        return torch.cat([score(part) for part in filled.split(at_once, 1)], 1)


def log_probability(logits: Tensor, token: Tensor) -> Tensor:
    """(rows,) of the tokens (rows,) under logits (rows, vocab)."""
    return logits.gather(-1, token.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

"""Self-verification: the same weights, at block size 1, check the block that they drafted.

One forward gives the model's token-by-token predictions for the draft (t3d.decode.sequential). The longest passing
prefix of the draft stays. The verifier's token replaces the first token that fails. The tokens after it are drafted
again. So every verification settles at least one token.

Sequential decoding below means decoding at block size 1, over a cache that the model's own block size wrote. At
temperature 0 the whole answer equals the answer of sequential decoding, for any draft. Above 0 the rule is speculative
sampling's. Then the answer has exactly the distribution of sequential decoding, under two conditions. Drafted tokens
are kept regardless of their values. No token is drawn while a later one is visible. One step per block and the
sequential strategy satisfy both. The other strategies prefer some draws, or draw right to left. The rule does not
correct that, so there it is a heuristic.

The trajectory keeps the final tokens. A token's unmask step is the step of its final draw; for a verifier's token it is
the verification. Steps that left no token are removed from the count. So the trajectory is an order in which the answer
was unmasked. But the decoder saw some of its states with other tokens, which were rejected later.

`Verifier` applies this to the local engine (t3d.decode.local); the functions before it are pure functions of tensors.

Source: S2D2 (arXiv 2603.25702); speculative sampling (arXiv 2211.17192, section 2.3 and appendix A.1).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from t3d.blocks.decoding import distribution, inverse_cdf, uniforms
from t3d.blocks.settings import DecodeSettings
from t3d.decode.runner import ModelRunner
from t3d.decode.sequential import sequential_forward


@dataclass
class Drafts:
    """The data of every lane's draft that a verification needs.

    Attributes:
        settled: (lanes,) the first position that no verification has settled yet.
        probability: (lanes, block) of the drafted token, under the distribution of its draw.
        hidden: (lanes, block, width) the hidden state of the draw. It replaces the distribution, which would have the
            size of the vocabulary.
    """

    settled: Tensor
    probability: Tensor
    hidden: Tensor

    @classmethod
    def empty(cls, lanes: int, block_size: int, width: int, dtype: torch.dtype, device: torch.device) -> "Drafts":
        return cls(
            torch.zeros(lanes, dtype=torch.long, device=device),
            torch.zeros(lanes, block_size, device=device),
            torch.zeros(lanes, block_size, width, dtype=dtype, device=device),
        )

    def keep(self, lanes: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[lanes])


def accepted(logits: Tensor, token: Tensor, probability: Tensor, u: Tensor, settings: DecodeSettings) -> Tensor:
    """(rows,) bool: whether each drafted token passes, independently of the others.

    At temperature 0 the verifier's argmax passes. Above 0 a token passes with probability min(1, p_verify / p_draft).

    Args:
        logits: (rows, vocab) the verifier's.
        token: (rows,) drafted; a token that cannot be drawn, such as the mask, fails.
        probability: (rows,) the draft's probability of its token.
        u: (rows,) uniforms in [0, 1).
    """
    if settings.temperature == 0:
        return logits.argmax(-1) == token
    verified = distribution(logits, settings).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return u * probability < verified


def replacement(logits: Tensor, draft_logits: Tensor, drafted: Tensor, u: Tensor, settings: DecodeSettings) -> Tensor:
    """The verifier's tokens (rows,) that replace rejected ones: its argmax, or a draw from (p_verify - p_draft)+.

    Args:
        logits: (rows, vocab) the verifier's.
        draft_logits: (rows, vocab) the logits from which the rejected token was drawn.
        drafted: (rows,) bool, False if no token was drafted: then the draw is from p_verify itself.
        u: (rows,) uniforms in [0, 1).
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    verified = distribution(logits, settings)
    residual = (verified - distribution(draft_logits, settings) * drafted.unsqueeze(-1)).clamp_(min=0)
    # If the two distributions are equal, only rounding can have rejected the token.
    return inverse_cdf(torch.where(residual.sum(-1, keepdim=True) > 0, residual, verified), u)


def verdict(
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    token: Tensor,
    opened: Tensor,
    drafts: Drafts,
    drafted: Tensor,
    uniform: Tensor,
    draw_uniform: Tensor,
    settings: DecodeSettings,
    rows_at_once: int,
) -> tuple[Tensor, Tensor]:
    """The first rejected column of each block, and the token that replaces it.

    Args:
        hidden: (rows, block, width) the verifier's last hidden states at the masks.
        logits_of: projects (n, width) to (n, vocab) fp32 logits, ids that may not be drawn at -inf.
        token: (rows, block) the drafted block.
        opened: (rows, block) bool, the positions that are not settled.
        drafted: (rows, block) bool, the positions where a token was drafted.
        drafts: the drafts of these rows.
        uniform: (rows, block), for acceptance.
        draw_uniform: (rows, block), for the draw of a replacement.
        rows_at_once: bound on the logits held at once.

    Returns:
        (rows,) columns, ``block`` if all passed, and (rows,) tokens, meaningless in that case.
    """
    rows, block = token.shape
    parts = zip(*(x[opened].split(rows_at_once) for x in (hidden, token, drafts.probability, uniform)), strict=True)
    passed = torch.ones_like(opened)
    passed[opened] = torch.cat([accepted(logits_of(h), t, p, u, settings) for h, t, p, u in parts])
    column = passed.long().cumprod(-1).sum(-1)
    at = torch.arange(rows, device=column.device), column.clamp(max=block - 1)
    parts = zip(*(x[at].split(rows_at_once) for x in (hidden, drafts.hidden, drafted, draw_uniform)), strict=True)
    chosen = [replacement(logits_of(h), logits_of(d), known, u, settings) for h, d, known, u in parts]
    return column, torch.cat(chosen)


def close_up(unmask_step: list[int]) -> list[int]:
    """Unmask steps renumbered to 1, 2, ...: a step whose tokens were all rejected has no token in the answer."""
    number = {step: n for n, step in enumerate(sorted(set(unmask_step)), 1)}
    return [number[step] for step in unmask_step]


class Verifier:
    """Checks the drafted blocks in a run of the local engine. It works on the run's lanes and cache."""

    def __init__(self, runner: ModelRunner, show: Callable[[Tensor, Tensor], None] | None):
        model, lanes = runner.model, len(runner.lanes.ids)
        self.runner, self.show = runner, show
        block, width = runner.settings.block_size, model.config.hidden_size
        self.drafts = Drafts.empty(lanes, block, width, model.dtype, model.device)

    def settle(self, due: Tensor, unmask: Tensor, confidence: Tensor) -> Tensor:
        """Check the blocks of the lanes ``due``, which have no mask. Returns the lanes whose block is settled.

        A rejected token is replaced, and the tokens after it are masked again. If only one position is masked, it needs
        no draft: a second verification settles it at once. Every verification has its own number in the count of steps,
        and so its own random numbers. The trajectory closes the gaps.

        Args:
            unmask: (lanes, block) bool, the positions that the last step drafted.
            confidence: (lanes, block), the probability of each drafted token.
        """
        runner, drafts = self.runner, self.drafts
        state, block, mask_id = runner.lanes, runner.settings.block_size, runner.mask_id
        drafts.probability = torch.where(unmask, confidence, drafts.probability)
        settled = torch.zeros_like(due)
        while bool(due.any()):
            lanes = due.nonzero().flatten()
            state.steps[lanes] += 1
            state.forwards[lanes] += 1
            start, step = state.start[lanes, None], state.steps[lanes, None]
            at = lanes.unsqueeze(-1), start + runner.column
            token = state.ids[at]
            column, instead = self._forward(lanes, at[1], token)
            column, instead = column.unsqueeze(-1), instead.unsqueeze(-1)
            token = torch.where(runner.column < column, token, mask_id)
            state.ids[at] = torch.where(runner.column == column, instead, token)
            state.unmask_step[at] = torch.where(runner.column == column, step, state.unmask_step[at])
            state.stage[lanes] = 0
            through = (column.squeeze(-1) + 1).clamp(max=block)
            drafts.settled[lanes] = state.start[lanes] + through
            settled[lanes] = through == block
            if self.show is not None:
                self.show(due, settled)
            due = torch.zeros_like(due)
            due[lanes] = through == block - 1
        return settled

    def _forward(self, lanes: Tensor, position: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The ``verdict`` on the blocks ``token`` at ``position``, both (rows, block)."""
        runner = self.runner
        drafts = Drafts(*(value[lanes] for value in vars(self.drafts).values()))
        opened = position >= drafts.settled.unsqueeze(-1)
        key, step = runner.lanes.key[lanes, None], runner.lanes.steps[lanes, None]
        uniform, draw_uniform = (uniforms(key, position, step, stream) for stream in (2, 0))

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return verdict(
                hidden.squeeze(1),
                lambda rows: runner.logits(rows, weight),
                token,
                opened,
                drafts,
                token != runner.mask_id,
                uniform,
                draw_uniform,
                runner.settings,
                runner.rows_at_once,
            )

        return sequential_forward(runner, lanes, token.unsqueeze(1), head)

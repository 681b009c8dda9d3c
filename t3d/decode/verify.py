"""Self-verification: the same weights, at block size 1, check the block that they drafted.

One forward gives what the model would have decoded token by token (t3d.decode.sequential). The longest prefix of the
draft that passes stays, the first token that fails is replaced by the verifier's, and what follows it is drafted anew:
every verification settles at least one token.

Greedy, the whole answer is the one of sequential decoding at block size 1 (over a cache that holds earlier blocks as
the model's own block size wrote them), whatever drafted it. Above temperature 0 the rule is speculative sampling's, and
the answer has exactly the law of that sequential decoding where no draft was kept for what it is or drawn in sight of
later tokens: at one step per block, and in the sequential strategy. The others prefer some draws to others, or draw
right to left, and the rule does not undo that: there it is a heuristic.

The trajectory is what stays in the end: a token's unmask step is that of its final drawing, the verification's where
the token is the verifier's, and steps that left nothing are closed up. So it is an order in which the answer was
unmasked, but not every state of it is one that the decoder was in: some it saw with tokens that were rejected later.

`Verifier` drives this for the local engine (t3d.decode.local); what stands before it are functions of tensors.

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
    """What a verification must know of every lane's draft.

    settled: (lanes,) the first position that no verification has settled yet. probability: (lanes, block) of the
    drafted token under the distribution it was drawn from. hidden: (lanes, block, width) the last hidden state that it
    was drawn from, in place of that distribution, which has the size of the vocabulary.
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
    """Which drafted tokens pass, each for itself: (rows,) bool.

    At temperature 0 the verifier's argmax; above it with probability min(1, p_verify / p_draft).

    Args:
        logits: (rows, vocab) the verifier's. token: (rows,) drafted; one that cannot be drawn, such as the mask, fails.
        probability: (rows,) that the draft gave its token. u: (rows,) uniforms in [0, 1).
    """
    if settings.temperature == 0:
        return logits.argmax(-1) == token
    verified = distribution(logits, settings).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return u * probability < verified


def replacement(logits: Tensor, draft_logits: Tensor, drafted: Tensor, u: Tensor, settings: DecodeSettings) -> Tensor:
    """The verifier's tokens (rows,) in place of rejected ones: its argmax, or a draw from (p_verify - p_draft)+.

    Args:
        logits, draft_logits: (rows, vocab) the verifier's, and those that the rejected token was drawn from.
        drafted: (rows,) bool, False where nothing was drafted: the draw is then from p_verify itself.
        u: (rows,) uniforms in [0, 1).
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    verified = distribution(logits, settings)
    residual = (verified - distribution(draft_logits, settings) * drafted.unsqueeze(-1)).clamp_(min=0)
    # Only rounding can reject where the two distributions are the same.
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
    """The first rejected column of each block, and the token that takes its place.

    Args:
        hidden: (rows, block, width) the verifier's last hidden states at the masks.
        logits_of: projects (n, width) to (n, vocab) fp32 logits, ids that may not be drawn at -inf.
        token: (rows, block) the drafted block. opened: (rows, block) bool, what is not settled. drafted: (rows, block)
            bool, where a token was drafted.
        drafts: of these rows.
        uniform, draw_uniform: (rows, block), for acceptance and for the draw of a replacement.
        rows_at_once: bound on the logits held at once.

    Returns:
        (rows,) columns, ``block`` where all passed, and (rows,) tokens, meaningless there.
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
    """Unmask steps renumbered to 1, 2, ...: a step whose tokens were all rejected has left nothing in the answer."""
    number = {step: n for n, step in enumerate(sorted(set(unmask_step)), 1)}
    return [number[step] for step in unmask_step]


class Verifier:
    """Checks the drafted blocks of a run of the local engine, whose lanes and cache it works on."""

    def __init__(self, runner: ModelRunner, show: Callable[[Tensor, Tensor], None] | None):
        model, lanes = runner.model, len(runner.lanes.ids)
        self.runner, self.show = runner, show
        block, width = runner.settings.block_size, model.config.hidden_size
        self.drafts = Drafts.empty(lanes, block, width, model.dtype, model.device)

    def settle(self, due: Tensor, unmask: Tensor, confidence: Tensor) -> Tensor:
        """Check the blocks of the lanes ``due``, which have no mask; returns the lanes whose block is settled.

        A rejected token is replaced and what follows it masked again. Where that is a single position it needs no
        draft: a second verification settles it at once. Every verification takes a number in the count of steps, so
        that its random numbers are its own; the trajectory closes the gaps.

        Args:
            unmask, confidence: (lanes, block), where the step just done drafted, and how likely each token was.
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

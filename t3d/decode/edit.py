"""Token editing: a token of the current block that is already shown gives way to one of which the model is certain.

In every forward of a block, masked positions are unmasked by the strategy, and shown positions of the answer are read
again. Where the argmax is another token and its probability (softmax at temperature 1) is above ``edit_threshold``, it
takes the token's place. The block ends when no mask is left and nothing has changed, or after
``denoising_steps_per_block + edit_steps`` steps. Each of them is a forward like any other.
Source: LLaDA2.1's rule, {masked, p > tau_mask} and {x != argmax, p > tau_edit}.

A trajectory has the final tokens with the steps that wrote them. ``edits`` has the tokens that stood there before
(t3d.data.trajectory.shown_after).
"""

from dataclasses import replace

import torch
from torch import Tensor

from t3d.blocks.decoding import project_and_draw
from t3d.decode.runner import ModelRunner


class Editor:
    """The edits of one run.

    Attributes:
        edits: lane -> [position, step that wrote the token, the token] of every token that was replaced.
    """

    def __init__(self, runner: ModelRunner):
        self.runner, self.settings = runner, runner.settings
        self.greedy = replace(runner.settings, temperature=0.0)
        self.allowed = self.settings.denoising_steps_per_block + self.settings.edit_steps
        self.edits: list[list[list[int]]] = [[] for _ in range(len(runner.lanes.start))]
        self.guess = self.certainty = torch.empty(0)

    def look(self, hidden: Tensor, weight: Tensor, at: tuple[Tensor, Tensor], shape: torch.Size) -> None:
        """Read the argmax and its probability from hidden states (rows, width) at the places ``at`` of the blocks."""
        runner, no_draw = self.runner, hidden.new_zeros(len(hidden), dtype=torch.float32)
        sizes = {"rows_at_once": runner.rows_at_once, "rows_drawn": runner.rows_drawn}
        token, certainty, _ = project_and_draw(
            hidden, weight, runner.forbidden_ids, no_draw, self.greedy, need_entropy=False, **sizes
        )
        self.guess = torch.zeros(shape, dtype=token.dtype, device=token.device).index_put(at, token)
        self.certainty = torch.zeros(shape, dtype=certainty.dtype, device=token.device).index_put(at, certainty)

    def edit(self, shown: Tensor, position: Tensor) -> Tensor:
        """Replace tokens at the ``shown`` places of the blocks, and record them. It reads from the device.

        Args:
            shown: (lanes, block) bool, tokens of the answer before this step. position: (lanes, block), absolute.

        Returns:
            (lanes, block) bool, the replaced tokens.
        """
        state = self.runner.lanes
        current, when = state.ids.gather(1, position), state.unmask_step.gather(1, position)
        edited = shown & (self.guess != current) & (self.certainty > self.settings.edit_threshold)
        found = edited.nonzero()
        if len(found):
            lane, column = found.T
            record = torch.stack([position[lane, column], when[lane, column], current[lane, column]], 1)
            for number, row in zip(lane.tolist(), record.tolist(), strict=True):
                self.edits[number].append(row)
            state.ids.scatter_(1, position, torch.where(edited, self.guess, current))
            state.unmask_step.scatter_(1, position, torch.where(edited, state.steps.unsqueeze(-1), when))
        return edited

    def settle(self, complete: Tensor, changed: Tensor) -> Tensor:
        """(lanes,) bool, the lanes whose block has ended.

        Args:
            complete: (lanes,) no mask is left. changed: (lanes, block) tokens that this step wrote.
        """
        return complete & (~changed.any(-1) | (self.runner.lanes.stage >= self.allowed))

    def take(self, lane: int, prompt: int) -> list[list[int]]:
        """The edits of a finished answer, by index in its response; the lane has none afterwards."""
        found, self.edits[lane] = self.edits[lane], []
        return [[position - prompt, step, token] for position, step, token in found]

    def keep(self, lanes: Tensor) -> None:
        """Keep only these lanes."""
        self.edits = [self.edits[lane] for lane in lanes.tolist()]

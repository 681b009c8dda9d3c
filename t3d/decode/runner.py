"""The model at work on the lanes of a run: their state, their cache, and the forwards over both."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t3d.blocks.attention import cache_mask
from t3d.blocks.decoding import initial_tokens, project, project_and_draw
from t3d.blocks.settings import DecodeSettings
from t3d.common.errors import UserError
from t3d.decode.cache import CACHE_NAME, Slots
from t3d.decode.model_facts import logit_shift

TOKENS_PREFILLED = 2**15  # at once: what a forward needs beside the cache is bounded, whatever the number of lanes


@dataclass
class Lanes:
    """Device state of all lanes; every field is (lanes,) unless a shape is given.

    ids, unmask_step: (lanes, capacity), the sequence so far (masks ahead) and when each token was unmasked (0: prompt).
    start: first position of the current block. stage: steps already done in it. steps: steps done in all.
    limit: prompt length + max_token. commit: the block before ``start`` is not in the cache yet.
    before: (lanes, width) the last hidden state at ``start`` - 1, from its block's final tokens: what predicts the
    current block's first token under a logit shift. Width 0 where there is none.
    """

    ids: Tensor
    unmask_step: Tensor
    before: Tensor
    prompt: Tensor
    limit: Tensor
    start: Tensor
    stage: Tensor
    steps: Tensor
    forwards: Tensor
    key: Tensor
    active: Tensor
    commit: Tensor

    @classmethod
    def empty(cls, lanes: int, capacity: int, mask_id: int, before: Tensor) -> "Lanes":
        device = before.device
        grid = torch.full((lanes, capacity), mask_id, device=device)
        counts = ("prompt", "limit", "start", "stage", "steps", "forwards", "key")
        fields = {name: torch.zeros(lanes, dtype=torch.long, device=device) for name in counts}
        fields |= {name: torch.zeros(lanes, dtype=torch.bool, device=device) for name in ("active", "commit")}
        return cls(ids=grid, unmask_step=torch.zeros_like(grid), before=before, **fields)

    def keep(self, lanes: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[lanes])


class ModelRunner:
    """One model over the cache of one run's lanes.

    Args:
        lanes: how many decode at once. capacity: positions of a lane, whole blocks.
        forbidden_ids: (n,) ids that may never be drawn. ordinary_ids: (n,) what ``random_init_ratio`` draws from.
        compile: the blocks' forwards go through torch.compile.

    Attributes:
        lanes, cache: state and keys and values of all lanes. key_slots: slots of the cache that a forward reads.
        column: (block,) 0, 1, ... rows_at_once: rows whose logits are held at once. rows_drawn: rows that a
            pass over the vocabulary takes.
    """

    def __init__(
        self,
        model,
        settings: DecodeSettings,
        lanes: int,
        capacity: int,
        *,
        mask_id: int,
        forbidden_ids: Tensor,
        ordinary_ids: Tensor,
        compile: bool,
    ):
        self.model, self.settings, self.capacity, self.compile = model, settings, capacity, compile
        self.mask_id, self.forbidden_ids, self.ordinary_ids = mask_id, forbidden_ids, ordinary_ids
        # The extra block of slots takes what nobody reads: columns of lanes that sit out a forward.
        self.slots = capacity + settings.block_size
        self.cache = Slots(model.config, lanes, self.slots, model.dtype, model.device)
        self.shift = logit_shift(model.config)
        width = model.config.hidden_size if self.shift else 0
        before = torch.zeros(lanes, width, dtype=model.dtype, device=model.device)
        self.lanes = Lanes.empty(lanes, capacity, mask_id, before)
        self.column = torch.arange(settings.block_size, device=model.device)
        self.rows_at_once = max(1, 2**25 // model.config.vocab_size)  # 128 MiB of fp32 logits
        # Sampling is passes over the vocabulary. On a CPU they cost several times less on rows that stay in its cache,
        # whose temporaries the allocator reuses (8 MiB); a GPU wants few launches.
        cpu = model.device.type == "cpu"
        self.rows_drawn = max(1, 2**21 // model.config.vocab_size) if cpu else self.rows_at_once
        self.key_slots = 0
        # Compiled, every shape is a graph: one width with and one without commits, and the cache read by quarters.
        self.slots_together = -(-self.slots // 4) if compile else 1

    def prefill(self, lanes: Tensor, width: int) -> None:
        """Write the first ``width`` tokens of ``lanes``, (rows,), into the cache."""
        position = torch.arange(width, device=lanes.device).expand(len(lanes), width)
        self.cache.lanes, self.cache.write, self.cache.length = lanes, position, None
        mask = cache_mask(position, width, self.settings.block_size)

        def keep(hidden: Tensor, weight: Tensor) -> None:
            last = (self.lanes.start[lanes] - 1).clamp(min=0)  # a prompt may be shorter than a block, or than others
            self.lanes.before[lanes] = hidden[torch.arange(len(lanes)), last].to(self.lanes.before.dtype)

        self.forward(self.lanes.ids[lanes, :width], position, mask, keep if self.shift else None)

    def predicting(self, hidden: Tensor, previous: Tensor | None, current: Tensor | None) -> Tensor:
        """The hidden states that predict the current block's tokens, (lanes, block, width), of a block forward's.

        The decoder's one place of the logit shift: the state at i - 1 predicts token i. The first token's is the last
        of the block before, which a commit keeps.
        """
        block = self.settings.block_size
        if self.shift and previous is not None:
            last = hidden[:, block - 1].to(self.lanes.before.dtype)
            self.lanes.before = torch.where(previous.unsqueeze(-1), last, self.lanes.before)
        if self.shift and current is not None:
            return torch.cat([self.lanes.before.unsqueeze(1).to(hidden.dtype), hidden[:, -block:-1]], 1)
        return hidden[:, -block:]

    def block_forward(
        self, previous: Tensor | None, current: Tensor | None, head: Callable[[Tensor, Tensor], Any] | None = None
    ) -> Any:
        """Forward over the previous block of some lanes and the current block of others; None: of no lane.

        The columns of a lane that takes no part go to the spare slots and see block 0, so no row of the mask is empty.

        Args:
            head: gets the hidden states that predict the current block's tokens, (lanes, block, width), and the head's
                weight.
        """

        def of_block(hidden: Tensor, weight: Tensor) -> Any:
            found = self.predicting(hidden, previous, current)
            return head(found, weight) if head is not None else None

        state, block = self.lanes, self.settings.block_size
        blocks = [(state.start - block, previous), (state.start, current)]
        parts = [
            (start.unsqueeze(-1) + self.column, takes.unsqueeze(-1)) for start, takes in blocks if takes is not None
        ]
        position = torch.cat([torch.where(takes, where, self.column) for where, takes in parts], 1)
        spare = self.capacity + self.column
        self.cache.write = torch.cat([torch.where(takes, where, spare) for where, takes in parts], 1)
        self.cache.lanes = torch.arange(len(position), device=position.device)
        self.cache.length = min(-(-self.key_slots // self.slots_together) * self.slots_together, self.slots)
        mask = cache_mask(position, self.cache.length, block)
        ids = state.ids.gather(1, position)
        if self.settings.random_init_ratio:
            ids = torch.where(ids == self.mask_id, self.initial(state.key.unsqueeze(-1), position), ids)
        try:
            return self.forward(ids, position, mask, of_block, eager=not self.cache.ready)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = next(line for line in str(error).splitlines() if line)
            raise UserError(f"rollout.compile=true: torch cannot compile here ({reason}); leave it off") from error

    def initial(self, key: Tensor, position: Tensor) -> Tensor:
        """What a position shows before it is unmasked, under ``random_init_ratio``."""
        return initial_tokens(key, position, self.settings.random_init_ratio, self.ordinary_ids, self.mask_id)

    def forward(
        self,
        ids: Tensor,
        position: Tensor,
        mask: Tensor,
        head: Callable[[Tensor, Tensor], Any] | None = None,
        eager: bool = True,
    ) -> Any:
        """A forward that uses the cache as it is set. Without ``head`` no logits are computed.

        ``eager``: past the compiler, as prefills and verifications have ever new shapes, and the first forward
        allocates the cache.
        """
        with torch.compiler.set_stance("force_eager") if self.compile and eager else nullcontext():
            return self.model(
                ids,
                mask,
                position_ids=position,
                use_cache=True,
                head=head or (lambda hidden, weight: None),
                **{CACHE_NAME: self.cache},
            )

    def draw(self, hidden: Tensor, weight: Tensor, u: Tensor, *, need_entropy: bool):
        """``draw`` (t3d.blocks.decoding) from last hidden states (rows, width)."""
        return project_and_draw(
            hidden,
            weight,
            self.forbidden_ids,
            u,
            self.settings,
            need_entropy=need_entropy,
            rows_at_once=self.rows_at_once,
            rows_drawn=self.rows_drawn,
        )

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """(rows, width) -> (rows, vocab) fp32, the ids that may not be drawn at -inf."""
        return project(hidden, weight, self.forbidden_ids)

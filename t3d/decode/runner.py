"""Runs the model on the lanes of a run: their state, their cache, and the forwards over both."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t3d.blocks.attention import cache_mask, for_implementation
from t3d.blocks.decoding import initial_tokens, project, project_and_draw
from t3d.blocks.settings import DecodeSettings
from t3d.common.errors import fault
from t3d.decode.attention import CacheAttention, block_ends
from t3d.decode.cache import CACHE_NAME, Slots
from t3d.decode.graphs import Graphs, eager_forward
from t3d.decode.model_facts import logit_shift

TOKENS_PREFILLED = 2**15  # most tokens in one prefill; this bounds its memory for any number of lanes


@dataclass
class Lanes:
    """Device state of all lanes; every field is (lanes,) unless a shape is given.

    Attributes:
        ids: (lanes, capacity), the sequence so far, with masks after it.
        unmask_step: (lanes, capacity), the step that unmasked each token; 0 = prompt.
        start: first position of the current block.
        stage: steps done in the current block. steps: steps done in the whole answer.
        limit: prompt length + max_token.
        commit: the block before ``start`` is not in the cache yet.
        before: (lanes, width) the last hidden state at ``start`` - 1, from its block's final tokens. Under a logit
            shift it predicts the current block's first token. Its width is 0 without a shift.
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
        lanes: number of lanes that decode at once.
        capacity: positions of a lane, whole blocks.
        forbidden_ids: (n,) ids that may never be drawn.
        ordinary_ids: (n,) ids from which ``random_init_ratio`` draws.
        attention: reads the cache.
        compiled: the blocks' forwards are compiled; None = they are not.

    Attributes:
        cached: earlier blocks are read from a cache.
        lanes, cache: state of all lanes, and their keys and values.
        key_slots: slots of the cache that a forward reads.
        column: (block,) 0, 1, ...
        reads: positions and mask of the last block forward.
        rows_at_once: rows whose logits are in memory at once.
        rows_drawn: rows in one pass over the vocabulary.
    """

    cached = True

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
        attention: CacheAttention,
        compiled: Graphs | None,
    ):
        self.model, self.settings, self.capacity, self.graphs = model, settings, capacity, compiled
        self.decoder, self.dtype = model.get_decoder(), model.dtype  # both are slow to ask for
        self.attention = attention
        self.mask_id, self.forbidden_ids, self.ordinary_ids = mask_id, forbidden_ids, ordinary_ids
        # Lanes that take no part in a forward write their columns to an extra block of slots, which nobody reads.
        self.slots = capacity + settings.block_size
        self.cache = Slots(model.config, lanes, self.slots, model.dtype, model.device)
        self.shift = logit_shift(model.config)
        width = model.config.hidden_size if self.shift else 0
        before = torch.zeros(lanes, width, dtype=model.dtype, device=model.device)
        self.lanes = Lanes.empty(lanes, capacity, mask_id, before)
        self.column = torch.arange(settings.block_size, device=model.device)
        self.rows_at_once = max(1, 2**25 // model.config.vocab_size)  # 128 MiB of fp32 logits
        # Sampling makes passes over the vocabulary. On a CPU they are several times faster on few rows, which stay in
        # its cache and whose temporaries the allocator reuses (8 MiB). A GPU needs few launches.
        cpu = model.device.type == "cpu"
        self.rows_drawn = max(1, 2**21 // model.config.vocab_size) if cpu else self.rows_at_once
        self.key_slots = 0
        self.reads: tuple[Tensor, Tensor]
        # The compiler makes a graph per shape. So there is one width with and one without commits, and the cache is
        # read by quarters.
        self.slots_together = -(-self.slots // 4) if compiled else 1

    def prefill(self, lanes: Tensor, width: int) -> None:
        """Write the first ``width`` tokens of ``lanes``, (rows,), into the cache."""
        position = torch.arange(width, device=lanes.device).expand(len(lanes), width)
        self.cache.lanes, self.cache.write, self.cache.length = lanes, position, None
        mask = cache_mask(position, width, self.settings.block_size)

        def keep(hidden: Tensor, weight: Tensor) -> None:
            last = (self.lanes.start[lanes] - 1).clamp(min=0)  # a prompt may be shorter than a block
            self.lanes.before[lanes] = hidden[torch.arange(len(lanes)), last].to(self.lanes.before.dtype)

        self.forward(self.lanes.ids[lanes, :width], position, mask, keep if self.shift else None)

    def predicting(self, hidden: Tensor, previous: Tensor | None, current: Tensor | None) -> Tensor:
        """The hidden states of a block forward that predict the current block's tokens, (lanes, block, width).

        This is the decoder's only place with a logit shift: the state at i - 1 predicts token i. The last state of the
        block before predicts the block's first token. A commit keeps that state.
        """
        block = self.settings.block_size
        if self.shift and previous is not None:
            last = hidden[:, block - 1].to(self.lanes.before.dtype)
            self.lanes.before = torch.where(previous.unsqueeze(-1), last, self.lanes.before)
        if self.shift and current is not None:
            return torch.cat([self.lanes.before.unsqueeze(1).to(hidden.dtype), hidden[:, -block:-1]], 1)
        return hidden[:, -block:]

    def block_forward(
        self,
        previous: Tensor | None,
        current: Tensor | None,
        head: Callable[[Tensor, Tensor], Any] | None = None,
        again: bool = False,
    ) -> Any:
        """Forward over the previous block of some lanes and the current block of others; None = of no lane.

        The columns of a lane that takes no part go to the extra slots and see block 0, so no row of the mask is empty.

        Args:
            again: the same lanes as in the last forward of this runner, inside the same blocks.
            head: gets the hidden states that predict the current block's tokens, (lanes, block, width), and the head's
                weight.
        """

        def of_block(hidden: Tensor, weight: Tensor) -> Any:
            found = self.predicting(hidden, previous, current)
            return head(found, weight) if head is not None else None

        if not again:
            self.reads = self._read(previous, current)
        state, (position, mask) = self.lanes, self.reads
        ids = state.ids.gather(1, position)
        if self.settings.random_init_ratio:
            ids = torch.where(ids == self.mask_id, self.initial(state.key.unsqueeze(-1), position), ids)
        return self.forward(ids, position, mask, of_block, eager=not self.cache.ready)

    def _read(self, previous: Tensor | None, current: Tensor | None) -> tuple[Tensor, Tensor]:
        """The positions and the mask of a block forward, after the cache is told where it writes."""
        state, block = self.lanes, self.settings.block_size
        blocks = [(state.start - block, previous), (state.start, current)]
        parts = [
            (start.unsqueeze(-1) + self.column, takes.unsqueeze(-1)) for start, takes in blocks if takes is not None
        ]
        position = torch.cat([torch.where(takes, where, self.column) for where, takes in parts], 1)
        spare = self.capacity + self.column
        self.cache.write = torch.cat([torch.where(takes, where, spare) for where, takes in parts], 1)
        self.cache.lanes = torch.arange(len(position), device=position.device)
        if self.attention.by_ends:  # the kernel itself stops at the ends
            self.cache.length, mask = self.slots, block_ends(position, block)
        else:
            self.cache.length = min(-(-self.key_slots // self.slots_together) * self.slots_together, self.slots)
            mask = cache_mask(position, self.cache.length, block)
            if not torch.is_autocast_enabled(mask.device.type):  # else the model knows the dtype
                mask = for_implementation(mask, self.attention.name, self.dtype)
        return position, mask

    def initial(self, key: Tensor, position: Tensor) -> Tensor:
        """The tokens that positions show before they are unmasked, under ``random_init_ratio``."""
        return initial_tokens(key, position, self.settings.random_init_ratio, self.ordinary_ids, self.mask_id)

    def forward(
        self,
        ids: Tensor,
        position: Tensor,
        mask: Tensor,
        head: Callable[[Tensor, Tensor], Any] | None = None,
        eager: bool = True,
    ) -> Any:
        """A forward with the cache's present settings. Without ``head`` no logits are computed.

        ``eager``: without the compiler, because prefills and verifications have changing shapes, and the first forward
        allocates the cache.
        """
        cache = {"use_cache": True, CACHE_NAME: self.cache} if self.cached else {"use_cache": False}
        head = head or (lambda hidden, weight: None)
        try:
            with self._compiled(ids, eager), self.attention.of(self.model):
                return self.model(ids, mask, position_ids=position, head=head, **cache)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = next(line for line in str(error).splitlines() if line)
            raise fault("rollout.compile", True, f"torch cannot compile here ({reason}); leave it off") from error

    def _compiled(self, ids: Tensor, eager: bool) -> AbstractContextManager:
        if self.graphs is None:
            compiled = getattr(self.decoder, "_compiled_call_impl", None)  # by another engine
            return eager_forward() if compiled else nullcontext()
        return eager_forward() if eager else self.graphs.step(ids, self.cache.length, self.slots)

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
        """(rows, width) -> (rows, vocab) fp32, with -inf at forbidden ids."""
        return project(hidden, weight, self.forbidden_ids)

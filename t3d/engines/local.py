"""Our own decoder: block diffusion over a slotted KV cache, continuous batching, fused commits.

A lane decodes one request at a time. Lanes share every forward; a lane that finishes is refilled at once. The cache has
one slot per absolute position, so a single predicate (t3d.attention) covers prefill, decoding and commits, and whatever
a lane wrote beyond its current block is overwritten before anyone may see it.

A finished block must enter the cache with its final tokens. With ``fused_commit`` that happens in the forward that
starts the next block, on [finished block | next block]: exact under block-causal attention, and ``steps`` forwards a
block in place of ``steps + 1``. With ``self_verify`` a block counts as finished when a forward of its own has checked
it (t3d.engines.verify).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from t3d.attention import cache_mask
from t3d.decoding import DecodeSettings, choose, draw, quota, stream_key, uniforms
from t3d.engines.base import Request, Step
from t3d.engines.verify import Drafts, close_up, verdict, verify_mask
from t3d.errors import UserError
from t3d.trajectory import Trajectory


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: (lanes, kv heads, slots, head dim), written by scatter at ``Slots.write``."""

    def __init__(self, slots: "Slots", shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.slots = slots
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        lanes, write, length = self.slots.lanes, self.slots.write, self.slots.length
        if write is None:  # a verification reads the cache of its lanes and leaves nothing behind
            keys, values = self.keys[lanes, :, :length], self.values[lanes, :, :length]
            return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        self.keys[lanes.unsqueeze(-1), :, write] = key_states.transpose(1, 2)
        self.values[lanes.unsqueeze(-1), :, write] = value_states.transpose(1, 2)
        if length is None:  # a prefill reads nothing but what it has just written
            return key_states, value_states
        return self.keys[:, :, :length], self.values[:, :, :length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self.is_initialized

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class Slots(Cache):
    """The cache, and where the coming forward writes and reads.

    Set before each forward: ``lanes`` (rows,), ``write`` (rows, width) slots (None: nothing is written, and a row reads
    its own tokens behind the slots), ``length`` of the slots read (None in a prefill).
    """

    def __init__(self, config, lanes: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (lanes, config.num_key_value_heads, capacity, config.head_dim)
        super().__init__(layers=[SlotLayer(self, shape, dtype, device) for _ in range(config.num_hidden_layers)])
        self.lanes = self.write = self.length = None

    def keep(self, lanes: Tensor) -> None:
        """Drop all lanes but these."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[lanes], layer.values[lanes]

    @staticmethod
    def bytes_per_slot(config, dtype: torch.dtype) -> int:
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


@dataclass
class Lanes:
    """Device state of all lanes; every field is (lanes,) unless a shape is given.

    ids, unmask_step: (lanes, capacity), the sequence so far (masks ahead) and when each token was unmasked (0: prompt).
    start: first position of the current block. stage: steps already done in it. steps: steps done in all.
    limit: prompt length + max_token. commit: the block before ``start`` is not in the cache yet.
    """

    ids: Tensor
    unmask_step: Tensor
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
    def empty(cls, lanes: int, capacity: int, mask_id: int, device: torch.device) -> "Lanes":
        grid = torch.full((lanes, capacity), mask_id, device=device)
        count = [torch.zeros(lanes, dtype=torch.long, device=device) for _ in range(7)]
        flag = [torch.zeros(lanes, dtype=torch.bool, device=device) for _ in range(2)]
        return cls(grid, torch.zeros_like(grid), *count, *flag)

    def keep(self, lanes: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[lanes])


class LocalEngine:
    """Decodes on one device with a Hugging Face SDAR model (see ``t3d.engines.base.Engine``).

    Args:
        model: SDARForCausalLM in eval mode.
        mask_id: the mask token. stop_ids: ids that end an answer.
        forbidden_ids: ids that may never be drawn (the mask, ids beyond the tokenizer).
        max_active: most lanes at once; fewer are used when the cache would not fit in memory.
        fused_commit: write a finished block's cache in the next block's first forward.
    """

    def __init__(
        self,
        model,
        *,
        mask_id: int,
        stop_ids: Sequence[int],
        forbidden_ids: Sequence[int],
        max_active: int = 256,
        fused_commit: bool = True,
    ):
        self.model = model
        self.device = model.device
        self.mask_id = mask_id
        self.stop_ids = torch.tensor(sorted(stop_ids), device=self.device)
        self.forbidden_ids = torch.tensor(sorted({mask_id, *forbidden_ids}), device=self.device)
        self.max_active = max_active
        self.fused_commit = fused_commit

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        settings: DecodeSettings,
        seed: int,
        on_step: Callable[[Step], None] | None = None,
    ) -> Iterator[Trajectory]:
        """Yield one trajectory per request as it finishes.

        Args:
            on_step: sees every lane after every denoising step. It costs reads from the device, None costs nothing.

        Raises:
            UserError: a request longer than the model's positions or the memory allow; nothing has been decoded then.
        """
        if not requests:
            return
        for request in requests:
            if self.mask_id in request.prompt_ids:
                raise UserError(f"prompt {request.id}: contains the mask token; remove it from the question")
        capacity = self._capacity(requests, settings)
        lanes = min(self.max_active, len(requests), self._lanes_that_fit(capacity + settings.block_size))
        run = _Run(self, settings, seed, lanes, capacity, on_step)
        waiting = deque(requests)
        while waiting or run.busy:
            run.refill(waiting)
            yield from run.step()
            if not waiting:
                run.shrink()

    def _capacity(self, requests: Sequence[Request], settings: DecodeSettings) -> int:
        block = settings.block_size
        longest = max(requests, key=lambda request: len(request.prompt_ids))
        capacity = -(-(len(longest.prompt_ids) + settings.max_token) // block) * block
        positions = self.model.config.max_position_embeddings
        if capacity > positions:
            raise UserError(
                f"rollout.max_token={settings.max_token}: prompt {longest.id} has {len(longest.prompt_ids)} tokens, "
                f"and the model has {positions} positions; lower rollout.max_token or leave the prompt out"
            )
        return capacity

    def _lanes_that_fit(self, slots: int) -> int:
        size = slots * Slots.bytes_per_slot(self.model.config, self.model.dtype)
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            import psutil

            free = psutil.virtual_memory().available
        lanes = int(0.8 * free) // size
        if lanes < 1:
            raise UserError(
                f"rollout.max_token: one answer's cache takes {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
                "free; lower rollout.max_token"
            )
        return lanes


class _Run:
    """One call of ``generate``: the lanes, their cache and the requests in them."""

    def __init__(
        self,
        engine: LocalEngine,
        settings: DecodeSettings,
        seed: int,
        lanes: int,
        capacity: int,
        on_step: Callable[[Step], None] | None = None,
    ):
        self.engine, self.settings, self.seed = engine, settings, seed
        self.capacity, self.on_step = capacity, on_step
        device = engine.device
        # The extra block of slots takes what nobody reads: columns of lanes that sit out a forward.
        self.cache = Slots(engine.model.config, lanes, capacity + settings.block_size, engine.model.dtype, device)
        self.lanes = Lanes.empty(lanes, capacity, engine.mask_id, device)
        self.requests: list[Request | None] = [None] * lanes
        self.began = [0.0] * lanes
        self.column = torch.arange(settings.block_size, device=device)
        self.quota = quota(settings, device)
        config, dtype = engine.model.config, engine.model.dtype
        self.rows_at_once = max(1, 2**25 // config.vocab_size)  # 128 MiB of fp32 logits
        size = lanes, settings.block_size, config.hidden_size
        self.drafts = Drafts.empty(*size, dtype, device) if settings.self_verify else None
        # Lanes with a fixed number of steps a block start their blocks together, so that one forward in `steps` is the
        # wide one that commits. With a varying number of steps there is nothing to align.
        fixed = settings.remasking_strategy in ("low_confidence_static", "sequential", "random")
        fixed = fixed and not settings.self_verify
        self.period = settings.denoising_steps_per_block if fixed else 1
        self.phase = 0
        self.key_slots = 0

    @property
    def busy(self) -> bool:
        return any(request is not None for request in self.requests)

    # -- prefill ------------------------------------------------------------------------------------------------------

    def refill(self, waiting: deque[Request]) -> None:
        """Put waiting requests into free lanes and prefill their whole prompt blocks, in one forward."""
        free = [lane for lane, request in enumerate(self.requests) if request is None][: len(waiting)]
        if not free:
            return
        state, block, device = self.lanes, self.settings.block_size, self.engine.device
        for lane in free:
            request = waiting.popleft()
            prompt = torch.tensor(request.prompt_ids, device=device)
            state.ids[lane] = self.engine.mask_id
            state.ids[lane, : len(prompt)] = prompt
            state.unmask_step[lane] = 0
            state.prompt[lane] = len(prompt)
            state.limit[lane] = len(prompt) + self.settings.max_token
            state.start[lane] = len(prompt) // block * block
            state.key[lane] = stream_key(self.seed, request.prompt, request.sample)
            self.requests[lane], self.began[lane] = request, time.perf_counter()
        lanes = torch.tensor(free, device=device)
        state.stage[lanes] = state.steps[lanes] = state.forwards[lanes] = 0
        state.active[lanes], state.commit[lanes] = True, False
        if self.drafts is not None:
            self.drafts.settled[lanes] = state.prompt[lanes]
        width = int(state.start[lanes].max())
        self.key_slots = max(self.key_slots, width + block)
        if width == 0:
            return
        position = torch.arange(width, device=device).expand(len(free), width)
        self.cache.lanes, self.cache.write, self.cache.length = lanes, position, None
        self._forward(state.ids[lanes, :width], position, cache_mask(position, width, block))
        state.forwards[lanes] += (state.start[lanes] > 0).long()

    # -- one denoising step -------------------------------------------------------------------------------------------

    def step(self) -> Iterator[Trajectory]:
        """One denoising step of every lane whose turn it is; yields the answers it finishes."""
        state = self.lanes
        turn = state.active & ((state.stage > 0) | (self.phase == 0))
        committing = turn & state.commit
        fused = self.engine.fused_commit
        if not fused and bool(committing.any()):
            self._block_forward(committing, committing & ~committing)
            state.forwards += committing.long()
            state.commit &= ~committing
        wide = committing if fused else committing & ~committing
        tokens, confidence, entropy, masked, position = self._denoise(wide, turn)
        state.commit &= ~turn
        state.forwards += turn.long()
        state.steps += turn.long()

        share = self.quota[state.stage.clamp(max=len(self.quota) - 1)]
        order = uniforms(state.key.unsqueeze(-1), position, state.steps.unsqueeze(-1), stream=1)
        unmask = choose(masked, confidence, share, self.settings, entropy, order)
        current = state.ids.gather(1, position)
        when = state.unmask_step.gather(1, position)
        state.ids.scatter_(1, position, torch.where(unmask, tokens, current))
        state.unmask_step.scatter_(1, position, torch.where(unmask, state.steps.unsqueeze(-1), when))
        state.stage += turn.long()
        complete = turn & ~(masked & ~unmask).any(-1)
        verifying = self.drafts is not None
        if self.on_step is not None:
            self._show(turn, torch.zeros_like(complete) if verifying else complete)
        if verifying:
            self.drafts.probability = torch.where(unmask, confidence, self.drafts.probability)
            complete = self._verify(complete)
        yield from self._advance(turn, complete, position)

    def _advance(self, turn: Tensor, complete: Tensor, position: Tensor) -> Iterator[Trajectory]:
        """Move lanes with a complete block on; hand out those that are through."""
        state, block = self.lanes, self.settings.block_size
        answer = (position >= state.prompt.unsqueeze(-1)) & (position < state.limit.unsqueeze(-1))
        stops = torch.isin(state.ids.gather(1, position), self.engine.stop_ids) & answer
        through = complete & (stops.any(-1) | (state.start + block >= state.limit))
        state.start += block * complete.long()
        state.stage *= (~complete).long()
        state.commit |= complete
        state.active &= ~through
        # The one read of a step: which lanes are through, whether any is inside a block, how far the cache is read.
        inside = (state.active & (state.stage > 0)).any()
        frontier = (state.start * state.active).max() + block
        *ended, inside, frontier = torch.cat([through.long(), torch.stack([inside.long(), frontier])]).tolist()
        self.phase = (self.phase + 1) % self.period if inside else 0
        self.key_slots = frontier
        for lane in (lane for lane, is_through in enumerate(ended) if is_through):
            yield self._trajectory(lane)
            self.requests[lane] = None

    def _denoise(self, wide: Tensor, turn: Tensor):
        """Forward, then draw at the masked positions of the lanes whose turn it is.

        Returns tokens, confidence, entropy (or None), masked: (lanes, block), and their positions.
        """
        state, settings, engine = self.lanes, self.settings, self.engine
        position = (state.start.unsqueeze(-1) + self.column).clamp(max=self.capacity - 1)
        masked = (state.ids.gather(1, position) == engine.mask_id) & turn.unsqueeze(-1)
        u = uniforms(state.key.unsqueeze(-1), position, state.steps.unsqueeze(-1) + 1)[masked]
        need_entropy = settings.remasking_strategy == "entropy_bounded"

        def head(hidden: Tensor, weight: Tensor):
            hidden = hidden[:, -settings.block_size :][masked]
            if self.drafts is not None:
                self.drafts.hidden[masked] = hidden
            drawn = []
            for h, u_rows in zip(hidden.split(self.rows_at_once), u.split(self.rows_at_once), strict=True):
                logits = self._logits(h, weight)
                drawn.append(draw(logits, u_rows, settings, need_entropy=need_entropy))
            return drawn

        drawn = self._block_forward(wide, turn, head)
        grids = []
        for part, dtype in zip(zip(*drawn, strict=True), (torch.long, torch.float32, torch.float32), strict=True):
            if part[0] is None:
                grids.append(None)
                continue
            grids.append(torch.zeros(masked.shape, dtype=dtype, device=masked.device))
            grids[-1][masked] = torch.cat(part).to(dtype)
        return *grids, masked, position

    def _verify(self, due: Tensor) -> Tensor:
        """Verify the blocks of the lanes ``due``, which have no mask; returns the lanes whose block is settled.

        A rejected token is replaced and what follows it masked again. Where that is a single position it needs no
        draft: a second verification settles it at once. Every verification takes a number in the count of steps, so
        that its random numbers are its own; the trajectory closes the gaps.
        """
        state, block, mask_id = self.lanes, self.settings.block_size, self.engine.mask_id
        settled = torch.zeros_like(due)
        while bool(due.any()):
            lanes = due.nonzero().flatten()
            state.steps[lanes] += 1
            state.forwards[lanes] += 1
            start, step = state.start[lanes, None], state.steps[lanes, None]
            at = lanes.unsqueeze(-1), start + self.column
            token = state.ids[at]
            column, instead = self._verify_forward(lanes, at[1], token)
            column, instead = column.unsqueeze(-1), instead.unsqueeze(-1)
            token = torch.where(self.column < column, token, mask_id)
            state.ids[at] = torch.where(self.column == column, instead, token)
            state.unmask_step[at] = torch.where(self.column == column, step, state.unmask_step[at])
            state.stage[lanes] = 0
            through = (column.squeeze(-1) + 1).clamp(max=block)
            self.drafts.settled[lanes] = state.start[lanes] + through
            settled[lanes] = through == block
            if self.on_step is not None:
                self._show(due, settled)
            due = torch.zeros_like(due)
            due[lanes] = through == block - 1
        return settled

    def _verify_forward(self, lanes: Tensor, position: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The verdict (see t3d.engines.verify) on the blocks ``token`` at ``position``, both (rows, block)."""
        state, block, mask_id = self.lanes, self.settings.block_size, self.engine.mask_id
        drafts = Drafts(*(value[lanes] for value in vars(self.drafts).values()))
        opened = position >= drafts.settled.unsqueeze(-1)
        key, step = state.key[lanes, None], state.steps[lanes, None]
        uniform, draw_uniform = (uniforms(key, position, step, stream) for stream in (2, 0))

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return verdict(
                hidden[:, block:],
                lambda rows: self._logits(rows, weight),
                token,
                opened,
                drafts,
                token != mask_id,
                uniform,
                draw_uniform,
                self.settings,
                self.rows_at_once,
            )

        self.cache.lanes, self.cache.write, self.cache.length = lanes, None, self.key_slots
        mask = verify_mask(position[:, 0], block, self.key_slots)
        ids = torch.cat([token, torch.full_like(token, mask_id)], 1)
        return self._forward(ids, torch.cat([position, position], 1), mask, head)

    def _logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """(rows, width) -> (rows, vocab) fp32, the ids that may not be drawn at -inf."""
        return (hidden @ weight.T).float().index_fill_(-1, self.engine.forbidden_ids, -torch.inf)

    def _block_forward(self, previous: Tensor, current: Tensor, head=None):
        """Forward over the previous block of some lanes and the current block of others; the rest writes nowhere.

        The columns of a lane that takes no part go to the spare slots and see block 0, so no row of the mask is empty.
        """
        state, block = self.lanes, self.settings.block_size
        parts = []
        if head is None or bool(previous.any()):
            parts.append((state.start.unsqueeze(-1) - block + self.column, previous.unsqueeze(-1)))
        if head is not None:
            parts.append((state.start.unsqueeze(-1) + self.column, current.unsqueeze(-1)))
        position = torch.cat([torch.where(takes, where, self.column) for where, takes in parts], 1)
        spare = self.capacity + self.column
        self.cache.write = torch.cat([torch.where(takes, where, spare) for where, takes in parts], 1)
        self.cache.lanes = torch.arange(len(position), device=position.device)
        self.cache.length = self.key_slots
        mask = cache_mask(position, self.key_slots, block)
        return self._forward(state.ids.gather(1, position), position, mask, head)

    def _forward(self, ids: Tensor, position: Tensor, mask: Tensor, head=None):
        """A forward that leaves its keys and values in the cache. Without ``head`` no logits are computed."""
        return self.engine.model(
            ids,
            mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            head=head or (lambda hidden, weight: None),
        )

    def _show(self, turn: Tensor, complete: Tensor) -> None:
        """Report the step just done to the observer, lane by lane."""
        state = self.lanes
        for lane in turn.nonzero().flatten().tolist():
            step, prompt, start = (int(x[lane]) for x in (state.steps, state.prompt, state.start))
            response = slice(prompt, start + self.settings.block_size)
            unmasked = (state.unmask_step[lane, response] == step).nonzero().flatten().tolist()
            ids = state.ids[lane, response].tolist()
            self.on_step(Step(self.requests[lane].id, step, ids, unmasked, bool(complete[lane])))

    # -- results ------------------------------------------------------------------------------------------------------

    def _trajectory(self, lane: int) -> Trajectory:
        state, request = self.lanes, self.requests[lane]
        prompt, end, limit = (int(x[lane]) for x in (state.prompt, state.start, state.limit))
        response = state.ids[lane, prompt:end]
        answer = response[: limit - prompt]
        unmask_step = state.unmask_step[lane, prompt:end]
        if self.drafts is not None:
            unmask_step = close_up(unmask_step)
        stops = torch.isin(answer, self.engine.stop_ids).nonzero()
        length = int(stops[0]) + 1 if len(stops) else len(answer)
        return Trajectory(
            id=request.id,
            prompt_ids=list(request.prompt_ids),
            response_ids=response.tolist(),
            unmask_step=unmask_step.tolist(),
            length=length,
            block_size=self.settings.block_size,
            finish_reason="stop" if len(stops) else "length",
            steps=int(unmask_step.max()),
            forwards=int(state.forwards[lane]),
            seconds=time.perf_counter() - self.began[lane],
            decode=asdict(self.settings),
        )

    def shrink(self) -> None:
        """With nothing left to refill, give up empty lanes once they are half of all."""
        taken = [lane for lane, request in enumerate(self.requests) if request is not None]
        if not taken or 2 * len(taken) > len(self.requests):
            return
        lanes = torch.tensor(taken, device=self.engine.device)
        self.lanes.keep(lanes)
        self.cache.keep(lanes)
        if self.drafts is not None:
            self.drafts.keep(lanes)
        self.requests = [self.requests[lane] for lane in taken]
        self.began = [self.began[lane] for lane in taken]

"""Our own decoder: block diffusion over a slotted KV cache, continuous batching, fused commits.

A lane decodes one request at a time. Lanes share every forward; a finished lane is refilled at once. The cache has one
slot per absolute position. So a single predicate (t3d.blocks.attention) covers prefill, decoding and commits. Keys that
a lane wrote beyond its current block are overwritten before a query may see them.

A finished block must enter the cache with its final tokens (a commit). With ``fused_commit`` this happens in the first
forward of the next block, on [finished block | next block]. This is exact under block-causal attention, and needs
``steps`` forwards per block instead of ``steps + 1``. With ``self_verify`` a block is finished after an extra forward
has checked it (t3d.decode.verify). With ``edit_threshold`` shown tokens may be replaced (t3d.decode.edit). With
``energy_candidates`` a step draws several times and chooses (t3d.decode.energy).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t3d.blocks.decoding import choose, quota, stream_key, uniforms
from t3d.blocks.settings import DecodeSettings
from t3d.blocks.special_ids import SpecialIds
from t3d.blocks.strategy import strategy_named
from t3d.common.errors import UserError, fault
from t3d.data.trajectory import Trajectory
from t3d.decode.attention import Kernel, choose_attention
from t3d.decode.edit import Editor
from t3d.decode.energy import Energy, candidate_uniforms
from t3d.decode.graphs import Graphs
from t3d.decode.model_facts import bytes_per_slot, full_attention, logit_shift, position_count
from t3d.decode.protocol import Request, Step, answer_end, not_finite, refuse_empty_prompts, refuse_mask_in_prompts
from t3d.decode.runner import TOKENS_PREFILLED, ModelRunner
from t3d.decode.verify import Verifier, close_up
from t3d.decode.whole import NOT_WITH_FULL_ATTENTION, WholeRunner


class LocalEngine:
    """Decodes on one device with a block-diffusion model (see ``t3d.decode.protocol.Engine``).

    Args:
        model: a BlockDiffusionLM (t3d.models.block_diffusion) in eval mode.
        mask_id: the mask token. stop_ids: ids that end an answer.
        forbidden_ids: ids that may never be drawn (the mask, ids beyond the tokenizer).
        max_active: most lanes at once; fewer are used if the cache would not fit in memory.
        fused_commit: write a finished block's cache in the next block's first forward.
        ordinary_ids: ids from which ``random_init_ratio`` draws; without them it must be 0.
        attention: the kernel that reads the cache (see ``t3d.decode.attention.choose_attention``).
        compile: run the blocks' forwards through torch.compile (t3d.decode.graphs). The model is compiled in place.
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
        ordinary_ids: Sequence[int] | Tensor = (),
        attention: str | Kernel | None = None,
        compile: bool = False,
    ):
        self.model = model
        self.attention = choose_attention(model, attention)
        self.device = model.device
        self.mask_id = mask_id
        self.stops = frozenset(stop_ids)
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=self.device)
        self.forbidden_ids = torch.tensor(sorted({mask_id, *forbidden_ids}), device=self.device)
        self.max_active = max_active
        self.fused_commit = fused_commit
        self.ordinary_ids = torch.as_tensor(ordinary_ids, dtype=torch.long).to(self.device)
        self.graphs = Graphs(model) if compile else None

    @classmethod
    def of(cls, model, ids: SpecialIds, **options: Any) -> "LocalEngine":
        """The engine of a model with these special ids. ``options``: max_active, fused_commit, attention, compile."""
        return cls(
            model,
            mask_id=ids.mask_id,
            stop_ids=ids.stop_ids,
            forbidden_ids=ids.forbidden_ids,
            ordinary_ids=ids.ordinary_ids,
            **options,
        )

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        settings: DecodeSettings,
        seed: int,
        on_step: Callable[[Step], None] | None = None,
    ) -> Iterator[Trajectory]:
        """Yield one trajectory per request when it is finished.

        Args:
            on_step: gets every lane after every denoising step. It costs reads from the device; None costs nothing.

        Raises:
            UserError: a request longer than the model's positions or the memory allow, or no compiler for ``compile``;
                nothing has been decoded then. NaN or infinite logits; the trajectories yielded before are valid.
        """
        if not requests:
            return
        if settings.random_init_ratio and not len(self.ordinary_ids):
            raise fault("random_init_ratio", settings.random_init_ratio, "not supported here; leave it at 0")
        refuse_mask_in_prompts(requests, self.mask_id)
        if logit_shift(self.model.config):
            refuse_empty_prompts(requests)
        capacity = self._capacity(requests, settings)
        if full_attention(self.model.config):
            refuse_block_causal(settings)
            room = max(1, TOKENS_PREFILLED // capacity)
        else:
            room = self._lanes_that_fit(capacity + settings.block_size)
        lanes = min(self.max_active, len(requests), room)
        run = Run(self, settings, seed, lanes, capacity, on_step)
        waiting = deque(requests)
        while waiting or run.busy:
            yield from self._until_finished(run, waiting)

    def _until_finished(self, run: "Run", waiting: deque[Request]) -> list[Trajectory]:
        """Decode until an answer is finished. The model has its own attention between answers."""
        with self.attention.of(self.model):
            while waiting or run.busy:
                run.refill(waiting)
                finished = list(run.step())
                if not waiting:
                    run.shrink()
                if finished:
                    return finished
        return []

    def _capacity(self, requests: Sequence[Request], settings: DecodeSettings) -> int:
        block = settings.block_size
        longest = max(requests, key=lambda request: len(request.prompt_ids))
        capacity = -(-(len(longest.prompt_ids) + settings.max_token) // block) * block
        room = position_count(self.model.config)
        if capacity > room:
            raise fault(
                "rollout.max_token",
                settings.max_token,
                f"prompt {longest.id} has {len(longest.prompt_ids)} tokens, "
                f"and the model has {room} positions; lower rollout.max_token or leave the prompt out",
            )
        return capacity

    def _lanes_that_fit(self, slots: int) -> int:
        size = slots * bytes_per_slot(self.model.config, self.model.dtype)
        if self.device.type == "cuda":
            # memory that PyTorch's allocator holds and does not use is free too
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + unused
        else:
            import psutil

            free = psutil.virtual_memory().available
        lanes = int(0.8 * free) // size
        if lanes < 1:
            raise UserError(
                f"rollout.max_token: one answer's cache takes {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
                "free; lower rollout.max_token",
                "rollout.max_token",
            )
        return lanes


def refuse_block_causal(settings: DecodeSettings) -> None:
    """Raises UserError for a setting that full attention does not support."""
    for name, remedy in NOT_WITH_FULL_ATTENTION.items():
        if (value := getattr(settings, name)) != getattr(DecodeSettings, name):
            raise fault(f"rollout.{name}", value, remedy)


@dataclass
class Ahead:
    """The host's counts for the next step, so that the step need not read them from the device.

    Attributes:
        inside: places to read (see ``Run._read``) in the blocks of lanes that are inside a block.
        fresh: places to read in the blocks of lanes that are about to begin one.
        commits: lanes whose last block is not in the cache yet.
    """

    inside: int = 0
    fresh: int = 0
    commits: int = 0


class Drawn(NamedTuple):
    """A forward's proposals for the current blocks: (lanes, block) each, meaningless at unmasked positions.

    entropy: None unless the strategy needs it. masked: the masks of the lanes whose turn it is. position: absolute.
    NaN or infinite logits leave a confidence that is NaN.
    """

    tokens: Tensor
    confidence: Tensor
    entropy: Tensor | None
    masked: Tensor
    position: Tensor


def places(masked: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows and columns of the ``count`` Trues of a matrix, row by row. nonzero() would wait for ``count``."""
    if masked.device.type == "cpu":  # on CUDA it needs torch 2.7
        row, column = masked.nonzero_static(size=count).unbind(1)
        return row, column
    first = masked.flatten().byte().argsort(descending=True, stable=True)[:count]
    return first // masked.shape[1], first % masked.shape[1]


class Run:
    """One call of ``generate``: the assignment of requests to lanes, and the denoising steps.

    Attributes:
        requests: of each lane; None = it is free.
        period, phase: lanes begin their blocks together every ``period`` steps; phase 0 begins them.
        whole: all lanes are in whole blocks since phase 0, so the host knows the masks that are left.
        uniforms: (lanes, steps, block) of the present blocks, where lanes begin them together.
        seen: confidences, and the lanes' steps before, of the steps since the last read.
        blocks: the positions of the current blocks and the tokens there, (lanes, block) each; None = not read yet.
    """

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
        self.record = asdict(settings)
        self.capacity, self.on_step = capacity, on_step
        kind = WholeRunner if full_attention(engine.model.config) else ModelRunner
        self.runner = kind(
            engine.model,
            settings,
            lanes,
            capacity,
            mask_id=engine.mask_id,
            forbidden_ids=engine.forbidden_ids,
            ordinary_ids=engine.ordinary_ids,
            attention=engine.attention,
            compiled=engine.graphs,
        )
        self.lanes = self.runner.lanes
        self.requests: list[Request | None] = [None] * lanes
        self.began = [0.0] * lanes
        self.strategy = strategy_named(settings.remasking_strategy)
        self.verifier = Verifier(self.runner, self.show if on_step else None) if settings.self_verify else None
        self.energy = Energy(self.runner) if settings.energy_candidates > 1 else None
        # Lanes with a fixed number of steps per block start their blocks together. So only one forward in `steps` is
        # wide and commits. With a varying number of steps there is nothing to align.
        self.editor = Editor(self.runner) if settings.edit_threshold < 1 else None
        fixed = self.strategy.fixed_steps and not settings.self_verify and self.editor is None
        self.period = settings.denoising_steps_per_block if fixed else 1
        self.phase = 0
        self.ahead = Ahead()
        # Masks of a whole block that are left after each step, where the strategy fixes them.
        self.left = (settings.block_size - quota(settings).cumsum(0)).tolist() if fixed and self.strategy.even else []
        self.whole = False
        self.uniforms: Tensor | None = None
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.blocks: tuple[Tensor, Tensor] | None = None

    @property
    def busy(self) -> bool:
        return any(request is not None for request in self.requests)

    # -- prefill ------------------------------------------------------------------------------------------------------

    def refill(self, waiting: deque[Request]) -> None:
        """Put waiting requests into free lanes and prefill their whole prompt blocks.

        Requests with the same prompt share it: the prompt is computed in one lane and copied to the others.
        """
        free = [lane for lane, request in enumerate(self.requests) if request is None][: len(waiting)]
        if not free:
            return
        state, block, device = self.lanes, self.settings.block_size, self.engine.device
        ids = torch.full((len(free), self.capacity), self.engine.mask_id)
        count, key = torch.zeros(2, len(free), dtype=torch.long)
        computed: dict[tuple[int, ...], int] = {}  # prompt -> the lane that computes it
        source = []
        for row, lane in enumerate(free):
            request = waiting.popleft()
            self.requests[lane], self.began[lane] = request, time.perf_counter()
            count[row] = len(request.prompt_ids)
            ids[row, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids, dtype=torch.long)
            key[row] = stream_key(self.seed, request.prompt, request.sample)
            source.append(computed.setdefault(request.prompt_ids, lane))
        start = count // block * block
        self.blocks = None
        width = int(start.max())
        self.runner.key_slots = max(self.runner.key_slots, width + block)
        self.ahead.fresh += int((start + block - count).sum())

        lanes = torch.tensor(free, device=device)
        state.ids[lanes] = ids.to(device)
        state.unmask_step[lanes] = 0
        state.prompt[lanes], state.limit[lanes] = count.to(device), (count + self.settings.max_token).to(device)
        state.start[lanes], state.key[lanes] = start.to(device), key.to(device)
        state.stage[lanes] = state.steps[lanes] = 0
        state.forwards[lanes] = ((start > 0) & self.runner.cached).long().to(device)
        state.active[lanes], state.commit[lanes] = True, False
        if self.verifier is not None:
            self.verifier.drafts.settled[lanes] = state.prompt[lanes]
        if not self.runner.cached:
            return
        self._prefill({lane: int(start[row]) for row, lane in enumerate(free) if source[row] == lane})
        if width and len(computed) < len(free):
            computed_in = torch.tensor(source, device=device)
            self.runner.cache.copy(computed_in, lanes, width)
            state.before[lanes] = state.before[computed_in]

    def _prefill(self, width_of: dict[int, int]) -> None:
        """Fill the cache of lanes to their widths: equal widths together, a bounded number of tokens at a time."""
        waiting = sorted((lane for lane, width in width_of.items() if width), key=width_of.__getitem__, reverse=True)
        while waiting:
            width = width_of[waiting[0]]
            rows = max(1, TOKENS_PREFILLED // width)
            self.runner.prefill(torch.tensor(waiting[:rows], device=self.engine.device), width)
            waiting = waiting[rows:]

    # -- one denoising step -------------------------------------------------------------------------------------------

    def step(self) -> Iterator[Trajectory]:
        """One denoising step of every lane whose turn it is; yields the finished answers.

        The host reads from the device only once, in ``_advance``. That read gives the shapes of the next step. Where it
        knows them, because all lanes are inside whole blocks of a fixed number of steps, it does not read. Further
        reads come from a nucleus (top_p < 1 without top_k, see ``filter_logits``), finished answers, an observer,
        self-verification, editing and an energy.
        """
        turn, committing = self._schedule()
        drawn = self._denoise(committing, turn)
        complete = self._unmask(turn, drawn)
        if self.whole and self.left[self.phase] > 0:  # no lane can be through, so nothing has to be read
            self.ahead = Ahead(inside=self.left[self.phase] * self.taken)
            self.phase += 1
            return
        yield from self._hand_out(self._advance(complete, drawn))

    @property
    def taken(self) -> int:
        """The number of lanes with a request."""
        return len(self.requests) - self.requests.count(None)

    def _schedule(self) -> tuple[Tensor, Tensor | None]:
        """(lanes,) bool each: the lanes whose turn it is, and the lanes to commit in the next forward (None = none)."""
        state = self.lanes
        turn = state.active & (state.stage > 0) if self.phase else state.active.clone()
        # A lane with a block to commit is between blocks, and blocks begin at phase 0.
        if self.phase or not self.ahead.commits or not self.runner.cached:
            return turn, None
        committing = turn & state.commit
        if self.engine.fused_commit:
            return turn, committing
        self.runner.block_forward(committing, None)
        state.forwards += committing.long()
        return turn, None

    def _denoise(self, wide: Tensor | None, turn: Tensor) -> Drawn:
        """Forward, then draw at the masked positions of the lanes whose turn it is."""
        runner, verifier = self.runner, self.verifier
        read, position = self._read(turn)
        masked = read if self.editor is None else self._masks(turn.unsqueeze(-1))
        rows = self.ahead.inside + (0 if self.phase else self.ahead.fresh)
        if not self.phase:
            self.whole = bool(self.left) and rows == self.taken * self.settings.block_size
        lane, column = places(read, rows)
        u = self._uniforms(lane, column, position)

        def head(hidden: Tensor, weight: Tensor):
            hidden = hidden[lane, column]
            if verifier is not None:
                verifier.drafts.hidden[lane, column] = hidden
            if self.editor is not None:
                self.editor.look(hidden, weight, (lane, column), masked.shape)
            return runner.draw(hidden, weight, u, need_entropy=self.strategy.needs_entropy)

        def grid(values: Tensor) -> Tensor:
            filled = torch.zeros(masked.shape + values.shape[1:], dtype=values.dtype, device=values.device)
            filled[lane, column] = values
            return filled

        again = self.whole and self.phase > 1 and self.energy is None  # an energy has forwards of its own between
        token, certain, entropy = runner.block_forward(wide, turn, head, again)
        tokens, confidence = grid(token), grid(certain)
        if self.energy is not None:
            tokens, confidence = self.energy.choose(tokens, confidence, masked, turn)
        self.seen.append((confidence, self.lanes.steps))
        return Drawn(tokens, confidence, None if entropy is None else grid(entropy), masked, position)

    def _uniforms(self, lane: Tensor, column: Tensor, position: Tensor) -> Tensor:
        """The random numbers of a step at the places (lane, column), (rows,) or (rows, candidates).

        Lanes that begin their blocks together get the numbers of all steps of the block at once.
        """
        state = self.lanes
        if self.settings.temperature == 0 and not self.energy:
            return torch.zeros(len(lane), device=lane.device)  # nothing reads them
        if self.energy or self.period == 1:
            stream = state.key[lane], position[lane, column], state.steps[lane] + 1
            return candidate_uniforms(*stream, self.energy.candidates) if self.energy else uniforms(*stream)
        if not self.phase or self.uniforms is None:
            step = torch.arange(1 - self.phase, self.period + 1 - self.phase, device=lane.device)
            of_steps = state.steps.unsqueeze(-1) + step
            self.uniforms = uniforms(state.key[:, None, None], position.unsqueeze(1), of_steps.unsqueeze(-1))
        return self.uniforms[lane, self.phase, column]

    def _unmask(self, turn: Tensor, drawn: Drawn) -> Tensor:
        """Write drawn tokens at the strategy's positions; (lanes,) bool, the lanes whose block is complete."""
        state, (tokens, confidence, entropy, masked, position) = self.lanes, drawn
        state.commit &= ~turn
        state.forwards += turn
        state.steps = state.steps + turn  # `seen` keeps the numbers before
        if self.whole and self.left[self.phase] <= 0:
            unmask = masked
        else:
            at = {"key": state.key, "position": position, "step": state.steps, "stage": state.stage}
            unmask = choose(masked, confidence, entropy, self.settings, **at)
        when = state.unmask_step.gather(1, position)
        state.ids.scatter_(1, position, torch.where(unmask, tokens, self._blocks()[1]))
        state.unmask_step.scatter_(1, position, torch.where(unmask, state.steps.unsqueeze(-1), when))
        self.blocks = position, state.ids.gather(1, position)
        state.stage += turn
        complete = turn & ~(masked & ~unmask).any(-1)
        if self.editor is not None:
            edited = self.editor.edit(self._read(turn)[0] & ~masked, position)
            changed, confidence = unmask | edited, torch.where(edited, self.editor.certainty, confidence)
            complete = self.editor.settle(complete, changed)
        if self.on_step is not None:
            self.show(turn, torch.zeros_like(complete) if self.verifier else complete, confidence)
        return complete if self.verifier is None else self.verifier.settle(complete, unmask, confidence)

    def _read(self, turn: Tensor) -> tuple[Tensor, Tensor]:
        """(lanes, block) each: the places in the current blocks of the lanes ``turn`` where a step reads the model, and
        the blocks' positions. These are the masks, and with editing all tokens of the answer.
        """
        position, ids = self._blocks()
        if self.editor is not None:
            return (position >= self.lanes.prompt.unsqueeze(-1)) & turn.unsqueeze(-1), position
        return (ids == self.engine.mask_id) & turn.unsqueeze(-1), position

    def _masks(self, among: Tensor) -> Tensor:
        """(lanes, block) bool: the masks at the places ``among`` of the current blocks."""
        return (self._blocks()[1] == self.engine.mask_id) & among

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """(lanes, block) each: the positions of the current blocks, and the tokens there."""
        if self.blocks is None:
            state = self.lanes
            position = (state.start.unsqueeze(-1) + self.runner.column).clamp(max=self.capacity - 1)
            self.blocks = position, state.ids.gather(1, position)
        return self.blocks

    def _advance(self, complete: Tensor, drawn: Drawn) -> list[int]:
        """Move lanes with a complete block to the next; returns the lanes with a finished answer."""
        state, block, position = self.lanes, self.settings.block_size, drawn.position
        answer = (position >= state.prompt.unsqueeze(-1)) & (position < state.limit.unsqueeze(-1))
        is_stop = (state.ids.gather(1, position).unsqueeze(-1) == self.engine.stop_ids).any(-1)
        through = complete & ((is_stop & answer).any(-1) | (state.start + block >= state.limit))
        state.start += block * complete
        state.stage *= ~complete
        state.commit |= complete
        state.active &= ~through
        self.blocks = None
        broken = torch.stack([confidence for confidence, _ in self.seen]).isnan().any()
        # The only read of a step: the finished lanes, the cache length to read, and the counts for the next step.
        rows = self._read(state.active)[0].sum(-1)
        inside = (rows * (state.stage > 0)).sum()
        frontier = (state.start * state.active).max()
        commits = (state.active & state.commit).sum()
        read = torch.cat([through.long(), torch.stack([frontier, inside, rows.sum(), commits, broken])])
        *ended, frontier, inside, count, commits, broken = read.tolist()
        if broken:
            raise not_finite(self.engine.model.name_or_path or "in memory", self._broken_step())
        self.seen.clear()
        self.ahead = Ahead(inside, count - inside, commits)
        self.phase = (self.phase + 1) % self.period if inside else 0
        self.runner.key_slots = frontier + block
        return [lane for lane, is_through in enumerate(ended) if is_through]

    def _broken_step(self) -> int:
        """The latest answer's step among the first steps with NaN or infinite logits since the last read."""
        found = (steps[confidence.isnan().any(-1)] for confidence, steps in self.seen)
        return next(1 + int(steps.max()) for steps in found if steps.numel())

    # -- results ------------------------------------------------------------------------------------------------------

    def show(self, turn: Tensor, complete: Tensor, confidence: Tensor | None = None) -> None:
        """Report the last step to the observer, lane by lane. ``confidence``: (lanes, block), of the drawn tokens."""
        state = self.lanes
        for lane in turn.nonzero().flatten().tolist():
            step, prompt, start = (int(x[lane]) for x in (state.steps, state.prompt, state.start))
            response = slice(prompt, start + self.settings.block_size)
            unmasked = (state.unmask_step[lane, response] == step).nonzero().flatten().tolist()
            ids = state.ids[lane, response].tolist()
            known = [] if confidence is None else confidence[lane].tolist()
            certain = [known[prompt + i - start] for i in unmasked] if known else []
            request = self.requests[lane]
            assert self.on_step is not None and request is not None
            forwards = int(state.forwards[lane])
            self.on_step(Step(request.id, step, ids, unmasked, bool(complete[lane]), certain, forwards))

    def _hand_out(self, lanes: list[int]) -> Iterator[Trajectory]:
        """The trajectories of these lanes. The lanes are free afterwards."""
        if not lanes:
            return
        state, at = self.lanes, torch.tensor(lanes, device=self.engine.device)
        counts = torch.stack([state.start[at], state.forwards[at], state.steps[at]], 1)
        table = torch.cat([counts, state.ids[at], state.unmask_step[at]], 1).tolist()
        for lane, (end, forwards, steps, *tokens) in zip(lanes, table, strict=True):
            request, self.requests[lane] = self.requests[lane], None
            assert request is not None
            prompt = len(request.prompt_ids)
            response, unmask_step = tokens[prompt:end], tokens[self.capacity :][prompt:end]
            if self.verifier is not None:
                unmask_step = close_up(unmask_step)
            initial = []
            if self.settings.random_init_ratio:
                place = torch.arange(prompt, end, device=self.engine.device)
                initial = self.runner.initial(state.key[lane], place).tolist()
            length, finish_reason = answer_end(response, self.settings.max_token, self.engine.stops)
            yield Trajectory(
                id=request.id,
                prompt_ids=list(request.prompt_ids),
                response_ids=response,
                unmask_step=unmask_step,
                length=length,
                block_size=self.settings.block_size,
                finish_reason=finish_reason,
                initial_ids=initial,
                edits=self.editor.take(lane, prompt) if self.editor else [],
                steps=steps if self.editor else max(unmask_step),
                forwards=forwards,
                seconds=time.perf_counter() - self.began[lane],
                decode=dict(self.record),
            )

    def shrink(self) -> None:
        """Without waiting requests, drop empty lanes once half of all are empty. A compiled run keeps its lanes."""
        taken = [lane for lane, request in enumerate(self.requests) if request is not None]
        if not taken or 2 * len(taken) > len(self.requests) or self.engine.graphs:
            return
        lanes = torch.tensor(taken, device=self.engine.device)
        self.blocks = self.uniforms = None
        for part in (self.lanes, self.runner.cache, self.verifier.drafts if self.verifier else None, self.editor):
            if part is not None:
                part.keep(lanes)
        self.requests = [self.requests[lane] for lane in taken]
        self.began = [self.began[lane] for lane in taken]

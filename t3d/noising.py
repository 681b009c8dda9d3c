"""Training states: a clean sequence becomes (x_0, x_t), and several of them a batch in the training layout.

The grid is absolute: block b covers positions [bB, (b+1)B) of prompt + response, in training and decoding alike.
The layout is [clean | noisy]: the noisy copy holds the blocks with response tokens; of the clean copy the last block is
left out, as no one sees it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from t3d.attention import FLEX_TILE, Labels, dense_mask, flex_mask


def generator_for(seed: int, epoch: int, sample_id: str) -> torch.Generator:
    """The random numbers of one sample in one epoch: a pure function of (seed, epoch, id)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{sample_id}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass
class Grid:
    """Where the blocks of one sequence lie.

    Attributes:
        block: (whole blocks,) block index of every position, to the end of the last block.
        rows: (blocks, width) positions of the blocks that hold response tokens, -1 where the block has none there.
        start: first position of the noisy copy.
    """

    block: Tensor
    rows: Tensor
    start: int


def absolute_grid(prompt_length: int, length: int, block_size: int) -> Grid:
    """Block = position // B, counted over the unpadded sequence, prompt included (DESIGN: the block grid)."""
    return _grid(prompt_length, length, block_size, shift=0)


def response_grid(prompt_length: int, length: int, block_size: int) -> Grid:
    """The release's training grid: blocks counted from the prompt's end, forwards and backwards.

    What does not fill a block lies at the sequence's start: the prompt is as block-causal as the response.
    """
    return _grid(prompt_length, length, block_size, shift=-prompt_length % block_size)


def _grid(prompt_length: int, length: int, block_size: int, shift: int) -> Grid:
    """Block = (position + shift) // B, to the end of the last block."""
    block = (torch.arange(length + -(length + shift) % block_size) + shift) // block_size
    first = int(block[prompt_length])
    position = torch.arange(prompt_length, length)
    starts = torch.searchsorted(block, torch.arange(first, int(block[-1]) + 1))
    rows = torch.full((len(starts), block_size), -1)
    rows[block[position] - first, position - starts[block[position] - first]] = position
    return Grid(block, rows, int(starts[0]))


def clean_sequence(sample: dict, block_size: int, mask_id: int, from_response: bool = False) -> tuple[Tensor, Grid]:
    """x_0 of a trajectory and its grid. A training block may reach beyond the response; what lies there is the mask."""
    prompt = len(sample["prompt_ids"])
    ids = torch.tensor(list(sample["prompt_ids"]) + list(sample["response_ids"]))
    grid = (response_grid if from_response else absolute_grid)(prompt, len(ids), block_size)
    return torch.nn.functional.pad(ids, (0, len(grid.block) - len(ids)), value=mask_id), grid


def target_sequence(sample: dict, ids: Tensor) -> Tensor:
    """x_0 at each position of the clean sequence ``ids``: what is there, or the sample's ``target_ids``.

    A sample with these is a student's answer of which a teacher has completed every block anew, given the earlier ones
    as the student wrote them. The answer stays what later blocks see; a block's state and targets are the teacher's.
    """
    x0 = ids.clone()
    if target := sample.get("target_ids"):
        prompt = len(sample["prompt_ids"])
        x0[prompt : prompt + len(target)] = torch.tensor(target)
    return x0


def learnt(sample: dict, grid: Grid, x0: Tensor, post_num: int, stop_ids: Sequence[int]) -> Tensor:
    """(length,) bool: the positions that the loss may look at, to ``post_num`` behind the answer's end.

    With ``target_ids`` no end but a block's own counts: the first stop id among its targets. What the student wrote in
    that block is not learnt, its end no more than the rest; and there is no block behind the one in which it ended.
    """
    within = torch.zeros(len(grid.block), dtype=torch.bool)
    if sample.get("target_ids"):
        present = grid.rows >= 0
        stop = torch.isin(x0[grid.rows.clamp(min=0)], torch.tensor(stop_ids, dtype=torch.long)) & present
        behind = present & (stop.cumsum(-1) > stop.long())
        within[grid.rows[present & (behind.cumsum(-1) <= post_num)]] = True
    else:
        prompt = len(sample["prompt_ids"])
        within[prompt : prompt + min(len(sample["response_ids"]), sample["length"] + post_num)] = True
    return within


@dataclass
class State:
    """One training state of one sequence. Tensors are on the CPU.

    Attributes:
        ids: (length,) the clean copy, prompt included, filled to the end of the last block: what later blocks see.
        block: (length,) block of each position.
        start: first position of the noisy copy.
        noisy: (length - start,) x_t over the noisy blocks.
        position: (targets,) absolute positions the loss looks at, ascending.
        targets: (targets,) x_0 there; the clean copy's own tokens but where a teacher has others (target_sequence).
        masked: (targets,) bool, whether x_t hides the target.
        weight: (targets,) the objective's weight of each target.
        rank: (targets,) the target's rank in its block's decode order, 1-based; 0 where it has none.
        u: (targets,) uniforms for what an objective draws there.
        sample_id: the sample it is a state of; the trainer sets it, to name it when something is wrong.
    """

    ids: Tensor
    block: Tensor
    start: int
    noisy: Tensor
    position: Tensor
    targets: Tensor
    masked: Tensor
    weight: Tensor
    rank: Tensor
    u: Tensor
    sample_id: str = ""

    def __len__(self) -> int:
        """Tokens the forward pays for."""
        return self.clean_length + len(self.noisy)

    @property
    def clean_length(self) -> int:
        return int(torch.searchsorted(self.block, self.block[-1]))


PER_TARGET = ("targets", "masked", "weight", "rank", "u")


@dataclass
class Batch:
    """States in the training layout. N targets over S sequences.

    Attributes:
        input_ids, position_ids: (rows, length).
        attention_mask: (rows, 1, length, length) bool or a BlockMask.
        loss_index: (N,) places of the targets in the flattened (rows x length) hidden states.
        targets, masked, weight, rank, u: (N,) from the states.
        masked_index: (M,) where ``masked`` holds: an index made on the CPU, so that a GPU need not be waited for.
        sequence: (N,) which sequence, 0..S-1; ascending.
        block: (N,) the target's block on its sequence's grid.
        sequences: S.
        tokens: real tokens in the layout (no padding).
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: object
    loss_index: Tensor
    targets: Tensor
    masked: Tensor
    masked_index: Tensor
    weight: Tensor
    rank: Tensor
    u: Tensor
    sequence: Tensor
    block: Tensor
    sequences: int
    tokens: int

    def __len__(self) -> int:
        return len(self.targets)


def collate(rows: Sequence[Sequence[State]], pad_id: int, *, flex: bool = False, device="cpu") -> Batch:
    """Lay states out in rows; states that share a row are packed, each a segment of its own.

    Args:
        rows: a micro-batch; each row is a list of states laid one after another.
        flex: build a FlexAttention block mask in place of the dense one, over whole tiles of its kernel.
    """
    length = max(sum(len(state) for state in row) for row in rows)
    if flex:
        length = -(-length // FLEX_TILE) * FLEX_TILE
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_id)
    position_ids = torch.zeros(shape, dtype=torch.long)
    # Padding is noisy blocks of one token: each sees itself only, and whole tiles of it cost next to nothing.
    noisy = torch.ones(shape, dtype=torch.bool)
    labels = Labels(torch.full(shape, -1), torch.arange(length).repeat(len(rows), 1), noisy)
    index, sequence, block, states = [], [], [], []
    for r, row in enumerate(rows):
        at = 0
        for segment, state in enumerate(row):
            clean, noisy = state.clean_length, len(state.noisy)
            here = slice(at, at + clean + noisy)
            position = torch.cat([torch.arange(clean), torch.arange(state.start, state.start + noisy)])
            input_ids[r, here] = torch.cat([state.ids[:clean], state.noisy])
            position_ids[r, here] = position
            labels.segment[r, here] = segment
            labels.block[r, here] = state.block[position]
            labels.noisy[r, at : at + clean] = False
            index.append(r * length + at + clean + state.position - state.start)
            block.append(state.block[state.position])
            sequence.append(torch.full_like(state.position, len(states)))
            states.append(state)
            at = here.stop
    place = partial(_place, device=torch.device(device))
    labels = Labels(*map(place, labels))
    per_target = {name: torch.cat([vars(state)[name] for state in states]) for name in PER_TARGET}
    return Batch(
        input_ids=place(input_ids),
        position_ids=place(position_ids),
        attention_mask=flex_mask(labels) if flex else dense_mask(labels),
        loss_index=place(torch.cat(index)),
        masked_index=place(per_target["masked"].nonzero().squeeze(-1)),
        **{name: place(value) for name, value in per_target.items()},
        sequence=place(torch.cat(sequence)),
        block=place(torch.cat(block)),
        sequences=len(states),
        tokens=sum(map(len, states)),
    )


def _place(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what a GPU is doing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# States of a trajectory (T3D)


def decode_order(unmask_step: Tensor, present: Tensor) -> Tensor:
    """Rank of each token in its block's decode order: by unmask step, ties by position; 1-based.

    Args:
        unmask_step: (blocks, width); present: (blocks, width) bool, where the block holds a response token.

    Returns:
        (blocks, width) ranks 1..n, 0 where not present.
    """
    last = torch.iinfo(unmask_step.dtype).max
    order = unmask_step.masked_fill(~present, last).argsort(dim=-1, stable=True)
    return (order.argsort(-1) + 1) * present


def masked_count(unmask_step: Tensor, present: Tensor, ratio: float) -> Tensor:
    """How many tokens of each block a state of the given mask ratio hides.

    A state of the trajectory lies on a boundary of the decode order: all tokens of a step appear together. Of the
    boundaries with something masked, the one nearest to ratio x (response tokens of the block) is taken; a tie masks
    more.

    Returns:
        (blocks,) counts, at least 1.
    """
    # later[i] = tokens decoded at token i's step or later = the number masked just before that step.
    later = ((unmask_step.unsqueeze(-2) >= unmask_step.unsqueeze(-1)) & present.unsqueeze(-2)).sum(-1)
    wanted = ratio * present.sum(-1, keepdim=True)
    distance = (later - wanted.double()).abs() - 1e-6 * later  # the small term breaks ties towards more masks
    best = distance.masked_fill(~present, torch.inf).argmin(-1, keepdim=True)
    return later.gather(-1, best).squeeze(-1)


@dataclass
class TrajectoryNoise:
    """How (x_0, x_t) is drawn from a trajectory (DESIGN: training states).

    Attributes:
        block_size: the student's block B.
        mask_ratios: one is drawn per sequence with probability proportional to ratio ** exponent.
        random_ratio: each masked position is shown as a uniform ordinary token, in place of the mask, with this
            probability, and still counts.
        post_num: positions after the answer's end that stay in the loss.
        reversed_trace: hide what was decoded first (the release's quirk) instead of what was decoded last.
        random_trace: mask positions at random instead of along the trajectory (``mask_strategy: random``).
        from_response: count blocks from the prompt's end (the release's quirk).
        every_target: the loss looks at every response token, masked or not (the release's path loss does).
        stop_ids: where the targets of a sample with ``target_ids`` end.
    """

    block_size: int
    mask_id: int
    ordinary_ids: Tensor
    mask_ratios: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    mask_ratio_exponent: float = 8.0
    random_ratio: float = 0.1
    post_num: int = 2
    reversed_trace: bool = False
    random_trace: bool = False
    from_response: bool = False
    every_target: bool = False
    stop_ids: tuple[int, ...] = ()

    def __call__(self, sample: dict, generator: torch.Generator) -> State:
        """Draw a state of ``sample`` (prompt_ids, response_ids, unmask_step, length; target_ids and target_step of a
        student's answer with a teacher's targets, whose tokens and decode order a state then has).

        A training block larger than the rollout's may reach beyond the response; what lies there stays masked, as it is
        when the student decodes that block, and is no target.
        """
        ids, grid = clean_sequence(sample, self.block_size, self.mask_id, self.from_response)
        x0 = target_sequence(sample, ids)
        present = grid.rows >= 0
        step = torch.zeros_like(grid.rows)
        unmask_step = torch.tensor(sample.get("target_step") or sample["unmask_step"])
        step[present] = unmask_step[grid.rows[present] - len(sample["prompt_ids"])]
        rank = decode_order(step, present)

        hidden_first = step
        if self.random_trace:
            hidden_first = torch.rand(step.shape, generator=generator).argsort(-1)
        elif self.reversed_trace:
            hidden_first = -step
        count = masked_count(hidden_first, present, self._ratio(generator))
        revealed = present.sum(-1) - count
        masked = present & (decode_order(hidden_first, present) > revealed.unsqueeze(-1))

        hidden = grid.rows[masked].sort().values
        noisy = x0[grid.start :].clone()
        scrambled = torch.rand(len(hidden), generator=generator) < self.random_ratio
        lottery = torch.randint(len(self.ordinary_ids), (len(hidden),), generator=generator)
        noisy[hidden - grid.start] = torch.where(scrambled, self.ordinary_ids[lottery], self.mask_id)

        rank_of = torch.zeros(len(ids), dtype=torch.long)
        rank_of[grid.rows[present]] = rank[present]
        if self.every_target:  # the release's path loss stops where the answer ends; DDO goes on to post_num
            rank_of[~learnt(sample, grid, x0, 0, self.stop_ids)] = 0
        is_masked = torch.zeros(len(ids), dtype=torch.bool)
        is_masked[hidden] = True
        looked_at = learnt(sample, grid, x0, self.post_num, self.stop_ids)
        position = (looked_at if self.every_target else looked_at & is_masked).nonzero().squeeze(-1)
        return State(
            ids=ids,
            block=grid.block,
            start=grid.start,
            noisy=noisy,
            position=position,
            targets=x0[position],
            masked=is_masked[position],
            weight=torch.ones(len(position)),
            rank=rank_of[position],
            u=torch.rand(len(position), generator=generator),
        )

    def _ratio(self, generator: torch.Generator) -> float:
        ratios = torch.tensor(self.mask_ratios)
        chance = (ratios / ratios.max()) ** self.mask_ratio_exponent
        return float(ratios[torch.multinomial(chance, 1, generator=generator)])


def state_without_order(
    ids: Tensor,
    grid: Grid,
    noisy: Tensor,
    position: Tensor,
    *,
    targets: Tensor | None = None,
    weight: Tensor | None = None,
    masked: Tensor | None = None,
) -> State:
    """A state whose targets have no rank in a decode order. Unless said otherwise they are the clean copy's own
    tokens, weigh 1 and are masked."""
    return State(
        ids=ids,
        block=grid.block,
        start=grid.start,
        noisy=noisy,
        position=position,
        targets=ids[position] if targets is None else targets,
        masked=torch.ones(len(position), dtype=torch.bool) if masked is None else masked,
        weight=torch.ones(len(position)) if weight is None else weight,
        rank=torch.zeros_like(position),
        u=torch.zeros(len(position)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# States without the trajectory's order (dParallel)


@dataclass
class RandomMaskNoise:
    """Every token of the answer is masked with probability ``mask_ratio``, and all that comes after it.

    The loss looks at every token of the answer, masked or not: an objective may make the complement of the masks its
    second pass. At least one token is masked.

    Attributes: as of TrajectoryNoise, whose targets of a teacher may be here as well.
    """

    block_size: int
    mask_id: int
    mask_ratio: float = 0.5
    post_num: int = 2
    stop_ids: tuple[int, ...] = ()

    def __call__(self, sample: dict, generator: torch.Generator) -> State:
        ids, grid = clean_sequence(sample, self.block_size, self.mask_id)
        x0 = target_sequence(sample, ids)
        looked_at = learnt(sample, grid, x0, self.post_num, self.stop_ids)
        position = looked_at.nonzero().squeeze(-1)
        masked = torch.rand(len(position), generator=generator) < self.mask_ratio
        if not masked.any():
            masked = ~masked
        shown = torch.zeros_like(looked_at)
        shown[: len(sample["prompt_ids"])] = True
        shown[position[~masked]] = True
        noisy = torch.where(shown, x0, self.mask_id)[grid.start :]
        return state_without_order(ids, grid, noisy, position, targets=x0[position], masked=masked)


# ---------------------------------------------------------------------------------------------------------------------
# States of the block-diffusion NELBO (SFT), and of rectified couplings (ReDi)


@dataclass
class BlockDiffusionNoise:
    """q(z_t | x): every response token of a block is masked with probability t, t ~ U(t_min, t_max).

    Source: MDLM (arXiv 2406.07524, eq. 10), BD3-LM (arXiv 2503.09573, eq. 7) with the log-linear schedule: mask
    probability t, weight 1/t; clipped schedules (BD3-LM, section 5) narrow [t_min, t_max].

    Attributes:
        per_block: one t a block, else one a sequence.
        pad_id: fills the last block after the answer; these positions are masked and learnt like any other, so nothing
            leaks the end.
    """

    block_size: int
    mask_id: int
    pad_id: int
    t_min: float = 0.05
    t_max: float = 1.0
    per_block: bool = True

    def __call__(self, sample: dict, generator: torch.Generator) -> State:
        """``sample`` has prompt_ids and response_ids. ``weight`` is 1/t over the response's length; a state may have no
        target by chance."""
        prompt = len(sample["prompt_ids"])
        ids = list(sample["prompt_ids"]) + list(sample["response_ids"])
        ids = torch.tensor(ids + [self.pad_id] * (-len(ids) % self.block_size))
        grid = absolute_grid(prompt, len(ids), self.block_size)
        position, t = draw_by_time(grid, self.t_min, self.t_max, self.per_block, generator)
        noisy = ids[grid.start :].clone()
        noisy[position - grid.start] = self.mask_id
        return state_without_order(ids, grid, noisy, position, weight=1 / t / (len(ids) - prompt))


def draw_by_time(
    grid: Grid, t_min: float, t_max: float, per_block: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Every response position with probability t of its block, t ~ U(t_min, t_max): (positions, their t)."""
    t = torch.rand(len(grid.rows) if per_block else 1, generator=generator)
    t = (t_min + (t_max - t_min) * t).expand(len(grid.rows)).unsqueeze(-1)
    drawn = (grid.rows >= 0) & (torch.rand(grid.rows.shape, generator=generator) < t)
    return grid.rows[drawn], t.expand(grid.rows.shape)[drawn]


@dataclass
class RectifiedNoise:
    """Between the ends of a rectified coupling (x_T, x_0): every position shows x_T with probability t, else x_0.

    x_T is what the decoder began with, per trajectory (``initial_ids``): masks, and random tokens in the share
    ``rollout.random_init_ratio``. Without it x_T is all masks, and this is the noise of the NELBO on the model's text.

    Attributes: as of BlockDiffusionNoise and TrajectoryNoise.
    """

    block_size: int
    mask_id: int
    t_min: float = 0.05
    t_max: float = 1.0
    per_block: bool = True
    post_num: int = 2

    def __call__(self, sample: dict, generator: torch.Generator) -> State:
        prompt, response = len(sample["prompt_ids"]), len(sample["response_ids"])
        ids, grid = clean_sequence(sample, self.block_size, self.mask_id)
        start = torch.full_like(ids, self.mask_id)
        if sample.get("initial_ids"):
            start[prompt : prompt + response] = torch.tensor(sample["initial_ids"])
        looked_at = learnt(sample, grid, ids, self.post_num, ())
        position, t = draw_by_time(grid, self.t_min, self.t_max, self.per_block, generator)
        noisy = ids[grid.start :].clone()
        noisy[position - grid.start] = start[position]
        kept = looked_at[position]
        position, t = position[kept], t[kept]
        return state_without_order(ids, grid, noisy, position, weight=1 / t / int(looked_at.sum()))

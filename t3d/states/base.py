"""Training states: a clean sequence becomes (x_0, x_t), and several of them a batch in the training layout.

The grid is absolute: block b covers positions [bB, (b+1)B) of prompt + response, in training and decoding alike.
The layout is [clean | noisy]. The noisy copy holds the blocks with response tokens. The clean copy has no last block,
because no query would see it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from t3d.blocks.attention import FLEX_TILE, Labels, dense_mask, flex_mask
from t3d.common.errors import UserError


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

    The incomplete block lies at the sequence's start. The prompt is as block-causal as the response.
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
    """x_0 of a trajectory and its grid. A training block may reach beyond the response; masks fill these positions."""
    prompt = len(sample["prompt_ids"])
    ids = torch.tensor(list(sample["prompt_ids"]) + list(sample["response_ids"]))
    grid = (response_grid if from_response else absolute_grid)(prompt, len(ids), block_size)
    return torch.nn.functional.pad(ids, (0, len(grid.block) - len(ids)), value=mask_id), grid


def learnt(sample: dict, grid: Grid, post_num: int) -> Tensor:
    """(length,) bool: the positions that the loss may read, to ``post_num`` positions after the answer's end."""
    within = torch.zeros(len(grid.block), dtype=torch.bool)
    prompt = len(sample["prompt_ids"])
    within[prompt : prompt + min(len(sample["response_ids"]), sample["length"] + post_num)] = True
    return within


@dataclass
class State:
    """One training state of one sequence. Tensors are on the CPU.

    Attributes:
        ids: (length,) the clean copy that later blocks see, prompt included, filled to the end of the last block.
        block: (length,) block of each position.
        start: first position of the noisy copy.
        noisy: (copies x (length - start),) x_t over the noisy blocks; several copies follow one another.
        position: (targets,) absolute positions that the loss reads, ascending in each copy.
        targets: (targets,) x_0 there.
        masked: (targets,) bool, whether x_t hides the target.
        weight: (targets,) the objective's weight of each target.
        rank: (targets,) the target's rank in its block's decode order, 1-based; 0 = no rank.
        u: (targets,) uniforms for an objective's own draws.
        old_log_prob: (targets,) nats, of the weights that drew the answer; +inf = not recorded.
        advantage: (targets,) the answer's advantage over the question's other answers; 0 = not rewarded.
        copies: noisy copies, each with masks of its own. None sees another.
        copy: (targets,) the noisy copy that shows the target's x_t, ascending; 0 = the first.
        sample_id: the sample's id; the trainer sets it, so that errors can name the sample.
        causal: the hidden state before a target predicts it, whatever the model's logit shift is.
        teacher: the state that a frozen model reads for its distributions at the same targets, in the same order; None
            = the frozen model reads this state, or there is none (t3d.states.pairs).
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
    copies: int = 1
    copy: Tensor = field(default_factory=lambda: torch.empty(0))
    old_log_prob: Tensor = field(default_factory=lambda: torch.empty(0))
    advantage: Tensor = field(default_factory=lambda: torch.empty(0))
    causal: bool = False
    teacher: "State | None" = None

    def __post_init__(self) -> None:
        if self.copies == 1:
            self.copy = torch.zeros_like(self.position)
        if len(self.old_log_prob) != len(self.position):
            self.old_log_prob = torch.full((len(self.position),), torch.inf)
        if len(self.advantage) != len(self.position):
            self.advantage = torch.zeros(len(self.position))

    def __len__(self) -> int:
        """The number of tokens in the forward."""
        return self.clean_length + len(self.noisy)

    @property
    def clean_length(self) -> int:
        return int(torch.searchsorted(self.block, self.block[-1]))


PER_TARGET = ("targets", "masked", "weight", "rank", "u", "copy", "old_log_prob", "advantage")


@dataclass
class Batch:
    """States in the training layout. N targets over S sequences.

    Attributes:
        input_ids, position_ids: (rows, length).
        attention_mask: (rows, 1, length, length) bool or a BlockMask.
        place: (N,) indices of the targets in the flattened (rows x length) ids.
        loss_index: (N,) indices of the hidden states that predict them: the same, with a logit shift the ones before.
        targets, masked, weight, rank, u, copy, old_log_prob, advantage: (N,) from the states.
        masked_index: (M,) indices of the masked targets; computed on the CPU, so that nobody waits for a GPU.
        shown_index: (N - M,) indices of the other targets; also from the CPU.
        own_index: (targets of the copies after the first,) indices where ``copy`` is not 0; also from the CPU.
        sequence: (N,) the target's sequence, 0..S-1; ascending.
        block: (N,) the target's block on its sequence's grid.
        sequences: S.
        tokens: real tokens in the layout (no padding).
        teacher: the batch of the states' ``teacher`` states, whose N targets are these; None where they have none.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: object
    place: Tensor
    loss_index: Tensor
    targets: Tensor
    masked: Tensor
    masked_index: Tensor
    shown_index: Tensor
    own_index: Tensor
    weight: Tensor
    rank: Tensor
    u: Tensor
    copy: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    sequence: Tensor
    block: Tensor
    sequences: int
    tokens: int
    teacher: "Batch | None" = None

    def __len__(self) -> int:
        return len(self.targets)


def collate(
    rows: Sequence[Sequence[State]],
    pad_id: int,
    *,
    flex: bool = False,
    shift: bool = False,
    teacher_shift: bool = False,
    device: str | torch.device = "cpu",
) -> Batch:
    """Lay states out in rows; states that share a row are packed, each a segment of its own.

    Args:
        rows: a micro-batch; each row is a list of states laid one after another.
        flex: build a FlexAttention BlockMask over whole tiles of its kernel, instead of the dense mask.
        shift: the model predicts a token from the hidden state before it (``logit_shift``).
        teacher_shift: likewise the model that reads the states' ``teacher`` states.
    """
    length = max(sum(len(state) for state in row) for row in rows)
    if flex:
        length = -(-length // FLEX_TILE) * FLEX_TILE
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_id)
    position_ids = torch.zeros(shape, dtype=torch.long)
    # Padding is noisy blocks of one token. Each sees only itself, and whole tiles of padding cost almost nothing.
    labels = Labels(
        torch.full(shape, -1), torch.arange(length).repeat(len(rows), 1), torch.ones(shape, dtype=torch.bool)
    )
    states: list[State] = []
    index, predictor, sequence, block = [], [], [], []
    for r, row in enumerate(rows):
        at = 0
        for segment, state in enumerate(row):
            clean, noisy, copies = state.clean_length, len(state.noisy), state.copies
            here, width = slice(at, at + clean + noisy), noisy // copies
            position = torch.cat([torch.arange(clean), torch.arange(state.start, len(state.ids)).repeat(copies)])
            # The copies of a block have their own numbers, between the clean block before it and its clean block.
            copy = torch.cat([torch.zeros(clean, dtype=torch.long), torch.arange(noisy) // width])
            input_ids[r, here] = torch.cat([state.ids[:clean], state.noisy])
            position_ids[r, here] = position
            labels.segment[r, here] = segment
            labels.block[r, here] = state.block[position] * copies - copy
            labels.noisy[r, at : at + clean] = False
            index.append(r * length + at + clean + state.copy * width + state.position - state.start)
            predictor.append(_state_before(state, index[-1], r * length + at) if shift or state.causal else index[-1])
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
        place=place(torch.cat(index)),
        loss_index=place(torch.cat(predictor)),
        masked_index=place(per_target["masked"].nonzero().squeeze(-1)),
        shown_index=place((~per_target["masked"]).nonzero().squeeze(-1)),
        own_index=place(per_target["copy"].nonzero().squeeze(-1)),
        **{name: place(value) for name, value in per_target.items()},
        sequence=place(torch.cat(sequence)),
        block=place(torch.cat(block)),
        sequences=len(states),
        tokens=sum(map(len, states)),
        teacher=_teachers_batch(rows, pad_id, flex=flex, shift=teacher_shift, device=device),
    )


def _teachers_batch(rows: Sequence[Sequence[State]], pad_id: int, **options: Any) -> Batch | None:
    read = [[state.teacher for state in row if state.teacher is not None] for row in rows]
    return collate(read, pad_id, **options) if any(read) else None


def _state_before(state: State, place: Tensor, clean: int) -> Tensor:
    """(targets,) the indices whose hidden states predict the targets at ``place``, under a logit shift.

    Position i - 1 predicts token i. Inside a block it lies in the same noisy copy. For a block's first token it lies in
    the clean copy, which begins at the index ``clean``: there the decoder has a committed block.

    Raises:
        UserError: a target at position 0, which no position predicts.
    """
    before = state.position - 1
    if (before < 0).any():
        raise UserError(
            f"{state.sample_id}: has no prompt; a model with a logit shift needs a prompt token", "prompt_ids"
        )
    first = state.block[state.position] != state.block[before]
    return torch.where(first, clean + before, place - 1)


def _place(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for the GPU's pending work."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def state_without_order(
    ids: Tensor,
    grid: Grid,
    noisy: Tensor,
    position: Tensor,
    *,
    weight: Tensor | None = None,
    masked: Tensor | None = None,
) -> State:
    """A state whose targets have no rank in a decode order.

    The targets are the clean copy's tokens; by default with weight 1, and masked.
    """
    return State(
        ids=ids,
        block=grid.block,
        start=grid.start,
        noisy=noisy,
        position=position,
        targets=ids[position],
        masked=torch.ones(len(position), dtype=torch.bool) if masked is None else masked,
        weight=torch.ones(len(position)) if weight is None else weight,
        rank=torch.zeros_like(position),
        u=torch.zeros(len(position)),
    )

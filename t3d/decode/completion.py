"""A teacher's completion of each block of a student's answer, after the student's earlier blocks.

In the training layout [clean = the answer | noisy = its blocks, all masked] a block sees only the answer's earlier
blocks and itself. So all blocks of all answers are decoded at once, without a cache. Each forward decodes one token per
block, so there are block_size forwards. Draws, strategy and random numbers are the decoder's (t3d.blocks.decoding). So
the model that wrote an answer writes its blocks again, given the same seed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from t3d.blocks.decoding import choose, on_grid, project_and_draw, stream_key, uniforms
from t3d.blocks.settings import DecodeSettings
from t3d.blocks.special_ids import SpecialIds
from t3d.blocks.strategy import strategy_named
from t3d.data.trajectory import Trajectory
from t3d.decode.runner import TOKENS_PREFILLED
from t3d.states.base import Batch, State, clean_sequence, collate, state_without_order
from t3d.states.groups import block_groups
from t3d.states.packing import micro_batches


class Completion(NamedTuple):
    """A teacher's completion of every block of an answer: ids, and unmask steps (1-based, growing over blocks).

    It is as long as the answer's response_ids. Its blocks do not continue each other, but the answer's blocks.
    """

    ids: list[int]
    unmask_step: list[int]


def complete(
    model: Callable,
    trajectories: Sequence[Trajectory],
    settings: DecodeSettings,
    seed: int,
    ids: SpecialIds,
    *,
    device: torch.device,
    flex: bool = False,
    shift: bool = False,
    chunk: int = 1024,
) -> Iterator[tuple[Trajectory, Completion]]:
    """Each answer with the completion of its blocks by ``model``, in any order.

    Args:
        model: as an objective gets it. flex: it takes FlexAttention's masks. shift: its logits predict the next token.
        settings: the answers'. Only the steps differ: a block is decoded one token per step, from masks.
        seed: the answers' seed; the random streams are the same.
        chunk: rows of the vocabulary projection at once.
    """
    by_id = {trajectory.id: trajectory for trajectory in trajectories}
    states = [masked_answer(trajectory, ids.mask_id) for trajectory in trajectories]
    for rows in micro_batches(states, size=1, budget=TOKENS_PREFILLED, packed=flex):
        answers = [by_id[state.sample_id] for row in rows for state in row]
        keys = torch.tensor([stream_key(seed, *of_stream(answer.id)) for answer in answers], device=device)
        prompts = torch.tensor([len(answer.prompt_ids) for answer in answers], device=device)
        batch = collate(rows, ids.pad_id, flex=flex, shift=shift, device=device)
        forbidden = torch.tensor(ids.forbidden_ids, device=device)
        found = complete_batch(model, batch, keys, prompts, settings, forbidden, chunk)
        lengths = [len(answer.response_ids) for answer in answers]
        for answer, *parts in zip(answers, *(values.cpu().split(lengths) for values in found), strict=True):
            yield answer, Completion(*(part.tolist() for part in parts))


def of_stream(trajectory_id: str) -> tuple[str, int]:
    """The (prompt, sample) that name an answer's random stream."""
    prompt, _, sample = trajectory_id.rpartition("/")
    return prompt, int(sample)


def masked_answer(trajectory: Trajectory, mask_id: int) -> State:
    """The state in which every token of the response is masked and a target."""
    ids, grid = clean_sequence(vars(trajectory), trajectory.block_size, mask_id)
    position = torch.arange(len(trajectory.prompt_ids), len(ids))
    noisy = ids[grid.start :].clone()
    noisy[position - grid.start] = mask_id
    state = state_without_order(ids, grid, noisy, position)
    state.sample_id = trajectory.id
    return state


@torch.no_grad()
def complete_batch(
    model: Callable,
    batch: Batch,
    keys: Tensor,
    prompts: Tensor,
    settings: DecodeSettings,
    forbidden: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """(N,) tokens and (N,) unmask steps for the N targets of a batch of masked answers.

    Args:
        keys, prompts: (sequences,) each answer's random stream, and the length of its prompt.
        forbidden: ids that may not be drawn.
    """
    of_sequence, group = block_groups(batch.sequence, batch.block)
    position = batch.position_ids.flatten()[batch.place]
    column = position % settings.block_size
    # (blocks, block_size), -1 at the prompt's end in a block
    place, source, where = torch.full((3, len(of_sequence), settings.block_size), -1, device=position.device)
    place[group, column], source[group, column], where[group, column] = batch.place, batch.loss_index, position
    present = place >= 0
    first = where.masked_fill(~present, torch.iinfo(where.dtype).max).amin(-1)
    done = first - prompts[of_sequence]  # in the earlier blocks, too, each token was a step
    ids, step = batch.input_ids.flatten().clone(), torch.zeros_like(place)
    settings, key = replace(settings, denoising_steps_per_block=settings.block_size), keys[of_sequence]
    stage = settings.block_size - present.sum(-1)  # the prompt's tokens in a block count as unmasked by steps
    for number in range(1, settings.block_size + 1):
        masked, when = present & (step == 0), done + number
        u = uniforms(key.unsqueeze(-1), where, when.unsqueeze(-1))[masked]
        drawn = draw_at(model, batch, ids, source[masked], u, settings, forbidden, chunk)
        token, confidence, entropy = on_grid(masked, drawn)
        at = {"key": key, "position": where, "step": when, "stage": stage}
        unmask = choose(masked, confidence, entropy, settings, **at)
        ids[place[unmask]] = token[unmask]
        step = torch.where(unmask, when.unsqueeze(-1), step)
        stage = stage + 1
    return ids[batch.place], step[group, column]


def draw_at(
    model: Callable,
    batch: Batch,
    ids: Tensor,
    source: Tensor,
    u: Tensor,
    settings: DecodeSettings,
    forbidden: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One forward of the batch at ``ids``; the result of ``draw`` from the hidden states at ``source``, (rows,)."""
    need_entropy = strategy_named(settings.remasking_strategy).needs_entropy

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = hidden.flatten(0, 1)[source]
        return project_and_draw(rows, weight, forbidden, u, settings, need_entropy=need_entropy, rows_at_once=chunk)

    shaped = ids.view_as(batch.input_ids)
    return model(shaped, batch.attention_mask, position_ids=batch.position_ids, use_cache=False, head=head)

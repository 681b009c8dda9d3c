"""The released recipe of a T3D training step, our own implementation as a baseline, and the steps from it to ours.

It follows the recipe's description (DESIGN, sections 2 and 7) and the published training script:
- Every sequence is padded to the longest of the data set: prompts on the left, answers on the right. The noisy copy
  follows them.
- There are four forwards: reference and student, each for the teacher's tokens and for the reference's own draw.
- Logits cover the whole vocabulary at every place. A full log_softmax covers all places except the clean answer's. Only
  then the masked places are picked.
- Every forward builds a dense N x N mask. One sequence is processed at a time.

Both sides must minimise the same loss on the same states, so three points differ from the publication:
- Blocks lie on the absolute grid, so the noisy copy begins with the block that holds the prompt's end.
- The path term weighs masked tokens by rank. The publication recomputes cross-entropies level by level, and an argmax
  that it never uses. Both would make the baseline slower than it is here.
- Precision is fp32 throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from t3d.blocks.attention import Labels, dense_mask
from t3d.states.base import Batch, State


@dataclass(frozen=True)
class Longest:
    """The data set's longest prompt, answer and noisy copy, in tokens."""

    prompt: int
    answer: int
    noisy: int

    @classmethod
    def of(cls, states: Sequence[State], prompts: Sequence[int]) -> "Longest":
        pairs = list(zip(states, prompts, strict=True))
        return cls(max(prompts), max(len(s.ids) - p for s, p in pairs), max(len(s.noisy) for s in states))

    @property
    def rows(self) -> int:
        return self.prompt + self.answer + self.noisy


@dataclass
class Rows:
    """Sequences laid out for one forward.

    Attributes:
        input_ids, position_ids: (1, length).
        labels: for the attention mask.
        longest: the lengths of the parts. The prompt's and the noisy copy's places are kept for the loss.
        targets: (1, kept) x_0 there. p_mask: bool, the targets of the loss. weight: the path term's weights there.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Labels
    longest: Longest
    targets: Tensor
    p_mask: Tensor
    weight: Tensor


def pad_to_longest(state: State, prompt: int, longest: Longest, pad_id: int, block_size: int) -> Rows:
    """[prompt, padded on the left | answer, padded on the right | noisy copy, padded on the right]."""
    shape = (1, longest.rows)
    input_ids, position_ids = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    labels = Labels(torch.full(shape, -1), torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool))
    length, noisy_from = len(state.ids), longest.prompt + longest.answer
    clean = slice(longest.prompt - prompt, longest.prompt - prompt + length)
    noisy = slice(noisy_from, noisy_from + len(state.noisy))
    for here, ids, start in ((clean, state.ids, 0), (noisy, state.noisy, state.start)):
        input_ids[0, here] = ids
        position_ids[0, here] = torch.arange(start, length)
        labels.segment[0, here] = 0
        labels.block[0, here] = state.block[start:]
    labels.noisy[0, noisy_from:] = True

    targets = without_answer(input_ids, longest)
    targets[0, longest.prompt : longest.prompt + len(state.noisy)] = state.ids[state.start :]
    p_mask, weight = torch.zeros(targets.shape, dtype=torch.bool), torch.zeros(targets.shape)
    at = longest.prompt + state.position[state.masked] - state.start
    p_mask[0, at] = True
    weight[0, at] = (block_size - state.rank[state.masked] + 1) / block_size
    return Rows(input_ids, position_ids, labels, longest, targets, p_mask, weight)


@dataclass
class Recipe:
    """The loss of one padded sequence, (1,).

    ``two_forwards``: the same log-probabilities from one forward of each model. ``masked_rows``: only the targets'
    hidden states are projected onto the vocabulary. Without both it is the recipe.
    """

    forbidden: Tensor
    alpha: float
    beta: float
    lambda_path: float
    two_forwards: bool = False
    masked_rows: bool = False

    def __call__(self, student, reference, rows: Rows) -> Tensor:
        targets, p_mask, weight = rows.targets, rows.p_mask, rows.weight
        if self.masked_rows:
            targets, weight = targets[p_mask][None], weight[p_mask][None]
            p_mask = torch.ones_like(targets, dtype=torch.bool)

        def mean(values: Tensor) -> Tensor:
            return (values * p_mask).sum(1) / p_mask.sum(1)

        def score(logits: Tensor, y: Tensor) -> Tensor:
            return pick(logits.log_softmax(-1), y)

        with torch.no_grad():
            logits = self.logits(reference, rows)
            reference_real = mean(score(logits, targets))
            if not self.two_forwards:
                logits = self.logits(reference, rows)
            y = best(logits, self.forbidden)
            reference_fake = mean(score(logits, y))
        log_probs = self.logits(student, rows).log_softmax(-1)
        real = mean(pick(log_probs, targets))
        if not self.two_forwards:
            log_probs = self.logits(student, rows).log_softmax(-1)
        fake = mean(pick(log_probs, y))
        path = mean(-weight * pick(log_probs, targets))
        return self.loss(real - reference_real, fake - reference_fake, path)

    def logits(self, model, rows: Rows) -> Tensor:
        """(1, kept, vocabulary), or with ``masked_rows`` (1, masked, vocabulary)."""
        mask = dense_mask(rows.labels)
        if self.masked_rows:
            hidden = model.model(rows.input_ids, mask, position_ids=rows.position_ids).last_hidden_state
            return model.lm_head(without_answer(hidden, rows.longest)[rows.p_mask])[None]
        logits = model(rows.input_ids, mask, position_ids=rows.position_ids, use_cache=False).logits
        return without_answer(logits, rows.longest)

    def loss(self, real: Tensor, fake: Tensor, path: Tensor) -> Tensor:
        ddo = -F.logsigmoid(self.beta * real) - self.alpha * F.logsigmoid(-self.beta * fake)
        return ddo + self.lambda_path * path


@dataclass
class Unpadded(Recipe):
    """Two forwards and masked rows on the trainer's own layout, but all masked rows' logits at once: (sequences,)."""

    block_size: int = 4

    def __call__(self, student, reference, batch: Batch) -> Tensor:  # type: ignore[override]  # another layout
        def log_probs(model) -> Tensor:
            hidden = model.model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids)
            return model.lm_head(hidden.last_hidden_state.flatten(0, 1)[batch.loss_index]).log_softmax(-1)

        def mean(values: Tensor) -> Tensor:
            count = torch.bincount(batch.sequence, minlength=batch.sequences)
            return values.new_zeros(batch.sequences).index_add(0, batch.sequence, values) / count

        with torch.no_grad():
            theirs = log_probs(reference)
            y = best(theirs, self.forbidden)
            theirs = torch.stack([pick(theirs, batch.targets), pick(theirs, y)])
        mine = log_probs(student)
        mine = torch.stack([pick(mine, batch.targets), pick(mine, y)])
        weight = (self.block_size - batch.rank + 1) / self.block_size
        return self.loss(mean(mine[0] - theirs[0]), mean(mine[1] - theirs[1]), mean(-weight * mine[0]))


def without_answer(rows: Tensor, longest: Longest) -> Tensor:
    """(1, length, ...) without the clean answer's places: a copy, as in the publication."""
    return torch.cat([rows[:, : longest.prompt], rows[:, longest.prompt + longest.answer :]], dim=1)


def pick(table: Tensor, ids: Tensor) -> Tensor:
    """(..., vocabulary) and (...) ids -> the entries at the ids, (...)."""
    return table.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def best(logits: Tensor, forbidden: Tensor) -> Tensor:
    """The most likely allowed token, without a second table: the forbidden columns are hidden and restored."""
    columns = logits[..., forbidden].clone()
    logits[..., forbidden] = -torch.inf
    y = logits.argmax(-1)
    logits[..., forbidden] = columns
    return y

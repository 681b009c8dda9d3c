"""Free text, measured without a right answer: its likelihood under an autoregressive model, and its variety.

Likelihood alone rewards dull text, so the variety is always measured too. The figures of the autoregressive model's own
samples are the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from t3d.blocks.decoding import logits_of
from t3d.common.errors import UserError
from t3d.data.trajectory import Trajectory
from t3d.evaluation.statistics import bootstrap_interval
from t3d.models.loading import load_model, load_tokenizer

KEY = "evaluation.judge"
ROWS, TOKENS = 1024, 4096  # rows of the vocabulary projection at once; tokens of a forward


def variety(answers: Sequence[Sequence[int]]) -> dict[str, float]:
    """Measures of token ids, without a model.

    Returns:
        distinct_2: distinct pairs of neighbours over all pairs of all answers (Li et al. 2016, arXiv 1510.03055).
        repetition: the share of an answer's groups of 4 tokens that occurred in it before, a mean over answers
            (Welleck et al. 2020, arXiv 1908.04319).
    """
    pairs = [pair for answer in answers for pair in _groups(answer, 2)]
    repeated = [1 - len(set(fours)) / len(fours) for answer in answers if (fours := _groups(answer, 4))]
    return {
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else 0.0,
        "repetition": fmean(repeated) if repeated else 0.0,
    }


def _groups(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]


class Judge:
    """An autoregressive model that reads answers to the end of their turn."""

    def __init__(self, source: str, read_by: str):
        """Load the model ``source``, to read the token ids of the model ``read_by``.

        Raises:
            UserError: no model, or one with other tokens.
        """
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(source, autoregressive=True, device=self.device, key=KEY)
        own, other = load_tokenizer(source, KEY).get_vocab(), load_tokenizer(read_by).get_vocab()
        foreign = [token for token, number in other.items() if own.get(token, number) != number]
        if foreign:
            raise UserError(
                f"{KEY}={source}: {foreign[0]!r} is another token in {read_by}; give a model with the same tokenizer",
                KEY,
            )

    def measures(self, answers: Sequence[Trajectory]) -> dict[str, float]:
        """``nll``: the mean over answers of the negative log-likelihood per token, in nats, with its 95 % interval over
        questions: ``nll_low``, ``nll_high``.
        """
        found: dict[str, list[float]] = {}
        for answer, value in zip(answers, self.per_token(answers), strict=True):
            found.setdefault(answer.id.rpartition("/")[0], []).append(value)
        values = [fmean(samples) for samples in found.values()]
        low, high = bootstrap_interval(values)
        return {"nll": fmean(values), "nll_low": low, "nll_high": high}

    def per_token(self, answers: Sequence[Trajectory]) -> list[float]:
        """The negative log-likelihood per token of each answer, first stop id included, in nats."""
        values = [0.0] * len(answers)
        order = sorted(range(len(answers)), key=lambda i: len(answers[i].prompt_ids) + answers[i].length)
        for batch in _batches(order, answers):
            for i, value in zip(batch, self._read([answers[i] for i in batch]), strict=True):
                values[i] = value
        return values

    @torch.no_grad()
    def _read(self, answers: Sequence[Trajectory]) -> list[float]:
        rows = [[*answer.prompt_ids, *answer.response_ids[: answer.length]] for answer in answers]
        length = max(map(len, rows))
        ids = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows], device=self.device)
        which = [i for i, answer in enumerate(answers) for _ in range(answer.length)]
        at = [len(a.prompt_ids) + j for a in answers for j in range(a.length)]
        row, place = (torch.tensor(index, device=self.device) for index in (which, at))
        targets = ids[row, place]

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            found = []
            for some, target in zip(hidden[row, place - 1].split(ROWS), targets.split(ROWS), strict=True):
                logits = logits_of(some, weight)
                found.append(logits.logsumexp(-1) - logits.gather(-1, target.unsqueeze(-1)).squeeze(-1))
            return torch.cat(found)

        nll = self.model(ids, head=head)  # padding follows every answer, and no token sees it
        sums = torch.zeros(len(answers), device=self.device).index_add(0, row, nll)
        return [float(total) / answer.length for total, answer in zip(sums, answers, strict=True)]


def _batches(order: Sequence[int], answers: Sequence[Any]) -> Iterable[list[int]]:
    """Groups of answers of similar length, with at most TOKENS tokens including padding."""
    batch: list[int] = []
    for i in order:
        longest = len(answers[i].prompt_ids) + answers[i].length  # the order is ascending
        if batch and longest * (len(batch) + 1) > TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch

"""The interface of an objective, and the one forward they all make."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from t3d.objectives.likelihood import Draw, draw_and_score, token_log_probs
from t3d.states.base import Batch, State


class Terms(NamedTuple):
    """loss: (sequences,) with gradients; metrics: name -> (sequences,) detached. The trainer averages over the global
    batch, whatever the micro-batches."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """What to noise and what to minimise.

    ``needs_reference``: a frozen reference model takes part. ``noise`` draws a training state of a sample; one without
    targets has nothing to learn, and the trainer skips and counts it. Calling the objective gives the loss of a batch;
    ``reference`` is None where the reference is stopgrad(student) of this very step.

    For the cost model one says, where it is not 1, how many ``forwards`` of the student go before a backward pass, and
    how many ``head_tables`` (a chunk's rows x vocabulary, fp32) its head holds in the backward pass.
    """

    needs_reference: bool
    noise: Callable[[dict, torch.Generator], State]

    def __call__(self, student: Callable, reference: Callable | None, batch: Batch) -> Terms: ...


def score(
    model: Callable,
    batch: Batch,
    *,
    draw: Draw | None = None,
    negatives: Tensor | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor | None]:
    """One forward of ``model`` on the batch; log-probabilities where the loss looks.

    Args:
        draw: how y (N,) is drawn from this very forward.
        negatives: y (N,) drawn before. With neither, only x_0 is scored.

    Returns:
        (log-probabilities (N, 1 or 2) fp32 of x_0 and y, y or None).
    """

    def head(hidden: Tensor, weight: Tensor):
        rows = loss_rows(hidden, batch)
        if draw is not None:
            return draw_and_score(rows, weight, batch.targets.unsqueeze(-1), draw, chunk)
        targets = [batch.targets] if negatives is None else [batch.targets, negatives]
        return token_log_probs(rows, weight, torch.stack(targets, -1), chunk), negatives

    return model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False, head=head)


def loss_rows(hidden: Tensor, batch: Batch) -> Tensor:
    """(N, width) hidden states where the loss looks, of (rows, length, width)."""
    rows = hidden.flatten(0, 1)[batch.loss_index]
    if torch.is_autocast_enabled(rows.device.type):  # so that the backward pass projects in the same precision
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    return rows

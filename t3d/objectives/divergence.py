"""The divergence of a student's distributions from a teacher's, without ever holding a (tokens x vocabulary) tensor.

With p = softmax(teacher's logits / T) and q = softmax(student's logits / T), of every row:

    forward, reverse   (1 - w) KL(p || q) + w KL(q || p)
    generalised JSD    beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

Sources: distillation (arXiv 1503.02531), where T^2 keeps the gradient's size (the caller's factor); GKD (arXiv
2306.13649, eq. 1) for the JSD; OPDLM (arXiv 2606.06712) for top_k. Its code sums over the teacher's k likeliest tokens,
and normalises over the whole vocabulary.

Both models are projected a chunk of rows at a time, in fp32 after the product. The backward pass projects both again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t3d.objectives.likelihood import Projection, pull_back


@dataclass(frozen=True)
class Divergence:
    """The measure between p, the teacher's distribution, and q, the student's.

    Attributes:
        reverse_weight: w, the weight of KL(q || p); KL(p || q) has 1 - w.
        jsd: beta of the generalised JSD, which then replaces both KL; None = off.
        top_k: sum only over the teacher's k likeliest tokens; None = over all.
        temperature: T.
    """

    reverse_weight: float = 0.0
    jsd: float | None = None
    top_k: int | None = None
    temperature: float = 1.0

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """(rows,) nats, from (rows, tokens) log-probabilities."""
        if self.jsd is not None:
            log_m = self._log_mixture(log_p, log_q)
            return (self.jsd * (log_p.exp() * (log_p - log_m)) + (1 - self.jsd) * (log_q.exp() * (log_q - log_m))).sum(
                -1
            )
        difference = log_p - log_q
        forward = (log_p.exp() * difference).sum(-1)
        if not self.reverse_weight:
            return forward
        reverse = -(log_q.exp() * difference).sum(-1)
        return (1 - self.reverse_weight) * forward + self.reverse_weight * reverse

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """(rows, tokens) partial derivatives of ``value`` by log q."""
        if self.jsd is not None:
            return (log_q - self._log_mixture(log_p, log_q)).mul_(log_q.exp()).mul_(1 - self.jsd)
        forward = log_p.exp().neg_()
        if not self.reverse_weight:
            return forward
        reverse = (log_q - log_p).add_(1).mul_(log_q.exp())
        return forward.mul_(1 - self.reverse_weight).add_(reverse, alpha=self.reverse_weight)

    def _log_mixture(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        assert self.jsd is not None
        share = torch.tensor([self.jsd, 1 - self.jsd], device=log_p.device).log()
        return torch.logaddexp(log_p + share[0], log_q + share[1])


def divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    measure: Divergence,
    chunk: int = 1024,
) -> Tensor:
    """The divergence of every row of the student from the teacher's row.

    If one head has more rows than the other, because of padding, only the common tokens count.

    Args:
        hidden: (rows, width); weight: (vocab, width), the student's head.
        teacher_hidden, teacher_weight: likewise, of any width and dtype; they get no gradient.
        chunk: rows projected at once; memory is a few tables of chunk x vocab fp32.

    Returns:
        (rows,) fp32 nats; gradients reach ``hidden`` and ``weight``.
    """
    common = min(len(weight), len(teacher_weight))
    weight = weight if len(weight) == common else weight[:common]
    teacher = teacher_hidden.detach(), teacher_weight.detach()[:common]
    return _Divergence.apply(hidden, weight, *teacher, measure, chunk)


class _Divergence(torch.autograd.Function):
    """With a = d value / d log q:  d value / d logits = (a - q sum a) / T, all recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        measure: Divergence,
        chunk: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight)
        ctx.measure, ctx.chunk = measure, chunk
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        teacher = Projection(teacher_hidden, teacher_weight, chunk)
        for rows, logits in Projection(hidden, weight, chunk):
            log_p, log_q = _log_softmax(teacher[rows], measure), _log_softmax(logits, measure)
            if measure.top_k is not None:
                log_p, kept = log_p.topk(min(measure.top_k, log_p.shape[-1]), -1)
                log_q = log_q.gather(-1, kept)
            result[rows] = measure.value(log_p, log_q)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight = ctx.saved_tensors
        measure: Divergence = ctx.measure
        teacher = Projection(teacher_hidden, teacher_weight, ctx.chunk)

        def slope(rows: slice, logits: Tensor) -> Tensor:
            log_p, log_q = _log_softmax(teacher[rows], measure), _log_softmax(logits, measure)
            scale = grad[rows].unsqueeze(-1) / measure.temperature
            if measure.top_k is None:
                a = measure.slope(log_p, log_q).mul_(scale)
                return a.sub_(log_q.exp_().mul_(a.sum(-1, keepdim=True)))
            log_p, kept = log_p.topk(min(measure.top_k, log_p.shape[-1]), -1)
            a = measure.slope(log_p, log_q.gather(-1, kept)).mul_(scale)
            return log_q.exp_().mul_(-a.sum(-1, keepdim=True)).scatter_add_(-1, kept, a)

        grads = pull_back(hidden, weight, ctx.chunk, slope, head_learns=ctx.needs_input_grad[1])
        return *grads, None, None, None, None


def _log_softmax(logits: Tensor, measure: Divergence) -> Tensor:
    """log softmax(logits / T), written over the logits."""
    if measure.temperature != 1:
        logits = logits.div_(measure.temperature)
    highest = logits.amax(-1, keepdim=True)
    logits = logits.sub_(highest)
    return logits.sub_(logits.exp().sum(-1, keepdim=True).log_())

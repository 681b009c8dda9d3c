"""Log-probabilities of chosen tokens at chosen positions, without ever holding a (tokens x vocabulary) tensor.

With a vocabulary of 151,936 the logits would dominate the memory of training. So only the hidden states of targets are
projected, one chunk of rows at a time into one buffer, in fp32 after the product. The backward pass projects each chunk
again. Between the passes only the log-normaliser of every row is kept. Draws use the same projection.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t3d.blocks.decoding import inverse_cdf, logits_of, product_dtype


@dataclass(frozen=True, eq=False)
class Draw:
    """y ~ p(. | x_t) at every row: argmax at temperature 0, else a sample by inverse CDF.

    Attributes:
        forbidden: ids that may not be drawn (the mask id, ids beyond the tokenizer).
        u: (rows,) uniforms in [0, 1).
    """

    temperature: float
    forbidden: Tensor
    u: Tensor

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        """(chunk,) token ids for the ``rows`` with these fp32 logits. The logits are unchanged afterwards."""
        columns = logits[:, self.forbidden]
        logits.index_fill_(-1, self.forbidden, -torch.inf)
        if self.temperature == 0:
            y = logits.argmax(-1)
        else:
            y = inverse_cdf((logits / self.temperature).softmax(-1), self.u[rows])
        logits.index_copy_(-1, self.forbidden, columns)
        return y


class Projection:
    """Logits of (rows, width) hidden states under a head (vocab, width), a chunk of rows at a time.

    All chunks share one buffer: the logits of a chunk are gone when the next one is projected.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, chunk: int):
        self.hidden, self.chunk = hidden, chunk
        self.weight = weight.to(hidden.dtype)
        dtype = product_dtype(hidden.dtype, hidden.device)
        self.buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=dtype)

    def __getitem__(self, rows: slice) -> Tensor:
        """(rows, vocab) fp32 logits."""
        return logits_of(self.hidden[rows], self.weight, self.buffer[: rows.stop - rows.start])

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(slice of rows, their logits), chunk after chunk."""
        return ((rows, self[rows]) for rows in chunks(len(self.hidden), self.chunk))


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` rows that cover ``rows`` rows."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def pull_back(
    hidden: Tensor, weight: Tensor, chunk: int, slope: Callable[[slice, Tensor], Tensor], head_learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the hidden states and, where ``head_learns``, of the head.

    Args:
        slope: (slice of rows, their fp32 logits) -> the gradient of these logits; it may write into them.
    """
    projection = Projection(hidden, weight, chunk)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight) if head_learns else None
    for rows, logits in projection:
        grad_logits = slope(rows, logits).to(hidden.dtype)
        grad_hidden[rows] = grad_logits @ projection.weight
        if grad_weight is None:
            continue
        if weight.dtype == hidden.dtype:  # added inside the product, without a second tensor of the head's size
            grad_weight.addmm_(grad_logits.T, hidden[rows])
        else:
            grad_weight += grad_logits.T @ hidden[rows]
    return grad_hidden, grad_weight


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(h W^T)[targets] with K targets per row; the last may be drawn.

    Backward: d/dlogits = sum_k g_k (onehot(target_k) - softmax), with the softmax recomputed from the log-normaliser.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, draw: Draw | None
    ) -> tuple[Tensor, Tensor]:
        if draw is not None:
            targets = torch.nn.functional.pad(targets, (0, 1))
        log_probs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        log_normaliser = torch.empty(len(hidden), 1, dtype=torch.float32, device=hidden.device)
        for rows, logits in Projection(hidden, weight, chunk):
            if draw is not None:
                targets[rows, -1] = draw(logits, rows)
            chosen = logits.gather(-1, targets[rows])
            highest = logits.amax(-1, keepdim=True)  # logsumexp in place, because torch's temporaries are tables too
            log_normaliser[rows] = logits.sub_(highest).exp_().sum(-1, keepdim=True).log_().add_(highest)
            log_probs[rows] = chosen - log_normaliser[rows]
        ctx.save_for_backward(hidden, weight, targets, log_normaliser)
        ctx.chunk = chunk
        y = targets[:, -1].clone()
        ctx.mark_non_differentiable(y)
        return log_probs, y

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        hidden, weight, targets, log_normaliser = ctx.saved_tensors

        def slope(rows: slice, logits: Tensor) -> Tensor:
            softmax = logits.sub_(log_normaliser[rows]).exp_()
            return softmax.mul_(-grad[rows].sum(-1, keepdim=True)).scatter_add_(-1, targets[rows], grad[rows])

        grads = pull_back(hidden, weight, ctx.chunk, slope, head_learns=ctx.needs_input_grad[1])
        return *grads, None, None, None


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Log-probabilities of the targets under softmax(hidden @ weight.T).

    Args:
        hidden: (rows, width) in the compute dtype.
        weight: (vocab, width), the vocabulary head.
        targets: (rows, K) token ids; K = 2 serves x_0 and y with one projection.
        chunk: rows projected at once; memory is chunk x vocab fp32.

    Returns:
        (rows, K) fp32 nats; gradients reach ``hidden`` and ``weight``.
    """
    return _TokenLogProbs.apply(hidden, weight, targets, chunk, None)[0]


def token_certainty(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets and, from the same projection, the model's certainty of its own guess.

    The backward pass projects every chunk again.

    Args:
        hidden: (rows, width); weight: (vocab, width); targets: (rows,).
        temperature: the entropy is of softmax(logits / temperature).

    Returns:
        (rows,) each: log-probability and entropy, fp32 nats with gradients, and whether the argmax is the target.
    """

    def of_rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = (hidden @ weight.to(hidden.dtype).T).float()
        log_prob = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        sharpened = (logits / temperature).log_softmax(-1)
        return log_prob, -(sharpened.exp() * sharpened).sum(-1), logits.detach().argmax(-1) == targets

    parts = [
        checkpoint(of_rows, hidden[rows], weight, targets[rows], use_reentrant=False)
        for rows in chunks(max(len(hidden), 1), chunk)
    ]
    log_prob, entropy, right = zip(*parts, strict=True)
    return torch.cat(log_prob), torch.cat(entropy), torch.cat(right)


def draw_and_score(
    hidden: Tensor, weight: Tensor, targets: Tensor, draw: Draw, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """``token_log_probs`` with one more target per row, drawn from the same logits.

    Returns:
        ((rows, K + 1) fp32 nats, the last column for the drawn ids; (rows,) the drawn ids).
    """
    return _TokenLogProbs.apply(hidden, weight, targets, chunk, draw)


class _PolicyLogProbs(torch.autograd.Function):
    """log softmax(h W^T / T)[target] without the forbidden ids, and the entropy of that distribution.

    Backward: d/dlogits = g (onehot(target) - softmax) / T, with the softmax recomputed from the log-normaliser.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, forbidden: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        log_prob, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        log_normaliser = torch.empty(len(hidden), 1, dtype=torch.float32, device=hidden.device)
        for rows, logits in Projection(hidden, weight, chunk):
            logits = logits.div_(temperature).index_fill_(-1, forbidden, -torch.inf)
            highest = logits.amax(-1, keepdim=True)
            chosen = logits.gather(-1, targets[rows].unsqueeze(-1))
            mass = logits.sub_(highest).exp()
            total = mass.sum(-1, keepdim=True)
            log_normaliser[rows] = total.log() + highest
            log_prob[rows] = (chosen - log_normaliser[rows]).squeeze(-1)
            mean = mass.mul_(logits.clamp_(min=-1e4)).sum(-1, keepdim=True) / total  # a forbidden id is 0 x finite
            entropy[rows] = (total.log() - mean).squeeze(-1)
        ctx.save_for_backward(hidden, weight, targets, forbidden, log_normaliser)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return log_prob, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        hidden, weight, targets, forbidden, log_normaliser = ctx.saved_tensors

        def slope(rows: slice, logits: Tensor) -> Tensor:
            scale = (grad[rows] / ctx.temperature).unsqueeze(-1)
            logits = logits.div_(ctx.temperature).index_fill_(-1, forbidden, -torch.inf)
            softmax = logits.sub_(log_normaliser[rows]).exp_()
            return softmax.mul_(-scale).scatter_add_(-1, targets[rows].unsqueeze(-1), scale)

        grads = pull_back(hidden, weight, ctx.chunk, slope, head_learns=ctx.needs_input_grad[1])
        return *grads, None, None, None, None


def policy_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, forbidden: Tensor, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of drawn tokens under the distribution that drew them: softmax(logits / temperature) without
    the forbidden ids.

    Args:
        hidden: (rows, width); weight: (vocab, width); targets: (rows,) token ids.
        temperature: above 0.
        forbidden: (n,) ids that cannot be drawn.
        chunk: rows projected at once; memory is two tables of chunk x vocab fp32.

    Returns:
        (rows,) each: log-probability, fp32 nats with gradients, and the distribution's entropy, without.
    """
    return _PolicyLogProbs.apply(hidden, weight, targets, temperature, forbidden, chunk)

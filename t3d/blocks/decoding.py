"""One denoising step of a block: draw a token at each masked position, and choose the positions to unmask.

Pure functions of tensors. The engines own model, cache and files. The strategy chooses the positions
(t3d.blocks.strategy).
"""

import hashlib
from functools import cache

import torch
from torch import Tensor

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import StepView, strategy_named

# ---------------------------------------------------------------------------------------------------------------------
# Random numbers: a pure function of (seed, prompt id, sample, position, step), so that batch size, order, number of
# processes and decoding path change nothing.

_GOLDEN, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64, as signed int64


def stream_key(seed: int, prompt_id: str, sample: int) -> int:
    """The 64-bit key (signed) of one answer's random stream."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 tensors (two's complement wraps as unsigned arithmetic does)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniforms(key: Tensor, position: Tensor, step: Tensor, stream: int | Tensor = 0) -> Tensor:
    """Uniform numbers in [0, 1), float32; broadcast over int64 ``key``, ``position``, ``step`` and ``stream``.

    ``stream`` separates the uses of random numbers:
    - 0 draws the token; 1 orders positions in the random strategy; 2 accepts drafted tokens;
    - 3 draws x_T; 4 chooses among candidate fillings; 5, 6, ... draw the candidates after the first.

    Streams come in pairs, and a pair has 2^40 positions, so no two (position, stream) share a number.
    """
    x = _mix(key + _GOLDEN * (2 * (position + (stream // 2 << 40)) + stream % 2 + 1))
    x = _mix(x + _GOLDEN * (step + 1))
    return ((x >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def initial_tokens(key: Tensor, position: Tensor, ratio: float, ordinary_ids: Tensor, mask_id: int) -> Tensor:
    """x_T, the tokens shown before decoding: a random ordinary token with probability ``ratio``, else the mask.

    A pure function of the answer's stream and the position. ``key`` and ``position`` broadcast.
    """
    chosen, which = (uniforms(key, position, torch.full_like(position, step), stream=3) for step in (0, 1))
    token = ordinary_ids[(which * len(ordinary_ids)).long()]
    return torch.where(chosen < ratio, token, mask_id)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing a token at every masked position


Draws = tuple[Tensor, Tensor, Tensor | None]  # tokens, confidences, entropies; see `draw`


def draw(
    logits: Tensor, u: Tensor, settings: DecodeSettings, *, need_entropy: bool = False, rows_at_once: int = 256
) -> Draws:
    """Draw one token a row.

    Args:
        logits: (rows, vocab), ids that may not be drawn already at -inf.
        u: (rows,) uniforms in [0, 1), used above temperature 0; (rows, n) uniforms draw n tokens a row.
        need_entropy: also return the entropy (nats) of the distribution the token was drawn from.
        rows_at_once: bound on the fp32 temporaries.

    Returns:
        (token, confidence, entropy or None). Token and confidence are shaped like ``u``, the entropy is (rows,).
        At temperature 0 the token is the argmax. Its confidence is its unfiltered softmax probability at temperature 1.
        Above 0 temperature, top-k, top-p and softmax are applied in this order. The token is drawn by inverse CDF in
        the order of the ids. Its confidence is its filtered probability.
    """
    if len(u) <= rows_at_once:
        return _draw_rows(logits.float(), u, settings, need_entropy)
    return _join(
        [
            _draw_rows(chunk.float(), u_chunk, settings, need_entropy)
            for chunk, u_chunk in zip(logits.split(rows_at_once), u.split(rows_at_once), strict=True)
        ]
    )


@cache
def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a product of two matrices of ``dtype`` can end: fp32 on CUDA, from PyTorch 2.8 on."""
    if dtype.itemsize == 2:
        square = torch.zeros(16, 16, dtype=dtype, device=device)
        try:
            torch.mm(square, square, out_dtype=torch.float32)
        except (TypeError, NotImplementedError, RuntimeError):
            return dtype
        return torch.float32
    return dtype


def logits_of(hidden: Tensor, weight: Tensor, buffer: Tensor | None = None) -> Tensor:
    """(rows, width) hidden states -> (rows, vocab) fp32 logits, without gradients.

    Near 20 the numbers of bfloat16 are 0.125 apart, and a log-probability inherits that. So where the device can, the
    product is not rounded to the dtype of ``hidden`` and ``weight`` in between.

    Args:
        buffer: (rows, vocab) of ``product_dtype``; the product is written there.
    """
    if product_dtype(hidden.dtype, hidden.device) != hidden.dtype:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=buffer)
    return torch.mm(hidden, weight.T, out=buffer).float()


def project(hidden: Tensor, weight: Tensor, forbidden: Tensor) -> Tensor:
    """(rows, width) last hidden states -> (rows, vocab) fp32 logits, with -inf at the ids ``forbidden`` (n,)."""
    return logits_of(hidden, weight).index_fill_(-1, forbidden, -torch.inf)


def project_and_draw(
    hidden: Tensor,
    weight: Tensor,
    forbidden: Tensor,
    u: Tensor,
    settings: DecodeSettings,
    *,
    need_entropy: bool,
    rows_at_once: int,
    rows_drawn: int = 256,
) -> Draws:
    """``draw`` from the last hidden states (rows, width). The logits of ``rows_at_once`` rows are in memory at once."""
    if len(u) <= rows_at_once:
        logits = project(hidden, weight, forbidden)
        return draw(logits, u, settings, need_entropy=need_entropy, rows_at_once=rows_drawn)
    return _join(
        [
            draw(project(h, weight, forbidden), of_rows, settings, need_entropy=need_entropy, rows_at_once=rows_drawn)
            for h, of_rows in zip(hidden.split(rows_at_once), u.split(rows_at_once), strict=True)
        ]
    )


def _join(parts: list[Draws]) -> Draws:
    if len(parts) == 1:
        return parts[0]
    token, confidence, entropy = zip(*parts, strict=True)
    return torch.cat(token), torch.cat(confidence), None if entropy[0] is None else torch.cat(entropy)


def _draw_rows(logits: Tensor, u: Tensor, settings: DecodeSettings, need_entropy: bool) -> Draws:
    if settings.temperature == 0:
        top, token = logits.max(-1)
        confidence = torch.exp(top - logits.logsumexp(-1))
        return token, confidence, _entropy(logits.softmax(-1)) if need_entropy else None
    probability = distribution(logits, settings)
    if u.dim() == 1:
        token = inverse_cdf(probability, u).unsqueeze(-1)
    else:
        token = torch.stack([inverse_cdf(probability, each) for each in u.unbind(-1)], -1)
    confidence = probability.gather(-1, token).view_as(u)
    return token.view_as(u), confidence, _entropy(probability) if need_entropy else None


def distribution(logits: Tensor, settings: DecodeSettings) -> Tensor:
    """(rows, vocab) logits -> the sampling distribution above temperature 0: temperature, top-k, top-p, softmax."""
    return filter_logits(logits / settings.temperature, settings.top_k, settings.top_p).softmax(-1)


def inverse_cdf(probability: Tensor, u: Tensor, width: int = 512) -> Tensor:
    """The ids (rows,) at which the running sums of (rows, vocab) probabilities pass the uniforms (rows,).

    The search has two levels: first the parts of ``width`` ids, then the ids of one part. One running sum over 152k ids
    would take longer than the rest of sampling. An id of probability 0 is never returned. On a GPU this needs a check:
    rounding in a parallel scan can raise a running sum at an id of probability 0 (pytorch issue 21780). Such a draw
    takes the most likely part, and the most likely id in it.
    """
    vocab = probability.shape[-1]
    if vocab <= width:  # one part; the rest of the target is rounded as below
        total = probability.sum(-1, keepdim=True)
        target = torch.minimum(u.unsqueeze(-1) * total, total * (1 - 2**-23))
        return _passed(probability, (target - total + total).clamp_(min=0))[0].squeeze(-1)
    whole = vocab // width * width
    parts = probability[:, :whole].unflatten(-1, (whole // width, width)).sum(-1)
    parts = torch.cat([parts, probability[:, whole:].sum(-1, keepdim=True)], -1)
    part, rest = _pass(parts, u.unsqueeze(-1) * parts.sum(-1, keepdim=True))
    ids = part * width + torch.arange(width, device=part.device)
    inside = probability.gather(-1, ids.clamp(max=vocab - 1)).masked_fill_(ids >= vocab, 0)
    return ids.gather(-1, _passed(inside, rest)[0]).squeeze(-1)


def _pass(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The index where the running sum of (rows, n) masses passes the target (rows, 1), and the target's rest there."""
    place, running, target = _passed(mass, target)
    return place, (target - running.gather(-1, place) + mass.gather(-1, place)).clamp_(min=0)


def _passed(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The index of ``_pass``, the running sums, and the target below their total."""
    running = mass.cumsum(-1)
    target = torch.minimum(target, running[:, -1:] * (1 - 2**-23))  # below the total, so that the sum passes it
    place = torch.searchsorted(running, target, right=True).clamp_(max=mass.shape[-1] - 1)
    return torch.where(mass.gather(-1, place) > 0, place, mass.argmax(-1, keepdim=True)), running, target


def _entropy(probability: Tensor) -> Tensor:
    return torch.special.entr(probability).sum(-1)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits outside top-k, then outside the nucleus of top-p, to -inf. logits: (rows, vocab).

    Only the largest candidates are sorted: a full sort of a 152k vocabulary costs more than the model. The result is
    exact, because the number of candidates grows until they hold the nucleus.
    """
    vocab = logits.shape[-1]
    if 0 < top_k < vocab:
        kept, ids = logits.topk(top_k, dim=-1)
        if top_p < 1:
            kept = _nucleus(kept, kept.softmax(-1), top_p)
        return torch.full_like(logits, -torch.inf).scatter(-1, ids, kept)
    if top_p >= 1:
        return logits
    total = logits.logsumexp(-1, keepdim=True)
    width = min(1024, vocab)
    while True:
        kept, ids = logits.topk(width, dim=-1)
        probability = (kept - total).exp()
        if width == vocab or bool((probability.sum(-1) >= top_p).all()):
            return torch.full_like(logits, -torch.inf).scatter(-1, ids, _nucleus(kept, probability, top_p))
        width = min(width * 8, vocab)


def _nucleus(sorted_logits: Tensor, probability: Tensor, top_p: float) -> Tensor:
    """Keep the smallest head of a descending row whose mass reaches top_p (always at least the first)."""
    mass_before = probability.cumsum(-1) - probability
    mass_before[..., :1].zero_()
    return sorted_logits.masked_fill(mass_before >= top_p, -torch.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing the positions


def share(stage: Tensor, settings: DecodeSettings) -> Tensor:
    """Number of tokens that step ``stage`` = 0, 1, ... of a block unmasks. The first steps take the remainder."""
    base, extra = divmod(settings.block_size, settings.denoising_steps_per_block)
    return base + (stage < extra).long()


def quota(settings: DecodeSettings, device=None) -> Tensor:
    """The shares of all steps of a block: (denoising_steps_per_block,)."""
    return share(torch.arange(settings.denoising_steps_per_block, device=device), settings)


def on_grid(masked: Tensor, drawn: Draws) -> Draws:
    """``values``, one for each True of ``masked`` (rows, block), in its shape; 0 elsewhere."""
    token, confidence, entropy = drawn

    def grid(values: Tensor) -> Tensor:
        return torch.zeros(masked.shape, dtype=values.dtype, device=values.device).masked_scatter(masked, values)

    return grid(token), grid(confidence), None if entropy is None else grid(entropy)


def choose(
    masked: Tensor,
    confidence: Tensor,
    entropy: Tensor | None,
    settings: DecodeSettings,
    *,
    key: Tensor,
    position: Tensor,
    step: Tensor,
    stage: Tensor,
) -> Tensor:
    """The positions that the strategy of ``settings`` unmasks in one step.

    Args:
        masked: (rows, block) bool, the positions still masked.
        confidence, entropy: (rows, block), see StepView.
        key, step: (rows,), random stream and the number of this step in the answer. position: (rows, block), absolute.
        stage: (rows,), steps done in the block.

    Returns:
        (rows, block) bool, a subset of ``masked``. The last of max(steps, positions) steps unmasks all masks that are
        left, so every block ends under every strategy.
    """
    strategy = strategy_named(settings.remasking_strategy)
    order = confidence  # of no use to a strategy that needs no random order
    if strategy.needs_order:
        order = uniforms(key.unsqueeze(-1), position, step.unsqueeze(-1), stream=1)
    view = StepView(masked, confidence, entropy, order, stage, share(stage, settings))
    chosen = strategy.choose(view, settings)
    last = max(settings.block_size, settings.denoising_steps_per_block) - 1
    return masked & (chosen | (stage >= last).unsqueeze(-1))

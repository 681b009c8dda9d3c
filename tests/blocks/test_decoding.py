"""The rules of one denoising step against slow loops and full sorts."""

import math

import pytest
import torch

from t3d.blocks.decoding import (
    choose,
    draw,
    filter_logits,
    inverse_cdf,
    logits_of,
    product_dtype,
    quota,
    stream_key,
    uniforms,
)
from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import StepView, names, strategy_named

NONE = -math.inf
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Shares of a block


def test_quota_sums_to_the_block_and_the_first_steps_take_the_remainder():
    for block in range(1, 17):
        for steps in range(1, block + 1):
            shares = quota(DecodeSettings(block_size=block, denoising_steps_per_block=steps)).tolist()
            assert len(shares) == steps and sum(shares) == block
            assert max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)
    assert quota(DecodeSettings(block_size=8, denoising_steps_per_block=3)).tolist() == [3, 3, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Which positions


def slow_choice(masked, confidence, share, settings, entropy, order) -> list[bool]:
    """The rule of each strategy for one row, one position at a time."""
    left = [i for i, hidden in enumerate(masked) if hidden]
    strategy, picked = settings.remasking_strategy, []
    if strategy == "ancestral":  # the first of four steps, linear schedule
        return [hidden and order[i] < 1 / 4 for i, hidden in enumerate(masked)]
    if strategy == "sub_blocks":
        left = [i for i in left if i // 8 == left[0] // 8]
    if strategy in ("low_confidence_dynamic", "sub_blocks"):
        picked = [i for i in left if confidence[i] > settings.dynamic_threshold]
        left = [i for i in left if i not in picked]
    total = 0.0
    while left:
        if strategy == "sequential":
            best = left[0]
        elif strategy == "random":
            best = max(left, key=lambda i: (order[i], -i))
        elif strategy == "entropy_bounded":
            best = min(left, key=lambda i: (entropy[i], i))
        else:
            best = max(left, key=lambda i: (confidence[i], -i))
        if strategy == "entropy_bounded":
            total += entropy[best]
            less = entropy[best] if settings.eb_bound == "sum_less_largest" else 0.0
            if picked and total - less > settings.eb_threshold:
                break
        elif len(picked) >= share:
            break
        picked.append(best)
        left.remove(best)
    return [i in picked for i in range(len(masked))]


@pytest.mark.parametrize(
    "strategy, more", [(name, {}) for name in names()] + [("entropy_bounded", {"eb_bound": "sum_less_largest"})]
)
@pytest.mark.parametrize("block", [1, 4, 7, 20])
def test_choice_equals_the_slow_rule(strategy, more, block):
    """With many ties (values on a coarse grid), shares beyond what is masked, and rows without a mask."""
    generator = torch.Generator().manual_seed(block)
    settings = DecodeSettings(remasking_strategy=strategy, dynamic_threshold=0.5, eb_threshold=0.6, **more)
    rows = 300
    masked = torch.rand(rows, block, generator=generator) < 0.6
    confidence, entropy, order = (torch.randint(5, (rows, block), generator=generator) / 4 for _ in range(3))
    share = torch.randint(1, block + 2, (rows,), generator=generator)
    view = StepView(masked, confidence, entropy, order, torch.zeros_like(share), share)
    got = strategy_named(strategy).choose(view, settings)
    tables = [values.tolist() for values in (masked, confidence, share, entropy, order)]
    expected = [slow_choice(m, c, n, settings, e, o) for m, c, n, e, o in zip(*tables, strict=True)]
    assert got.tolist() == expected
    assert not (got & ~masked).any()
    assert strategy_named(strategy).may_choose_none or torch.equal(got.any(-1), masked.any(-1))


def test_ties_go_left():
    masked, flat = torch.tensor([[False, True, True, True]]), torch.full((1, 4), 0.5)
    for strategy in set(names()) - {"ancestral"}:  # whose lots know no ties
        settings = DecodeSettings(remasking_strategy=strategy, eb_threshold=1.2)
        view = StepView(masked, flat, flat, flat, torch.tensor([0]), torch.tensor([2]))
        got = strategy_named(strategy).choose(view, settings)
        assert got.tolist() == [[False, True, True, False]], strategy


def test_a_sure_position_that_is_not_masked_is_never_chosen():
    """The release's static top-k overwrote prompt tokens when fewer positions than the share were masked."""
    masked = torch.tensor([[False, False, False, True]])
    confidence = torch.tensor([[9.0, 9.0, 9.0, 0.0]])
    for strategy in names():
        settings = DecodeSettings(remasking_strategy=strategy, denoising_steps_per_block=1)
        at = {"key": torch.tensor([1]), "position": torch.arange(4)[None], "step": torch.tensor([1])}
        got = choose(masked, confidence, -confidence, settings, stage=torch.tensor([0]), **at)
        assert got.tolist() == [[False, False, False, True]]


# ---------------------------------------------------------------------------------------------------------------------
# Which token


def slow_distribution(logits: list[float], settings: DecodeSettings) -> list[float]:
    """Temperature, then top-k, then top-p, then softmax, by a full sort of one row."""
    scaled = [value / settings.temperature for value in logits]
    ids = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if settings.top_k:
        ids = ids[: settings.top_k]
    mass = {i: math.exp(scaled[i] - scaled[ids[0]]) for i in ids}
    total = sum(mass.values())
    kept, reached = [], 0.0
    for i in ids:
        kept.append(i)
        reached += mass[i] / total
        if reached >= settings.top_p:
            break
    total = sum(mass[i] for i in kept)
    return [mass[i] / total if i in kept else 0.0 for i in range(len(scaled))]


SAMPLED = [
    DecodeSettings(temperature=1.0),
    DecodeSettings(temperature=0.5),
    DecodeSettings(temperature=2.0, top_k=6),
    DecodeSettings(temperature=1.0, top_p=0.7),
    DecodeSettings(temperature=2.0, top_k=10, top_p=0.6),
    DecodeSettings(temperature=0.3, top_p=0.95),
    DecodeSettings(temperature=1.0, top_k=1),
]


@pytest.mark.parametrize("settings", SAMPLED, ids=lambda s: f"T{s.temperature}-k{s.top_k}-p{s.top_p}")
def test_drawn_tokens_follow_the_filtered_distribution(settings):
    """An even grid of u gives every token its probability, to one part of the grid; ids rise with u."""
    logits, n = random_logits(3, 40), 4000
    logits[:, [0, 7, 39]] = NONE
    u = (torch.arange(n) + 0.5) / n
    for row in logits:
        expected = torch.tensor(slow_distribution(row.tolist(), settings))
        token, confidence, entropy = draw(row.expand(n, -1), u, settings, need_entropy=True)
        share = torch.bincount(token, minlength=40) / n
        assert (share - expected).abs().max() <= 1.01 / n
        assert not share[expected == 0].any()
        torch.testing.assert_close(confidence, expected[token], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(entropy, torch.special.entr(expected).sum().expand(n), rtol=1e-4, atol=1e-5)
        assert (token.diff() >= 0).all()


def test_top_k_comes_before_top_p():
    """Half of the whole mass is the first token alone; half of the top two's, too; .7 of the top two's needs both."""
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    kept = filter_logits(logits, 2, 0.7).isfinite()[0].tolist()
    assert kept[0] and sum(kept) == 2
    assert filter_logits(logits, 2, 0.65).isfinite()[0].tolist() == [True, False, False, False]
    assert filter_logits(logits, 0, 0.65).isfinite().sum() == 3


def test_greedy_takes_the_left_of_the_best_and_the_plain_softmax():
    """Temperature 0: no temperature, no top-k and no top-p in the confidence."""
    logits = random_logits(50, 30)
    logits[:25, 11] = logits[:25, 4] = 9.0
    settings = DecodeSettings(temperature=0.0, top_k=2, top_p=0.1)
    token, confidence, entropy = draw(logits, torch.zeros(50), settings, need_entropy=True)
    for row, got, sure, nats in zip(logits.tolist(), token.tolist(), confidence, entropy, strict=True):
        probability = torch.tensor(row).softmax(-1)
        assert got == row.index(max(row))
        torch.testing.assert_close(sure, probability[got])
        torch.testing.assert_close(nats, torch.distributions.Categorical(probability).entropy())
    assert (token[:25] == 4).all()
    assert draw(logits, torch.zeros(50), settings)[2] is None


@pytest.mark.parametrize("settings", SAMPLED + [DecodeSettings(temperature=0.0)], ids=lambda s: f"{s.temperature}")
def test_a_forbidden_token_is_never_drawn(settings):
    """Also at the ends of u, with forbidden ids first, last and in long runs, and rounding in the running sum."""
    logits = random_logits(200, 700, scale=0.1)
    forbidden = torch.zeros(700, dtype=torch.bool)
    forbidden[:50] = forbidden[300:310] = forbidden[500:] = True
    logits[:, forbidden] = NONE
    logits[:20, 20:] = NONE
    logits[:20, 3] = 0.0  # one token is left
    for u in (0.0, 2.0**-24, 0.5, 1 - 2.0**-20, 1 - 2.0**-24):
        token, confidence, _ = draw(logits, torch.full((200,), u), settings)
        assert (token[:20] == 3).all() and (confidence[:20] == 1).all()
        assert not forbidden[token[20:]].any(), u
        assert (confidence > 0).all() and confidence.isfinite().all()


def test_a_running_sum_that_is_not_monotone_draws_nothing_forbidden(monkeypatch):
    """As parallel scans on GPUs are (pytorch issue 21780): steps of a rounding error where nothing is added."""
    exact, generator = torch.Tensor.cumsum, torch.Generator().manual_seed(0)

    def scan(x, dim):
        return exact(x, dim) + 1e-3 * (torch.rand(x.shape, generator=generator) - 0.5)

    monkeypatch.setattr(torch.Tensor, "cumsum", scan)
    logits, n = random_logits(1, 100), 5000
    logits[:, 20:80] = NONE
    token, confidence, _ = draw(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, DecodeSettings(temperature=1.0))
    assert not ((token >= 20) & (token < 80)).any() and (confidence > 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_nothing_forbidden():
    logits, n = random_logits(64, 151936).cuda(), 151000
    logits[:, 40000:60000] = logits[:, n:] = NONE
    for step in range(200):
        u = torch.rand(64, generator=torch.Generator().manual_seed(step)).cuda()
        for settings in (DecodeSettings(temperature=1.0), DecodeSettings(temperature=1.0, top_p=0.9)):
            token, confidence, _ = draw(logits, u, settings)
            assert (confidence > 0).all() and logits.gather(-1, token[:, None]).isfinite().all()


def test_rows_at_once_changes_nothing_and_no_rows_give_no_tokens():
    logits, u, settings = random_logits(10, 20), torch.rand(10), DecodeSettings(temperature=1.0, top_p=0.9)
    whole = draw(logits, u, settings, need_entropy=True)
    parts = draw(logits, u, settings, need_entropy=True, rows_at_once=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    token, confidence, entropy = draw(logits[:0], u[:0], settings, need_entropy=True)
    assert token.shape == confidence.shape == entropy.shape == (0,) and token.dtype == torch.long


def nucleus_by_full_sort(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """(rows, vocab) bool, in float64."""
    kept = torch.zeros(logits.shape, dtype=torch.bool)
    for row, flags in zip(logits.double(), kept, strict=True):
        ids = row.argsort(descending=True)[: top_k or None]
        mass = row[ids].softmax(-1).cumsum(-1)
        flags[ids[: int((mass < top_p).sum()) + 1]] = True
    return kept


@pytest.mark.parametrize(
    "vocab, scale, top_k, top_p, width",
    [
        (50, 2.0, 0, 0.8, 50),
        (50, 2.0, 7, 0.8, 50),
        (50, 2.0, 60, 0.5, 50),
        (3000, 3.0, 0, 0.5, 1024),  # the nucleus lies within the first candidates
        (3000, 0.5, 0, 0.9, 3000),  # they are widened to the whole vocabulary
        (12000, 0.5, 0, 0.3, 8192),  # once
        (3000, 0.5, 2000, 0.9, 2000),
    ],
)
def test_filter_equals_a_full_sort(vocab, scale, top_k, top_p, width):
    logits = random_logits(4, vocab, scale=scale)
    got = filter_logits(logits, top_k, top_p)
    expected = nucleus_by_full_sort(logits, top_k, top_p)
    assert torch.equal(got.isfinite(), expected)
    assert torch.equal(got[expected], logits[expected])
    assert expected.sum(-1).max() <= width and (width <= 1024 or expected.sum(-1).max() > 1024)


def test_one_flat_row_widens_the_candidates_of_all():
    logits = torch.cat([random_logits(3, 4000, scale=5.0), random_logits(1, 4000, scale=0.1)])
    assert torch.equal(filter_logits(logits, 0, 0.95).isfinite(), nucleus_by_full_sort(logits, 0, 0.95))


def test_filters_at_their_defaults_leave_the_logits_alone():
    logits = random_logits(2, 30)
    assert torch.equal(filter_logits(logits, 0, 1.0), logits)
    assert torch.equal(filter_logits(logits, 30, 1.0), logits)


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers


def grid(key: int, positions: int = 256, steps: int = 256, stream: int = 0) -> torch.Tensor:
    return uniforms(torch.tensor(key), torch.arange(positions)[:, None], torch.arange(steps)[None], stream)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_uniforms_are_uniform_and_independent_over_positions_steps_streams_and_keys():
    """65,536 numbers: the standard error of the mean is .0011, of a correlation .004."""
    key = stream_key(0, "MATH_train/7", 0)
    u = grid(key)
    assert u.dtype == torch.float32 and float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 1 / 2) < 0.005
    assert abs(float(u.var()) - 1 / 12) < 0.002
    assert (torch.histc(u, 16, 0, 1) / u.numel() - 1 / 16).abs().max() < 0.005
    assert max(abs(float(row.mean()) - 0.5) for row in (*u, *u.T)) < 0.1  # no position and no step is special
    others = {
        "step": (u[:, 1:], u[:, :-1]),
        "position": (u[1:], u[:-1]),
        "diagonal": (u[1:, 1:], u[:-1, :-1]),
        "stream": (u, grid(key, stream=1)),
        "neighbour": (u[1:], grid(key, stream=1)[:-1]),
        "sample": (u, grid(stream_key(0, "MATH_train/7", 1))),
        "key": (grid(1), grid(2)),
    }
    for name, (a, b) in others.items():
        assert abs(correlation(a, b)) < 0.02, name
        assert not (a == b).float().mean() > 1e-4, name


def test_uniforms_are_a_pure_function():
    key = torch.tensor([3, -(2**62)])
    whole = uniforms(key[:, None], torch.tensor([[5, 6]]), torch.tensor([[9], [10]]))
    for row, (k, step) in enumerate(zip(key, (9, 10), strict=True)):
        for column, position in enumerate((5, 6)):
            assert whole[row, column] == uniforms(k, torch.tensor(position), torch.tensor(step))
    torch.manual_seed(1)
    assert torch.equal(whole, uniforms(key[:, None], torch.tensor([[5, 6]]), torch.tensor([[9], [10]])))


def test_stream_keys_differ_by_seed_prompt_and_sample():
    names = [(seed, prompt, sample) for seed in range(3) for prompt in ("a/1", "a/11", "b/1") for sample in range(3)]
    keys = [stream_key(*name) for name in names]
    assert len(set(keys)) == len(names) and keys == [stream_key(*name) for name in names]
    assert all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize("vocab", [2, 140, 512])
def test_a_short_vocabulary_draws_as_a_long_one_to_the_bit(vocab):
    """One more id of probability 0 than a part has takes the search of two levels."""
    generator = torch.Generator().manual_seed(vocab)
    probability = (4 * torch.randn(4000, vocab, generator=generator)).softmax(-1)
    u = torch.rand(4000, generator=generator)
    padded = torch.cat([probability, torch.zeros(4000, 513 - vocab)], -1)
    assert torch.equal(inverse_cdf(probability, u), inverse_cdf(padded, u))


@pytest.mark.parametrize("name", names())
def test_a_strategy_that_needs_no_order_does_not_read_it(name):
    """With an order that is no numbers it chooses the same."""
    strategy, settings = strategy_named(name), DecodeSettings(denoising_steps_per_block=2, remasking_strategy=name)
    generator = torch.Generator().manual_seed(0)
    masked, (confidence, order) = (
        torch.rand(50, 4, generator=generator) < 0.7,
        torch.rand(2, 50, 4, generator=generator),
    )
    stage, share = torch.zeros(50, dtype=torch.long), torch.full((50,), 2)
    view = StepView(masked, confidence, confidence, order, stage, share)
    chosen = [
        strategy.choose(view._replace(order=o), settings) & masked for o in (order, torch.full_like(order, torch.nan))
    ]
    assert torch.equal(*chosen) != strategy.needs_order


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_fp32_with_and_without_a_buffer(device, dtype):
    """On a GPU no rounding to bfloat16 comes in between; elsewhere the error is that of a rounded product."""
    hidden, weight = (random_logits(n, 64, n).to(device, dtype) for n in (5, 90))
    kept = product_dtype(dtype, hidden.device)
    exact = hidden.double() @ weight.double().T
    for buffer in (None, torch.empty(5, 90, dtype=kept, device=device)):
        logits = logits_of(hidden, weight, buffer)
        error = ((logits - exact).abs() / exact.abs().clamp(min=1)).max()
        assert logits.dtype == torch.float32 and error < (1e-4 if kept == torch.float32 else 2**-8)
    assert device == "cpu" or kept == torch.float32 or "dtype" not in torch.ops.aten.mm.overloads()

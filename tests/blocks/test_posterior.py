"""MDLM's reverse step, and ancestral sampling: the laws of the counts and of the order."""

from collections import Counter
from dataclasses import replace
from itertools import permutations
from math import comb

import pytest
import torch

from t3d.blocks.decoding import choose
from t3d.blocks.posterior import alpha, posterior, reveal_probability
from t3d.blocks.settings import DecodeSettings

MASK, VOCAB, BLOCK = 4, 5, 4
SCHEDULES = ["linear", "cosine"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_begins_clean_and_ends_masked(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    kept = alpha(t, schedule)
    assert kept[0] == 1 and abs(float(kept[-1])) < 1e-12 and (kept.diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_reverse_steps_are_one(schedule):
    """Chapman-Kolmogorov: sum over z_s of q(z_r | z_s, x) q(z_s | z_t, x) = q(z_r | z_t, x), for every z_t."""
    r, s, t = (torch.tensor(value, dtype=torch.float64) for value in (0.2, 0.5, 0.9))
    for token in range(MASK):
        x = torch.nn.functional.one_hot(torch.tensor(token), VOCAB).double()
        for z_t in (token, MASK):
            direct = posterior(torch.tensor(z_t), x, r, t, schedule, MASK)
            first = posterior(torch.tensor(z_t), x, s, t, schedule, MASK)
            second = sum(first[z] * posterior(torch.tensor(z), x, r, s, schedule, MASK) for z in (token, MASK))
            torch.testing.assert_close(direct, second)
            assert direct.sum() == pytest.approx(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_is_bayes_rule(schedule):
    """q(z_s | z_t, x) = q(z_t | z_s) q(z_s | x) / q(z_t | x) by counting a simulated forward process."""
    n, generator = 200_000, torch.Generator().manual_seed(0)
    s, t = torch.tensor(0.3), torch.tensor(0.7)
    at_s, at_t = alpha(s, schedule), alpha(t, schedule)
    masked_at_s = torch.rand(n, generator=generator) >= at_s
    masked_at_t = masked_at_s | (torch.rand(n, generator=generator) >= at_t / at_s)
    revealed = (~masked_at_s & masked_at_t).sum() / masked_at_t.sum()
    assert float(revealed) == pytest.approx(float(reveal_probability(s, t, schedule)), abs=0.005)
    x = torch.tensor([0.0, 0.25, 0.75, 0.0, 0.0])
    got = posterior(torch.tensor([MASK, 2]), x.expand(2, -1), s, t, schedule, MASK)
    torch.testing.assert_close(got[0, :MASK], x[:MASK] * reveal_probability(s, t, schedule))
    assert got[1].tolist() == [0, 0, 1, 0, 0]


def ancestral(rows: int, steps: int, schedule: str = "linear", seed: int = 0) -> torch.Tensor:
    """The step that reveals each token of ``rows`` blocks, by the decoder's own ``choose``: (rows, BLOCK), from 1."""
    settings = DecodeSettings(
        block_size=BLOCK,
        denoising_steps_per_block=steps,
        remasking_strategy="ancestral",
        ancestral_schedule=schedule,
    )
    key = torch.randint(2**62, (rows,), generator=torch.Generator().manual_seed(seed))
    position, when = torch.arange(BLOCK).expand(rows, -1), torch.zeros(rows, BLOCK, dtype=torch.long)
    for stage in range(steps):
        masked, at = when == 0, {"key": key, "position": position}
        at |= {"step": torch.full((rows,), stage + 1), "stage": torch.full((rows,), stage)}
        when[choose(masked, torch.zeros(rows, BLOCK), None, settings, **at)] = stage + 1
    return when


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_a_step_reveals_a_binomial_number(schedule, steps):
    """Of the m tokens masked at time t, k with probability C(m, k) p^k (1 - p)^(m - k). 20,000 blocks a step."""
    when = ancestral(20_000, steps, schedule)
    assert (when >= 1).all() and (when <= steps).all()
    for stage in range(steps):
        s, t = (torch.tensor((steps - stage - back) / steps, dtype=torch.float64) for back in (1, 0))
        p = float(reveal_probability(s, t, schedule))
        left = (when > stage).sum(-1)
        for m in range(1, BLOCK + 1):
            revealed = (when[left == m] == stage + 1).sum(-1)
            n = len(revealed)
            for k in range(m + 1):
                share = comb(m, k) * p**k * (1 - p) ** (m - k)
                sigma = (n * share * (1 - share)) ** 0.5
                assert abs(int((revealed == k).sum()) - n * share) <= 4.5 * sigma + 1e-6, (stage, m, k)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_many_steps_every_order_is_as_likely(schedule):
    """400 steps: hardly any block reveals two tokens at once, and the 24 orders of the rest come evenly."""
    when = ancestral(24_000, 400, schedule)
    distinct = [row for row in when.tolist() if len(set(row)) == BLOCK]
    assert len(distinct) > 0.97 * len(when)
    counts = Counter(tuple(sorted(range(BLOCK), key=row.__getitem__)) for row in distinct)
    expected = len(distinct) / 24
    chi2 = sum((counts[order] - expected) ** 2 / expected for order in permutations(range(BLOCK)))
    assert chi2 < 53.5  # 23 degrees of freedom, p = .0003


def test_the_schedule_of_the_settings_counts():
    """Of four steps the first reveals 1/4 of the tokens (linear), or cos(3 pi / 8) = .38 of them (cosine)."""
    shares = [float((ancestral(20_000, 4, schedule) == 1).float().mean()) for schedule in SCHEDULES]
    assert shares == pytest.approx([0.25, 0.3827], abs=0.01)


def test_the_last_step_reveals_all_whatever_rounding_says():
    settings = DecodeSettings(denoising_steps_per_block=3, remasking_strategy="ancestral")
    for each in (settings, replace(settings, ancestral_schedule="cosine")):
        masked, n = torch.ones(1000, 4, dtype=torch.bool), torch.arange(1000)
        at = {"key": n, "position": torch.arange(4).expand(1000, -1), "step": n, "stage": torch.full((1000,), 2)}
        assert choose(masked, torch.zeros(1000, 4), None, each, **at).all()

"""The T3D loss, whole batches with their gradients, against a slow loop over sequences, blocks and tokens."""

import math

import pytest
import torch

from t3d.objectives.t3d import T3D, T3DSettings
from t3d.states.base import PER_TARGET, collate
from tests.conftest import MASK, PAD, tiny_model
from tests.states.test_states import ORDINARY, noise, trajectory
from tests.test_training_equals_decoding import plain_logits

SAMPLES = [trajectory(*lengths) for lengths in [(1, 3), (3, 9), (5, 1), (6, 7)]]
BLOCK, POST, ALPHA, BETA, LAMBDA = 4, 2, 0.6, 0.7, 0.3  # a beta large enough for the losses to differ
VARIANTS = {
    "plain": {},
    "sampled y": {"reference_temp": 0.8},
    "per block": {"ddo_level": "block"},
    "levels": {"path_loss": "levels", "path_k_steps": 3},
    "levels per block": {"path_loss": "levels", "path_k_steps": 2, "ddo_level": "block"},
    "sum": {"ddo_reduce": "sum", "beta": 0.1},
    "sum per block": {"ddo_reduce": "sum", "ddo_level": "block"},
    "own states": {"path_states": "own"},
    "forward KL beside DDO": {"ddo_weight": 0.4, "forward_kl_weight": 0.3},
}


def objective(block_size: int = BLOCK, chunk: int = 1024, **options) -> T3D:
    levels = options.get("path_loss") == "levels"
    own = options.get("path_states") == "own"
    looks = {"every_target": levels, "own_states": own}
    states = noise(block_size, random_ratio=0.0 if own else 0.2, mask_ratio_exponent=0.0, post_num=POST, **looks)
    settings = T3DSettings(**{"alpha": ALPHA, "beta": BETA, "lambda_path": LAMBDA, **options})
    return T3D(states, torch.tensor([MASK, 0]), settings, chunk)


def draw(t3d: T3D) -> list:
    return [t3d.noise(sample, torch.Generator().manual_seed(i)) for i, sample in enumerate(SAMPLES)]


def log_sigma(x):
    return -torch.log1p(torch.exp(-x))


def mean(values: list):
    return sum(values) / len(values)


def slow_loss(student, reference, sample, state, t3d: T3D) -> tuple[torch.Tensor, dict[str, float]]:
    """DESIGN 2, token by token, with the whole softmax of plain forwards over [earlier blocks | x_t of the block]."""
    size, settings = t3d.noise.block_size, t3d.settings
    mine = plain_logits(student, state, size).log_softmax(-1)
    raw = plain_logits(reference or student, state, size).detach()
    theirs = raw.log_softmax(-1)
    prompt = len(sample["prompt_ids"])
    x0 = sample["prompt_ids"] + sample["response_ids"]
    learnt = range(prompt, min(len(x0), prompt + sample["length"] + POST))
    step = dict(enumerate(sample["unmask_step"], prompt))

    def rank(p):
        return 1 + sum((step[q], q) < (step[p], p) for q in step if q // size == p // size)

    uniform = dict(zip(state.position.tolist(), state.u.tolist(), strict=True))
    blocks: dict[int, list] = {}  # block -> (log p of x0 and y by the student, by the reference, weighted path term)
    for p in learnt:
        at = p - state.start
        if state.noisy[at] != MASK and state.noisy[at] not in ORDINARY:
            continue
        allowed = raw[at].clone()
        allowed[[MASK, 0]] = -torch.inf
        if settings.reference_temp == 0:
            y = int(allowed.argmax())
        else:
            cdf = (allowed / settings.reference_temp).softmax(-1).cumsum(-1).tolist()
            y = next(token for token, reached in enumerate(cdf) if reached > uniform[p])
        path = -(size - rank(p) + 1) / size * mine[at, x0[p]]
        blocks.setdefault(p // size, []).append((mine[at, x0[p]], theirs[at, x0[p]], mine[at, y], theirs[at, y], path))
    tokens = [token for block in blocks.values() for token in block]
    real, fake = [], []
    reduce = sum if settings.ddo_reduce == "sum" else mean
    for group in blocks.values() if settings.ddo_level == "block" else [tokens]:
        s_real, r_real, s_fake, r_fake = (reduce([token[i] for token in group]) for i in range(4))
        real.append(-log_sigma(settings.beta * (s_real - r_real)))
        fake.append(-settings.alpha * log_sigma(-settings.beta * (s_fake - r_fake)))
    path = mean([token[4] for token in tokens])
    if settings.path_loss == "levels":
        levels = []
        for level in range(1, math.ceil(size / settings.path_k_steps) + 1):
            answer = range(prompt, prompt + sample["length"])  # what lies behind the end is DDO's alone
            first = [p for p in answer if rank(p) <= level * settings.path_k_steps]
            levels.append(mean([-mine[p - state.start, x0[p]] for p in first]) if first else torch.zeros(()))
        path = mean(levels)
    if settings.path_states == "own":
        path = mean([-(size - rank(p) + 1) / size * own_log_prob(student, x0, step, p, size) for p in learnt])
    forward_kl = -mean([token[0] for token in tokens])
    loss = (
        settings.ddo_weight * (mean(real) + mean(fake))
        + settings.forward_kl_weight * forward_kl
        + settings.lambda_path * path
    )
    s_real, r_real, s_fake, r_fake = (reduce([token[i].item() for token in tokens]) for i in range(4))
    return loss, {
        "ddo": (mean(real) + mean(fake)).item(),
        "ddo_real": mean(real).item(),
        "ddo_fake": mean(fake).item(),
        "path": path.item(),
        "logp_student_real": s_real,
        "logp_student_fake": s_fake,
        "logp_reference_real": r_real,
        "logp_reference_fake": r_fake,
        "reward_margin": settings.beta * ((s_real - r_real) - (s_fake - r_fake)),
        "ddo_accuracy": float(s_real - r_real > s_fake - r_fake),
        **({"forward_kl": forward_kl.item()} if settings.forward_kl_weight else {}),
    }


def own_log_prob(student, x0: list[int], step: dict[int, int], p: int, size: int) -> torch.Tensor:
    """log p of token p where its block shows the tokens of earlier steps alone: one plain forward."""
    start = p // size * size
    block = range(start, start + size)
    shown = [x0[q] if q < len(x0) and (q not in step or step[q] < step[p]) else MASK for q in block]
    student.config.block_size = size
    logits = student(torch.tensor([x0[:start] + shown])).logits[0, p]
    return logits.log_softmax(-1)[x0[p]]


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_same_gradients(model, loss, other_loss):
    got, expected = gradients(model, loss), gradients(model, other_loss)
    assert sum(float(g.abs().sum()) for g in expected) > 0.1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("block_size", [4, 8])
@pytest.mark.parametrize("with_reference", [True, False], ids=["reference", "ref = student"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_slow_loop(options, with_reference, block_size):
    student, reference = tiny_model(0), tiny_model(1) if with_reference else None
    t3d = objective(block_size, chunk=5, **options)
    states = draw(t3d)
    loss, metrics = t3d(student, reference, collate([states[:1], states[1:3], states[3:]], PAD))
    pairs = zip(SAMPLES, states, strict=True)
    slow, slow_metrics = zip(*(slow_loss(student, reference, *pair, t3d) for pair in pairs), strict=True)
    torch.testing.assert_close(loss, torch.stack(slow), rtol=1e-4, atol=1e-5)
    assert set(metrics) == set(slow_metrics[0])
    for name, values in metrics.items():
        assert not values.requires_grad and values.shape == (4,), name
        assert values.tolist() == pytest.approx([m[name] for m in slow_metrics], rel=1e-4, abs=1e-5), name
    assert_same_gradients(student, loss.sum(), sum(slow))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_one_batch_of_four_is_four_batches_of_one(options):
    student, reference, t3d = tiny_model(0), tiny_model(1), objective(**options)
    states = draw(t3d)
    together = t3d(student, reference, collate([[state] for state in states], PAD))
    alone = [t3d(student, reference, collate([[state]], PAD)) for state in states]
    torch.testing.assert_close(together.loss, torch.cat([terms.loss for terms in alone]))
    for name, values in together.metrics.items():
        torch.testing.assert_close(values, torch.cat([terms.metrics[name] for terms in alone]))
    assert_same_gradients(student, together.loss.sum(), sum(terms.loss.sum() for terms in alone))


def test_at_the_reference_ddo_is_log_two_times_one_plus_alpha():
    student, t3d = tiny_model(0), objective()
    for reference in (None, tiny_model(0)):
        terms = t3d(student, reference, collate([draw(t3d)], PAD))
        torch.testing.assert_close(terms.metrics["ddo"], torch.full((4,), math.log(2) * (1 + ALPHA)))
        assert terms.metrics["reward_margin"].abs().max() < 1e-5


def test_without_a_reference_the_gradient_is_that_of_a_frozen_copy():
    student, t3d = tiny_model(0), objective(reference_temp=0.5)
    batch = collate([draw(t3d)], PAD)
    assert_same_gradients(student, t3d(student, None, batch).loss.sum(), t3d(student, tiny_model(0), batch).loss.sum())


def test_gradients_never_reach_the_reference():
    student, reference, t3d = tiny_model(0), tiny_model(1), objective(**VARIANTS["levels per block"])
    t3d(student, reference, collate([draw(t3d)], PAD)).loss.sum().backward()
    assert all(p.grad is None for p in reference.parameters())
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("with_reference", [True, False])
def test_one_forward_of_each(with_reference):
    t3d, calls = objective(), []

    def counted(who, model):
        def forward(*args, **kwargs):
            calls.append(who)
            return model(*args, **kwargs)

        return forward

    reference = counted("reference", tiny_model(1)) if with_reference else None
    t3d(counted("student", tiny_model(0)), reference, collate([draw(t3d)], PAD))
    assert sorted(calls) == (["reference", "student"] if with_reference else ["student"])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_batch_with_nothing_to_learn_gives_a_zero_gradient(options):
    """A process may have such a batch only while the others learn; it must still take part in their backward pass."""
    student, t3d = tiny_model(0), objective(**options)
    state = draw(t3d)[0]
    for name in ("position", *PER_TARGET):
        setattr(state, name, vars(state)[name][:0])
    for reference in (None, tiny_model(1)):
        terms = t3d(student, reference, collate([[state]], PAD))
        assert terms.loss.isfinite().all()
        assert all(not g.any() for g in gradients(student, terms.loss.sum()))


# ---------------------------------------------------------------------------------------------------------------------
# The ablation: parts on and off


ABLATION = {
    "DDO alone": {"lambda_path": 0.0},
    "path alone": {"ddo_weight": 0.0},
    "forward KL in place of DDO": {"ddo_weight": 0.0, "forward_kl_weight": 1.0},
    "forward KL alone": {"ddo_weight": 0.0, "forward_kl_weight": 1.0, "lambda_path": 0.0},
    "path alone, levels": {"ddo_weight": 0.0, "path_loss": "levels", "path_k_steps": 2},
}


@pytest.mark.parametrize("options", ABLATION.values(), ids=ABLATION)
def test_parts_on_and_off_equal_the_slow_loop(options):
    """Without DDO there is one forward of the student and none of a reference."""
    student, reference, t3d, calls = tiny_model(0), tiny_model(1), objective(chunk=5, **options), []

    def counted(*args, **kwargs):
        calls.append(1)
        return reference(*args, **kwargs)

    states = draw(t3d)
    loss, metrics = t3d(student, counted, collate([states[:1], states[1:3], states[3:]], PAD))
    pairs = zip(SAMPLES, states, strict=True)
    slow, slow_metrics = zip(*(slow_loss(student, reference, *pair, t3d) for pair in pairs), strict=True)
    torch.testing.assert_close(loss, torch.stack(slow), rtol=1e-4, atol=1e-5)
    assert bool(t3d.reference) == bool(t3d.settings.ddo_weight) == bool(calls) == ("ddo" in metrics)
    for name, values in metrics.items():
        assert values.tolist() == pytest.approx([m[name] for m in slow_metrics], rel=1e-4, abs=1e-5), name
    assert_same_gradients(student, loss.sum(), sum(slow))


def test_forward_kl_alone_is_naive_trajectory_distillation():
    from t3d.objectives.naive_td import NaiveTD

    student, t3d = tiny_model(0), objective(**ABLATION["forward KL alone"])
    batch = collate([draw(t3d)], PAD)
    assert torch.equal(t3d(student, None, batch).loss, NaiveTD(t3d.noise)(student, None, batch).loss)

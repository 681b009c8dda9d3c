"""Divergences by chunks against the whole (rows x vocabulary) tables, in value, gradient and memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from t3d.objectives.divergence import Divergence, divergence

ROWS, WIDTH, VOCAB = 11, 8, 40
MEASURES = {
    "forward": Divergence(),
    "mixed": Divergence(reverse_weight=0.3),
    "reverse": Divergence(reverse_weight=1.0),
    "jsd": Divergence(jsd=0.4),
    "hot": Divergence(temperature=2.0),
    "hot, reverse": Divergence(reverse_weight=1.0, temperature=0.5),
    "top 5": Divergence(top_k=5),
    "top 5, mixed, hot": Divergence(top_k=5, reverse_weight=0.3, temperature=2.0),
    "top 5, jsd": Divergence(top_k=5, jsd=0.4),
    "top of all": Divergence(top_k=10 * VOCAB),
}


def inputs(dtype=torch.float32, rows: int = ROWS, vocab: int = VOCAB):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (0.7 * torch.randn(*shape, generator=generator)).to(dtype)

    student = normal(rows, WIDTH).requires_grad_(), normal(vocab, WIDTH).requires_grad_()
    teacher = normal(rows, WIDTH + 3), normal(vocab, WIDTH + 3)  # another width
    return *student, *teacher, torch.randn(rows, generator=generator)


def whole(hidden, weight, teacher_hidden, teacher_weight, measure: Divergence) -> torch.Tensor:
    """The formulas of the module, on tables in fp64, by PyTorch's own gradients."""
    q = (hidden.double() @ weight.double().T / measure.temperature).softmax(-1)
    p = (teacher_hidden.double() @ teacher_weight.double().T / measure.temperature).softmax(-1)
    if measure.top_k and measure.top_k < p.shape[-1]:
        kept = p.topk(measure.top_k, -1).indices
        p, q = p.gather(-1, kept), q.gather(-1, kept)
    if measure.jsd is not None:
        m = measure.jsd * p + (1 - measure.jsd) * q
        return (measure.jsd * p * (p / m).log() + (1 - measure.jsd) * q * (q / m).log()).sum(-1)
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    return (1 - measure.reverse_weight) * forward + measure.reverse_weight * reverse


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_values_and_gradients_equal_the_whole_tables(measure, chunk):
    *models, upstream = inputs()
    got, expected = divergence(*models, measure, chunk), whole(*models, measure)
    assert got.shape == (ROWS,) and got.dtype == torch.float32 and got.std() > 0.01
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad((values * upstream).sum(), models[:2]) for values in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.abs().max() > 0.01


def test_hand_computed():
    """p = (3/4, 1/4), q = (1/2, 1/2): forward 3/4 log 3/2 + 1/4 log 1/2, reverse 1/2 log 2/3 + 1/2 log 2. With k = 1
    the first term of the forward KL alone."""
    hidden, teacher, head = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), torch.eye(2)
    found = [divergence(hidden, head, teacher, head, Divergence(w)).item() for w in (0.0, 1.0)]
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found == pytest.approx([forward, 0.5 * math.log(2 / 3) + 0.5 * math.log(2)])
    top = divergence(hidden, head, teacher, head, Divergence(top_k=1)).item()
    assert top == pytest.approx(0.75 * math.log(1.5))


@pytest.mark.parametrize("measure", [MEASURES[name] for name in ("forward", "mixed", "jsd", "hot", "top of all")])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(measure):
    hidden, weight, *_ = inputs()
    loss = divergence(hidden, weight, hidden, weight, measure, 4)
    torch.testing.assert_close(loss, torch.zeros(ROWS), rtol=0, atol=1e-6)
    for grad in torch.autograd.grad(loss.sum(), [hidden, weight]):
        assert grad.abs().max() < 1e-5


def test_a_small_share_of_the_jsd_is_the_forward_kl():
    """JSD / beta -> KL(p || q) as beta -> 0 (GKD, section 3)."""
    hidden, weight, teacher_hidden, teacher_weight, _ = inputs()
    models = 0.3 * hidden, weight, 0.3 * teacher_hidden, teacher_weight
    small, limit = divergence(*models, Divergence(jsd=1e-3)) / 1e-3, divergence(*models, Divergence())
    torch.testing.assert_close(small, limit, rtol=0.02, atol=0.01)


def test_the_teacher_gets_no_gradient():
    hidden, weight, teacher_hidden, teacher_weight, upstream = inputs()
    teacher_hidden.requires_grad_()
    teacher_weight.requires_grad_()
    (divergence(hidden, weight, teacher_hidden, teacher_weight, Divergence(), 4) * upstream).sum().backward()
    assert teacher_hidden.grad is None and teacher_weight.grad is None
    assert hidden.grad.any() and weight.grad.any()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, *teacher, _ = inputs()
    divergence(hidden, weight.detach(), *teacher, Divergence()).sum().backward()
    assert hidden.grad.any() and weight.grad is None


@pytest.mark.parametrize("extra", ["student", "teacher"])
def test_heads_of_different_length_are_compared_where_both_are(extra):
    """As if the longer one had the shorter one's rows only."""
    hidden, weight, teacher_hidden, teacher_weight, upstream = inputs()
    short = (weight[:-3], teacher_weight) if extra == "teacher" else (weight, teacher_weight[:-3])
    got = divergence(hidden, short[0], teacher_hidden, short[1], Divergence(), 4)
    expected = whole(hidden, weight[:-3], teacher_hidden, teacher_weight[:-3], Divergence())
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad((values * upstream).sum(), [hidden, weight]) for values in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=["all-bf16", "fp32-master-weights"])
def test_bf16_products_give_fp32_divergences(weight_dtype):
    hidden, weight, *teacher, upstream = inputs(torch.bfloat16)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    got = divergence(hidden, weight, *teacher, Divergence(), 4)
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected = whole(*exact, *(x.float() for x in teacher), Divergence())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float(), rtol=0.05, atol=0.05)
    grads = torch.autograd.grad((got * upstream).sum(), [hidden, weight])
    assert [g.dtype for g in grads] == [torch.bfloat16, weight_dtype]
    for a, b in zip(grads, torch.autograd.grad((expected * upstream).sum(), exact), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.1)


def test_extreme_logits_stay_finite():
    hidden, weight, *teacher, _ = inputs()
    for measure in MEASURES.values():
        loss = divergence(300 * hidden, weight, 300 * teacher[0], teacher[1], measure)
        assert loss.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), [hidden, weight]))


def test_no_rows():
    hidden, weight, *teacher, _ = inputs(rows=0)
    got = divergence(hidden, weight, *teacher, Divergence(top_k=5))
    assert got.shape == (0,)
    got.sum().backward()
    assert hidden.grad.shape == (0, WIDTH) and not weight.grad.any()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        self.elements = max([self.elements, *(x.numel() for x in found if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_no_table_of_all_tokens_is_ever_made(measure):
    """Forward and backward: nothing is larger than a chunk's table, or than the head."""
    rows, vocab, chunk = 96, 500, 8
    *models, upstream = inputs(rows=rows, vocab=vocab)
    with Largest() as chunked:
        (divergence(*models, measure, chunk) * upstream).sum().backward()
    assert chunked.elements == max(chunk * vocab, vocab * (WIDTH + 3)) < rows * vocab / 8
    with Largest() as table:  # the measure sees a table where there is one
        divergence(*models, measure, rows)
    assert table.elements == rows * vocab

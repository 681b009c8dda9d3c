"""DDO against numbers computed by hand."""

import math

import pytest
import torch

from t3d.objectives.ddo import ddo_terms


def test_hand_computed():
    """beta .1; ratios 2 and 4: -log sigma(.2) = log(1 + e^-.2), -.5 log sigma(-.4) = .5 log(1 + e^.4)."""
    student, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -6.0]])
    real, fake = ddo_terms(student, reference, alpha=0.5, beta=0.1)
    assert real.tolist() == [pytest.approx(0.598139, abs=1e-6)]
    assert fake.tolist() == [pytest.approx(0.5 * 0.913015, abs=1e-6)]


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_at_the_reference(alpha, beta):
    """The loss is log 2 (1 + alpha); its gradient -beta/2 for the real and +alpha beta/2 for the fake log p."""
    student = torch.tensor([[-1.0, -2.5], [-0.3, -0.3]], requires_grad=True)
    real, fake = ddo_terms(student, student.detach(), alpha, beta)
    torch.testing.assert_close(real + fake, torch.full((2,), math.log(2) * (1 + alpha)))
    (real + fake).sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-beta / 2, alpha * beta / 2]]).expand(2, 2))


def test_far_from_the_reference_it_stays_finite_and_points_the_right_way():
    """Too little of the real and too much of the fake cost the whole ratio; the opposite costs nothing."""
    student = torch.tensor([[-5000.0, 0.0], [0.0, -5000.0]], requires_grad=True)
    real, fake = ddo_terms(student, torch.tensor([[0.0, -5000.0], [-5000.0, 0.0]]), alpha=0.5, beta=0.1)
    torch.testing.assert_close(real, torch.tensor([500.0, 0.0]))
    torch.testing.assert_close(fake, torch.tensor([250.0, 0.0]))
    (real + fake).sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-0.1, 0.05], [0.0, 0.0]]))

"""Path consistency against numbers computed by hand and a slow loop."""

import pytest
import torch

from t3d.objectives.path import level_path_loss, path_loss


def test_hand_computed():
    """B = 4. Sequence 0: ranks 3 and 4 weigh 1/2 and 1/4: (2/2 + 4/4) / 2 = 1. Sequence 1: none. Sequence 2: 3."""
    log_prob, rank = torch.tensor([-2.0, -4.0, -3.0]), torch.tensor([3, 4, 1])
    assert path_loss(log_prob, rank, 4, torch.tensor([0, 0, 2]), 3).tolist() == [1.0, 0.0, 3.0]


def test_gradient_is_the_weight_over_the_number_of_masked_tokens():
    log_prob = torch.full((5,), -1.0, requires_grad=True)
    path_loss(log_prob, torch.tensor([1, 2, 3, 4, 1]), 4, torch.tensor([0, 0, 0, 0, 1]), 2).sum().backward()
    torch.testing.assert_close(log_prob.grad, -torch.tensor([1 / 4, 3 / 16, 2 / 16, 1 / 16, 1.0]))


def test_levels_hand_computed():
    """B = 4, k = 2: level 1 is the first two decoded, (1 + 3) / 2 = 2; level 2 all four, (1 + 3 + 5 + 7) / 4 = 4."""
    log_prob, rank = torch.tensor([-7.0, -1.0, -3.0, -5.0]), torch.tensor([4, 1, 2, 3])
    assert level_path_loss(log_prob, rank, 4, 2, torch.zeros(4, dtype=torch.long), 1).tolist() == [3.0]


@pytest.mark.parametrize("block_size, k", [(4, 1), (4, 2), (4, 3), (4, 4), (4, 9), (8, 4), (8, 3)])
def test_levels_equal_the_slow_loop(block_size, k):
    """Averaged over levels: the mean cross-entropy of the first level x k decoded tokens of each block."""
    generator = torch.Generator().manual_seed(k)
    log_prob, rank, sequence, expected = [], [], [], []
    for number in range(3):
        blocks = [torch.randperm(n, generator=generator) + 1 for n in (2, block_size, block_size, 1)[number:]]
        values = [torch.randn(len(block), generator=generator) - 3 for block in blocks]
        of_level, size = [], 0
        while size < block_size:
            size += k
            within = [
                -float(value)
                for block, row in zip(blocks, values, strict=True)
                for r, value in zip(block.tolist(), row, strict=True)
                if r <= size
            ]
            of_level.append(sum(within) / len(within))
        expected.append(sum(of_level) / len(of_level))
        log_prob += values
        rank += blocks
        sequence += [torch.full_like(block, number) for block in blocks]
    got = level_path_loss(torch.cat(log_prob), torch.cat(rank), block_size, k, torch.cat(sequence), 3)
    assert got.tolist() == pytest.approx(expected, rel=1e-5)

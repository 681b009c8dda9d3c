"""The mask of the model at block size 1 over its own drafts."""

import itertools

import torch

from t3d.decode.sequential import sequential_mask


def test_mask_is_causal_behind_the_earlier_blocks():
    block, slots, drafts = 4, 14, 3
    mask = sequential_mask(torch.tensor([8, 4]), block, slots, drafts)
    width = 2 * block * drafts
    assert mask.shape == (2, 1, width, slots + width)
    for row, start in enumerate([8, 4]):
        for q, k in itertools.product(range(width), range(slots + width)):
            (mine, noisy, i), (theirs, key_noisy, j) = (
                (x // (2 * block), x // block % 2, x % block) for x in (q, k - slots)
            )
            if k < slots:
                expected = k < start
            elif mine != theirs:
                expected = False
            else:
                expected = (noisy and i == j) if key_noisy else (j < i if noisy else j <= i)
            assert bool(mask[row, 0, q, k]) == expected, (row, q, k)

"""The attention predicate against masks written block by block, and its three forms against each other."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from t3d.blocks.attention import Labels, cache_mask, dense_mask, flex_mask, for_implementation


def layout(sequences: list[tuple[int, int]], block_size: int, length: int) -> list[tuple[int, str, int] | None]:
    """One packed row as (sequence, copy, position) a token, None for padding.

    ``sequences``: (clean length, first position of the noisy copy); the noisy copy ends a block after the clean one.
    """
    row = []
    for sequence, (clean, start) in enumerate(sequences):
        row += [(sequence, "clean", position) for position in range(clean)]
        row += [(sequence, "noisy", position) for position in range(start, clean + block_size)]
    return row + [None] * (length - len(row))


def labels_of(rows: list, block_size: int) -> Labels:
    tokens = [[token or (-1, "clean", 0) for token in row] for row in rows]
    return Labels(
        torch.tensor([[sequence for sequence, _, _ in row] for row in tokens]),
        torch.tensor([[position // block_size for _, _, position in row] for row in tokens]),
        torch.tensor([[copy == "noisy" for _, copy, _ in row] for row in tokens]),
    )


def mask_by_blocks(row: list, block_size: int) -> torch.Tensor:
    """What each block of each copy may look at, filled in block by block; padding rows are left empty."""
    place = {token: i for i, token in enumerate(row) if token is not None}
    mask = torch.zeros(len(row), len(row), dtype=torch.bool)
    for (sequence, copy, position), query in place.items():
        block_start = position // block_size * block_size
        block_end = block_start + block_size
        # A clean block reads the clean sequence to its own end; a noisy one to its own start, and then itself.
        for seen in range(block_end if copy == "clean" else block_start):
            mask[query, place[sequence, "clean", seen]] = True
        if copy == "noisy":
            for seen in range(block_start, block_end):
                mask[query, place[sequence, "noisy", seen]] = True
    return mask


CASES = [
    (4, [[(8, 4), (4, 4)], [(12, 8)], [(0, 0), (0, 0), (4, 0)]]),
    (1, [[(3, 1)], [(2, 2), (1, 0)]]),
    (3, [[(6, 0), (3, 3)]]),
]


@pytest.mark.parametrize("block_size, rows", CASES, ids=["B4", "B1", "B3"])
def test_dense_mask_equals_a_mask_written_block_by_block(block_size, rows):
    length = max(len(layout(row, block_size, 0)) for row in rows) + 2
    tokens = [layout(row, block_size, length) for row in rows]
    mask = dense_mask(labels_of(tokens, block_size))
    assert mask.shape == (len(rows), 1, length, length) and mask.dtype == torch.bool
    for row, got in zip(tokens, mask[:, 0], strict=True):
        expected = mask_by_blocks(row, block_size)
        real = torch.tensor([token is not None for token in row])
        assert torch.equal(got[real], expected[real])
        # Padding looks at padding only, and at something: a softmax over nothing is not a number.
        assert not got[~real][:, real].any()
        assert got[~real].any(-1).all()


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_cache_mask_shows_the_slots_to_the_end_of_the_querys_block(block_size):
    position = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [9, 3, 0, 8]])
    mask = cache_mask(position, 11, block_size)
    assert mask.shape == (3, 1, 4, 11)
    for row in range(3):
        for column in range(4):
            end = 0
            while end <= position[row, column]:
                end += block_size
            assert mask[row, 0, column].tolist() == [slot < end for slot in range(11)]


def test_cache_mask_is_the_clean_part_of_the_training_mask():
    row = layout([(12, 12)], 4, 16)[:12]
    position = torch.arange(12)[None]
    assert torch.equal(cache_mask(position, 12, 4), dense_mask(labels_of([row], 4)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_mask_becomes_a_number_to_add(implementation):
    mask = torch.tensor([[True, False], [True, True]])
    for dtype in (torch.float32, torch.bfloat16):
        added = for_implementation(mask, implementation, dtype)
        assert added.dtype == dtype
        weight = (torch.zeros(2, 2, dtype=dtype) + added).softmax(-1)
        assert weight.tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_flex_mask_is_the_dense_mask():
    """Token by token, and in the 128 x 128 tiles that the kernel visits."""
    tokens = [layout([(60, 40), (100, 88)], 4, 320), layout([(200, 160)], 4, 320)]
    labels = labels_of(tokens, 4)
    block_mask, dense = flex_mask(labels), dense_mask(labels)
    assert torch.equal(create_mask(block_mask.mask_mod, 2, 1, 320, 320, device="cpu"), dense)
    tiles = torch.nn.functional.pad(dense, (0, 64, 0, 64)).view(2, 1, 3, 128, 3, 128).any(5).any(3)
    assert torch.equal(block_mask.to_dense().bool(), tiles)
    assert not tiles.all()


def test_flex_attention_takes_a_dense_mask_as_a_block_mask():
    """Left as it is, FlexAttention would add its ones and zeros to the scores: another attention, and no error."""
    mask = cache_mask(torch.tensor([[0, 1, 2, 3], [260, 261, 3, 0]]), 300, 4)
    block_mask = for_implementation(mask, "flex_attention", torch.float32)
    assert block_mask.shape == (2, 1, 4, 300)
    assert torch.equal(create_mask(block_mask.mask_mod, 2, 1, 4, 300, device="cpu"), mask)
    assert block_mask.to_dense().tolist() == [[[[1, 0, 0]]], [[[1, 1, 1]]]]

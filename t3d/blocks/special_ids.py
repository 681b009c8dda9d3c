"""The ids that decoding and training treat apart from ordinary tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SpecialIds:
    """The token ids with a special role.

    Attributes:
        mask_id: stands for "not yet decoded".
        pad_id: fills positions after the end.
        stop_ids: end an answer.
        forbidden_ids: ids that no decoder may draw: the mask, and the model's ids beyond the tokenizer.
        ordinary_ids: (ordinary,) int64, the tokenizer's ids that are not special. Random noise is drawn from them.
    """

    mask_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    forbidden_ids: tuple[int, ...]
    ordinary_ids: Tensor

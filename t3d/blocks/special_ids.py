"""The ids that decoding and training treat apart from ordinary tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SpecialIds:
    """The token ids with a role of their own.

    Attributes:
        mask_id: "not yet decoded". pad_id: what fills up behind the end. stop_ids: what ends an answer.
        forbidden_ids: ids that no decoder may draw: the mask, and those of the model beyond the tokenizer.
        ordinary_ids: (ordinary,) int64, what random noise is drawn from: ids of the tokenizer that are not special.
    """

    mask_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    forbidden_ids: tuple[int, ...]
    ordinary_ids: Tensor

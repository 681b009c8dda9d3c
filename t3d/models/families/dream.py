"""Dream 7B (arXiv 2508.15487): Qwen2.5 under full attention, in Qwen2's names, that keeps next-token prediction.

Its tokenizer is code of its own, which is not run: give the folder a tokenizer of transformers first (Qwen2's, with
the folder's special tokens).
"""

from t3d.models.family import Family


class Dream(Family):
    model_types = {"Dream": "qwen2"}
    block_size = 32
    mask_id = 151666
    logit_shift = True
    full_attention = True

"""Fast-dLLM v2 (arXiv 2509.26328): Qwen2.5 with blocks of 32, whose logits still predict the next token.

Its own decoder draws a block's first token from the committed block alone. It then decodes sub-blocks of 8 from left to
right, with a threshold of .9 (rollout.remasking_strategy=sub_blocks).
"""

from t3d.models.family import Family


class FastDllm(Family):
    model_types = {"Fast_dLLM_Qwen": "qwen2"}
    block_size = 32
    mask_id = 151665
    logit_shift = True
    keys = {"bd_size": "block_size"}

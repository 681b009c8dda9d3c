"""A2D models of dllm, and OPDLM's checkpoints (arXiv 2606.06712): Llama, Qwen2 and Qwen3 trained further to diffuse.

Their config.json has no block size. The mask token is the tokenizer's. dllm's sampler of block diffusion has blocks of
32 by default; OPDLM's models decode at 4 (rollout.block_size, training.block_size). dllm's models of masked diffusion
with full attention have the same model type, and do not belong here.
"""

from t3d.models.family import Family


class A2d(Family):
    model_types = {"a2d-llama": "llama", "a2d-qwen2": "qwen2", "a2d-qwen3": "qwen3"}
    block_size = 32

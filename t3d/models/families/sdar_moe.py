"""SDAR-30B-A3B (arXiv 2510.06303): Qwen3-MoE's weights under their published names, separate for every expert.

transformers holds the experts of a layer in one tensor. Loading joins them, and an export splits them again.
"""

from t3d.models.family import Family


class SdarMoe(Family):
    model_types = {"sdar_moe": "qwen3_moe"}
    block_size = 4
    mask_id = 151669
    lora = ("q_proj", "k_proj", "v_proj", "o_proj")  # the experts are no linear layers

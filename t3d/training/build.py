"""From a configuration to its objective: every choice of ``training.objective`` and how it noises."""

import torch

from t3d.blocks.special_ids import SpecialIds
from t3d.objectives.base import Objective
from t3d.objectives.block_likelihood import BlockLikelihood
from t3d.objectives.dparallel import DParallel
from t3d.objectives.naive_td import NaiveTD
from t3d.objectives.redi import ReDi
from t3d.objectives.sft import SFT
from t3d.objectives.t3d import T3D
from t3d.states.trajectory import TrajectoryNoise
from t3d.states.unordered import BlockDiffusionNoise, RandomMaskNoise, RectifiedNoise
from t3d.training.settings import TrainConfig


def make_objective(config: TrainConfig, ids: SpecialIds) -> Objective:
    """The objective of ``training.objective``; ``training.block_size`` must be settled."""
    training = config.training
    chunk = training.head_chunk
    match training.objective:
        case "sft":
            noise = BlockDiffusionNoise(training.block_size, ids.mask_id, ids.pad_id, **times(config))
            return SFT(noise, chunk=chunk)
        case "redi":
            noise = RectifiedNoise(training.block_size, ids.mask_id, **times(config), post_num=pads_learnt(config))
            return ReDi(noise, chunk=chunk)
        case "dparallel":
            return DParallel(
                RandomMaskNoise(
                    training.block_size,
                    ids.mask_id,
                    mask_ratio=training.region_mask_ratio,
                    post_num=pads_learnt(config),
                    stop_ids=ids.stop_ids,
                ),
                certainty_weight=training.certainty_weight,
                temperature=training.certainty_temperature,
                chunk=chunk,
            )
        case "naive_td":
            return NaiveTD(trajectory_noise(config, ids), chunk=chunk)
        case "block_likelihood":
            return BlockLikelihood(trajectory_noise(config, ids), k=training.likelihood_k, chunk=chunk)
        case "t3d":
            levels = training.path_loss == "levels"
            return T3D(
                trajectory_noise(config, ids, every_target=levels),
                torch.as_tensor(ids.forbidden_ids),
                alpha=training.alpha,
                beta=training.beta,
                lambda_path=training.lambda_path,
                reference_temp=training.reference_temp,
                per_block=training.ddo_level == "block",
                path_k_steps=training.path_k_steps if levels else None,
                chunk=chunk,
                ddo_weight=training.ddo_weight,
                forward_kl_weight=training.forward_kl_weight,
            )
    raise AssertionError(f"training.objective={training.objective}")


def trajectory_noise(config: TrainConfig, ids: SpecialIds, every_target: bool = False) -> TrajectoryNoise:
    training = config.training
    return TrajectoryNoise(
        training.block_size,
        ids.mask_id,
        torch.as_tensor(ids.ordinary_ids),
        mask_ratios=tuple(training.mask_ratios),
        mask_ratio_exponent=training.mask_ratio_exponent,
        random_ratio=config.model.random_ratio,
        post_num=pads_learnt(config),
        reversed_trace=training.trace_order == "reversed",
        random_trace=training.mask_strategy == "random",
        from_response=training.block_grid == "response",
        every_target=every_target,
        stop_ids=ids.stop_ids,
    )


def pads_learnt(config: TrainConfig) -> int:
    """``training.post_num``; null is no limit, and an answer ends inside its last block."""
    training = config.training
    return training.block_size if training.post_num is None else training.post_num


def times(config: TrainConfig) -> dict:
    training = config.training
    return {"t_min": training.t_min, "t_max": training.t_max, "per_block": training.sft_t_per == "block"}

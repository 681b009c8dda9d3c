"""Groups of keys that several objectives share: the hidden tokens, the end of the targets, and soft targets."""

from dataclasses import dataclass

import torch

from t3d.common.errors import fault
from t3d.common.options import option
from t3d.objectives.base import Context, FrozenSettings, ObjectiveSettings
from t3d.objectives.divergence import Divergence
from t3d.states.trajectory import TrajectoryNoise


@dataclass
class AnswerEnd(ObjectiveSettings):
    """The end of the targets."""

    post_num: int | None = option(
        2, "pad tokens after the end that count in the loss; null = all of the last block", ge=0
    )

    def pads_learnt(self, context: Context) -> int:
        """``post_num``; null = no limit below the block size, because an answer ends inside its last block."""
        return context.block_size if self.post_num is None else self.post_num


@dataclass
class TrajectoryStates(AnswerEnd):
    """States of a trajectory: the tokens of later steps are hidden."""

    mask_strategy: str = option(
        "trace", "how a training state chooses its masks: by the trajectory or at random", choices=("trace", "random")
    )
    mask_ratios: list[float] = option(
        [1.0, 0.75, 0.5, 0.25], "masked shares of a block; one is drawn per sequence", gt=0, le=1
    )
    mask_ratio_exponent: float = option(8.0, "a ratio is drawn with p ~ ratio^exponent", ge=0)
    trace_order: str = option(
        "visible_first",
        "visible_first: a state shows the tokens decoded first; reversed: it hides them (the release)",
        choices=("visible_first", "reversed"),
    )
    block_grid: str = option(
        "absolute",
        "absolute: blocks count from position 0; response: from the prompt's end (the release)",
        choices=("absolute", "response"),
    )

    def check(self, training) -> None:
        super().check(training)
        if not self.mask_ratios:
            raise fault("training.mask_ratios", [], "give at least one ratio, for example training.mask_ratios=[1.0]")
        if training.refresh_rollouts and self.block_grid == "response":
            raise fault(
                "training.refresh_rollouts",
                training.refresh_rollouts,
                "the decoder counts blocks from position 0; set training.block_grid=absolute",
            )

    def noise(self, context: Context, every_target: bool = False, own_states: bool = False) -> TrajectoryNoise:
        """``every_target``, ``own_states``: see TrajectoryNoise."""
        return TrajectoryNoise(
            context.block_size,
            context.ids.mask_id,
            torch.as_tensor(context.ids.ordinary_ids),
            mask_ratios=tuple(self.mask_ratios),
            mask_ratio_exponent=self.mask_ratio_exponent,
            random_ratio=context.random_ratio,
            post_num=self.pads_learnt(context),
            reversed_trace=self.trace_order == "reversed",
            random_trace=self.mask_strategy == "random",
            from_response=self.block_grid == "response",
            every_target=every_target,
            own_states=own_states,
        )


@dataclass
class MaskTimes(ObjectiveSettings):
    """The mask probability t of a state, uniform in [t_min, t_max]."""

    t_min: float = option(0.05, "sft, redi: lowest mask probability", gt=0, le=1)
    t_max: float = option(1.0, "sft, redi: highest mask probability", gt=0, le=1)
    sft_t_per: str = option(
        "block", "sft, redi: one mask probability per block or sequence", choices=("block", "sequence")
    )

    def check(self, training) -> None:
        super().check(training)
        if self.t_min > self.t_max:
            raise fault("training.t_min", self.t_min, f"must not be above training.t_max={self.t_max}")

    def times(self) -> dict:
        """Arguments of the noises that draw a time t."""
        return {"t_min": self.t_min, "t_max": self.t_max, "per_block": self.sft_t_per == "block"}


@dataclass
class SoftTargets(FrozenSettings):
    """A frozen teacher's distributions are the targets: KL(teacher || student) unless said otherwise."""

    reverse_kl_weight: float = option(
        0.0, "soft targets: w of (1 - w) KL(teacher || student) + w KL(student || teacher)", ge=0, le=1
    )
    jsd_beta: float | None = option(
        None, "soft targets: beta of the generalised JSD, which takes the place of both KL; null = off", gt=0, lt=1
    )
    teacher_top_k: int | None = option(
        None, "soft targets: the teacher's k likeliest tokens count, over the whole vocabulary's mass; null = all", ge=1
    )

    def check(self, training) -> None:
        super().check(training)
        if self.jsd_beta is not None and self.reverse_kl_weight:
            raise fault("training.jsd_beta", self.jsd_beta, "takes both KL's place; set reverse_kl_weight=0")

    def measure(self, temperature: float = 1.0) -> Divergence:
        return Divergence(self.reverse_kl_weight, self.jsd_beta, self.teacher_top_k, temperature)

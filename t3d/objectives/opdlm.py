"""On-policy distillation of an autoregressive model into a block-diffusion one, without labels.

    L = mean_{i in M} KL( p_AR(. | c, x_0^{<i}) || p_theta(. | x_t^b, x_0^{<b})^i )

c is the prompt, x_0 the student's own answer, x_t^b one state of its own decoding for every block b, and M the masked
positions. The teacher, a frozen autoregressive model, reads the finished answer causally: its hidden state before a
token predicts that token. Positions from the end of the turn on are left out. The on-policy rounds draw new answers
(training.refresh_rollouts).
Source: OPDLM (arXiv 2606.06712) and its code. It uses one state per block, uniform among its steps; block 4, 4 steps,
dynamic .9, temperature 1. At 4B and 8B it uses the teacher's 16 likeliest tokens. The learning rate is 1e-5 to 1e-6,
with 128 prompts per round.

A target knows the tokens on the left, and not those that the state shows on the right. So the student writes well from
left to right (rollout.remasking_strategy=sequential), and badly by confidence: docs/RESULTS.md, "From an autoregressive
model".

With ``teacher_reading: block`` a block-diffusion teacher replaces the autoregressive one. It reads every masked token
after the block's tokens that the student decoded earlier, one at a time, as at full steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from t3d.common.errors import fault
from t3d.common.options import option
from t3d.objectives.base import Context, FrozenSettings, Objective, Teacher, Terms, read, read_teacher, register
from t3d.objectives.divergence import divergence
from t3d.objectives.states import SoftTargets
from t3d.states.base import Batch
from t3d.states.groups import group_mean
from t3d.states.pairs import OneStepPerBlock


@dataclass
class OPDLMSettings(SoftTargets):
    """Keys of the objective ``opdlm``."""

    teacher: str | None = option(
        None, "opdlm: the teacher, a folder or a hub id with the student's tokens; null = model.pretrained_model"
    )
    teacher_reading: str = option(
        "causal",
        "opdlm: the teacher is autoregressive and reads from left to right; or it is a block-diffusion model",
        choices=("causal", "block"),
    )
    learn_end: bool = option(False, "opdlm: the token that ends the turn is a target too (the paper leaves it out)")


@register("opdlm", "an autoregressive teacher's distributions on the student's own states")
@dataclass
class OPDLM(Objective):
    """The loss above, a mean per sequence."""

    noise: OneStepPerBlock
    settings: OPDLMSettings
    chunk: int = 1024
    Settings = OPDLMSettings
    block_causal = True  # the teacher's state is paired with all blocks of the student's
    head_tables = 5  # both models' logits and their log-softmax (divergence)

    @classmethod
    def build(cls, settings: OPDLMSettings, context: Context) -> "OPDLM":
        ids = context.ids
        noise = OneStepPerBlock(
            context.block_size, ids.mask_id, ids.stop_ids, settings.learn_end, settings.teacher_reading
        )
        return cls(noise, settings, context.head_chunk)

    @property
    def reference(self) -> FrozenSettings:
        return self.settings

    @property
    def teacher(self) -> Teacher | None:
        settings = self.settings
        return Teacher(settings.teacher, settings.teacher_reading == "causal") if settings.teacher else None

    def check_start(self, source: str, made_by: Mapping[str, Any], shift: bool) -> None:
        """Only an untrained converted model is an autoregressive one too, and so its own teacher."""
        settings = self.settings
        untrained = made_by["objective"] == "converted" if "objective" in made_by else shift
        if settings.teacher is None and settings.teacher_reading == "causal" and not untrained:
            raise fault(
                "training.teacher",
                None,
                f"{source} is not a model as t3d convert leaves it, so it does not read from left to right; name the "
                "autoregressive model, or set training.teacher_reading=block for a block-diffusion teacher",
            )

    def __call__(self, student: Callable, reference: Callable | None, batch: Batch) -> Terms:
        assert reference is not None
        teacher, teacher_head = read_teacher(reference, batch)

        def head(rows: Tensor, weight: Tensor) -> Tensor:
            soft = (rows, weight, teacher.to(rows.dtype), teacher_head)
            return divergence(*soft, self.settings.measure(), self.chunk)

        loss = group_mean(read(student, batch, head), batch.sequence, batch.sequences)
        return Terms(loss, {"divergence": loss.detach()})

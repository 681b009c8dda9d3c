"""The interface of all engines: prompts' ids and decode settings in, a stream of trajectories out."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from t3d.blocks.settings import DecodeSettings, conflict
from t3d.common.errors import UserError, fault
from t3d.data.trajectory import Trajectory


@dataclass(frozen=True)
class Request:
    """One answer to decode.

    Attributes:
        prompt: the prompt's id, "<dataset>/<row>"; with ``sample`` it names the random stream and the trajectory.
        sample: the number of this answer among the prompt's answers, from 0.
        prompt_ids: token ids of the rendered prompt.
    """

    prompt: str
    sample: int
    prompt_ids: tuple[int, ...]

    @property
    def id(self) -> str:
        return f"{self.prompt}/{self.sample}"


def refuse_mask_in_prompts(requests: Sequence[Request], mask_id: int) -> None:
    """Raises UserError for a prompt with a mask, which would never be unmasked."""
    for request in requests:
        if mask_id in request.prompt_ids:
            raise UserError(f"prompt {request.id}: contains the mask token; remove it from the question", "prompt")


def not_finite(model: str, step: int) -> UserError:
    """The error of a model whose logits are NaN or infinite at an answer's denoising step (from 1)."""
    told = f"step {step} gives NaN or infinite logits; its weights are damaged, or too large for their dtype"
    return UserError(f"model {model}: {told}; get it again, or try another dtype", "model")


def refuse_empty_prompts(requests: Sequence[Request]) -> None:
    """Raises UserError: with a logit shift the state before a position predicts its token, and position 0 has none."""
    for request in requests:
        if not request.prompt_ids:
            raise UserError(
                f"prompt {request.id}: is empty; a model with a logit shift needs one token at least", "prompt"
            )


def answer_end(response_ids: Sequence[int], max_token: int, stop_ids: Collection[int]) -> tuple[int, str]:
    """An answer's length, its first stop id included, and the reason of its end: "stop" or "length"."""
    answer = response_ids[:max_token]
    stop = next((i for i, token in enumerate(answer) if token in stop_ids), None)
    return (len(answer), "length") if stop is None else (stop + 1, "stop")


@dataclass(frozen=True)
class Step:
    """An observer's view of one answer after one of its denoising steps.

    Attributes:
        id: the request's.
        step: 1-based, counted over the whole answer, as the trajectory's ``unmask_step``. With self-verification checks
            count too; the trajectory omits the numbers of steps whose tokens were all rejected.
        response_ids: to the end of the current block, with the mask id at undecided positions.
        unmasked: indices into ``response_ids`` of the tokens that this step unmasked. A check that rejects a token
            replaces it and masks the tokens after it.
        block_complete: the current block has no masks left, and no token of it will change.
        confidence: the probabilities of the tokens ``unmasked``, in their order, as the strategies see them; empty
            after a check.
        forwards: the answer's forwards so far, counted as in its trajectory.
    """

    id: str
    step: int
    response_ids: list[int]
    unmasked: list[int]
    block_complete: bool
    confidence: list[float] = field(default_factory=list)
    forwards: int = 0


def refuse_conflict(settings: DecodeSettings, prefix: str = "") -> None:
    """Raises UserError for a setting that conflicts with the others. ``prefix`` precedes its key in the message."""
    if found := conflict(settings):
        name, remedy = found
        raise fault(prefix + name, getattr(settings, name), remedy)


SERVED_BY_SGLANG = ("sdar", "sdar_moe", "llada2_moe")  # model types of block-diffusion models in SGLang 0.5.23

# Decode settings that SGLang does not support, each with its remedy. They must have their defaults.
NOT_WITH_SGLANG = {
    "self_verify": "does not work with rollout.engine=sglang; leave it off",
    "edit_threshold": "does not work with rollout.engine=sglang; leave it at 1",
    "energy_candidates": "does not work with rollout.engine=sglang; leave it at 1",
    "random_init_ratio": "SGLang's blocks begin as masks; leave it at 0",
}


def refuse_unserved(settings: DecodeSettings, prefix: str = "") -> None:
    """Raises UserError for a setting that SGLang does not support. ``prefix`` precedes its key in the message."""
    for name, remedy in NOT_WITH_SGLANG.items():
        if (value := getattr(settings, name)) != getattr(DecodeSettings, name):
            raise fault(prefix + name, value, remedy)


class Engine(Protocol):
    """Decodes requests; yields each one's trajectory exactly once, when it is finished, in any order.

    The trajectory has ids, unmask steps, length, finish reason and counts. The caller adds text and task fields. A
    result depends only on the weights, the request, the settings and the seed, and so does its ``forwards``. Batch size
    and order change nothing. ``forwards`` counts the prompt's forward (if it has a whole block), denoising steps,
    commits, checks and scores of candidates. A forward that several answers share counts in each.

    ``on_step`` is called after every denoising step, once for each answer that took part. If the step ends an answer,
    the call comes before its trajectory. It changes no result. An engine that cannot show its steps refuses it.
    """

    def generate(
        self,
        requests: Sequence[Request],
        settings: DecodeSettings,
        seed: int,
        on_step: Callable[[Step], None] | None = None,
    ) -> Iterator[Trajectory]: ...

"""How an answer is decoded: the record that rollouts, evaluation and ``generate`` share."""

from dataclasses import dataclass, field
from typing import Any

from t3d.blocks.strategy import names, strategy_named

ATTENTION = ("sdpa", "eager", "flex_attention")
FLASH = "flash_attention_2"  # of the decoder alone (t3d.decode.attention)


def _setting(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help and its limits (``ge``, ``gt``, ``le``, ``lt``, ``choices``, ``own``).

    The configuration engine checks them. This room imports no other, so it writes the metadata itself.
    """
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class DecodeSettings:
    """How an answer is decoded, in rollouts and in evaluation.

    A block of ``block_size`` positions is denoised in ``denoising_steps_per_block`` steps. Some strategies decide the
    number of steps themselves.
    """

    block_size: int = _setting(4, "positions of one block", ge=1)
    denoising_steps_per_block: int = _setting(
        4, "steps in which a block is denoised, 1..block_size (block_size / this = tokens per step)", ge=1
    )
    remasking_strategy: str = _setting(
        "low_confidence_static", "which positions a step unmasks", choices=names(), own=True
    )
    dynamic_threshold: float = _setting(0.9, "low_confidence_dynamic: unmask all above it", ge=0, le=1)
    eb_threshold: float = _setting(0.1, "entropy_bounded: largest sum of entropies in a step (nats)", ge=0)
    eb_bound: str = _setting(
        "sum",
        "entropy_bounded: bound the sum (SDAR), or the sum without its largest term (EB-Sampler)",
        choices=("sum", "sum_less_largest"),
    )
    ancestral_schedule: str = _setting(
        "linear", "ancestral: alpha_t = 1 - t (linear) or cos(pi t / 2) (cosine)", choices=("linear", "cosine")
    )
    temperature: float = _setting(0.1, "0 = greedy", ge=0)
    top_k: int = _setting(0, "keep the k most likely tokens; 0 = all", ge=0)
    top_p: float = _setting(1.0, "keep the smallest set of tokens with this mass; 1 = all", gt=0, le=1)
    max_token: int = _setting(2000, "most tokens of an answer", ge=1)
    random_init_ratio: float = _setting(
        0.0,
        "share of positions that show a random token instead of the mask until they are decided (for ReDi)",
        ge=0,
        le=1,
    )
    self_verify: bool = _setting(
        False,
        "check each drafted block with the same weights at block size 1, one forward per check; decode again the "
        "tokens after the first one that fails",
    )
    edit_threshold: float = _setting(
        1.0,
        "replace a shown token of the current block by the model's argmax where its probability is above this "
        "(LLaDA2.1); 1 = off",
        gt=0,
        le=1,
    )
    edit_steps: int = _setting(
        1, "edit_threshold: steps of a block beyond denoising_steps_per_block, until nothing changes", ge=1
    )
    energy_candidates: int = _setting(
        1,
        "EDLM: number of fillings that each step draws; a forward at block size 1 scores each, and its energy decides "
        "the choice; 1 = off",
        ge=1,
    )


def conflict(settings: DecodeSettings) -> tuple[str, str] | None:
    """The name of a setting that conflicts with another, and the remedy; None without a conflict."""
    try:
        strategy = strategy_named(settings.remasking_strategy)
    except ValueError as error:
        return "remasking_strategy", str(error)
    single, steps, block = settings.block_size == 1, settings.denoising_steps_per_block, settings.block_size
    if steps > block and not strategy.may_choose_none:
        return "denoising_steps_per_block", f"more steps than the block has positions; at most block_size={block}"
    if found := _edit_conflict(settings):
        return found
    if settings.self_verify and single:
        return "self_verify", "a block of one token needs no check; set block_size to 2 or more, or turn this off"
    if settings.energy_candidates > 1:
        if single:
            return (
                "energy_candidates",
                "a block of one token has no energy; set block_size to 2 or more, or leave this at 1",
            )
        if settings.temperature == 0:
            return "energy_candidates", "at temperature 0 all candidates are equal; raise it, or leave this at 1"
        if settings.self_verify:
            return "energy_candidates", "does not work with self_verify; leave this at 1, or turn self_verify off"
    return None


def _edit_conflict(settings: DecodeSettings) -> tuple[str, str] | None:
    if settings.edit_threshold == 1:
        if settings.edit_steps != DecodeSettings.edit_steps:
            return "edit_steps", "counts with edit_threshold below 1 only; set that, or leave this at 1"
        return None
    for name in ("self_verify", "energy_candidates", "random_init_ratio"):
        if getattr(settings, name) != getattr(DecodeSettings, name):
            return "edit_threshold", f"does not work with {name}; leave this at 1, or that at its default"
    return None

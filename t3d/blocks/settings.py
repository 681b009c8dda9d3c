"""How an answer is decoded: the record that rollouts, evaluation and ``generate`` share."""

from dataclasses import dataclass, field
from typing import Any

from t3d.blocks.strategy import names, strategy_named


def _setting(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help and its limits (``ge``, ``gt``, ``le``, ``lt``, ``choices``, ``own``).

    The configuration engine checks them. This room imports no other, so it writes the metadata itself.
    """
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class DecodeSettings:
    """How an answer is decoded; the same record serves rollouts and evaluation.

    A block of ``block_size`` positions is denoised in ``denoising_steps_per_block`` steps, or in as many as the
    strategy asks for.
    """

    block_size: int = _setting(4, "positions of one block", ge=1)
    denoising_steps_per_block: int = _setting(
        4, "steps in which a block is denoised, 1..block_size (block_size / this = tokens per step)", ge=1
    )
    remasking_strategy: str = _setting(
        "low_confidence_static", "which positions a step unmasks", choices=names(), own=True
    )
    dynamic_threshold: float = _setting(0.9, "low_confidence_dynamic: unmask all above it", ge=0, le=1)
    eb_threshold: float = _setting(0.1, "entropy_bounded: bound on a step's summed entropy (nats)", ge=0)
    eb_bound: str = _setting(
        "sum",
        "entropy_bounded: the bound is on the sum (SDAR), or on the sum less its largest term (EB-Sampler)",
        choices=("sum", "sum_less_largest"),
    )
    ancestral_schedule: str = _setting(
        "linear", "ancestral: alpha_t = 1 - t (linear) or cos(pi t / 2) (cosine)", choices=("linear", "cosine")
    )
    temperature: float = _setting(0.1, "0 = greedy", ge=0)
    top_k: int = _setting(0, "keep the k most likely tokens; 0 = all", ge=0)
    top_p: float = _setting(1.0, "keep the smallest set of tokens with this mass; 1 = all", gt=0, le=1)
    max_token: int = _setting(2000, "an answer's longest length in tokens", ge=1)
    random_init_ratio: float = _setting(
        0.0,
        "chance of a position to show a random token in place of the mask until it is decided (for ReDi)",
        ge=0,
        le=1,
    )
    self_verify: bool = _setting(
        False,
        "check each drafted block with the same weights at block size 1, a forward per check, and decode anew what "
        "follows the first token that fails",
    )
    energy_candidates: int = _setting(
        1,
        "EDLM: in each step draw so many fillings of the block, score each by a forward at block size 1 and choose one "
        "by its energy; 1 = off",
        ge=1,
    )


def conflict(settings: DecodeSettings) -> tuple[str, str] | None:
    """The name of a setting that others rule out, and the remedy; None if all go together."""
    try:
        strategy = strategy_named(settings.remasking_strategy)
    except ValueError as error:
        return "remasking_strategy", str(error)
    single, steps, block = settings.block_size == 1, settings.denoising_steps_per_block, settings.block_size
    if steps > block and not strategy.may_choose_none:
        return "denoising_steps_per_block", f"more steps than the block has positions; at most block_size={block}"
    if settings.self_verify and single:
        return "self_verify", "a block of one token is its own verification; take block_size 2 or more, or leave it off"
    if settings.energy_candidates > 1:
        if single:
            return (
                "energy_candidates",
                "a block of one token has no energy; take block_size 2 or more, or leave it at 1",
            )
        if settings.temperature == 0:
            return "energy_candidates", "at temperature 0 all candidates are alike; raise it, or leave this at 1"
        if settings.self_verify:
            return "energy_candidates", "not together with self_verify; leave this at 1, or that off"
    return None

"""The interface of an objective, the registry of objectives, and the forward that all of them share.

An objective is one file: its formula, its settings, its noise and its loss. A new file in this folder is enough for
``training.objective=<name>``; ``training.objective=my_package.my_module:MyObjective`` takes a class from elsewhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from t3d.blocks.plugins import load_object
from t3d.blocks.special_ids import SpecialIds
from t3d.common.errors import fault
from t3d.common.options import option
from t3d.objectives.likelihood import Draw, draw_and_score, token_log_probs
from t3d.states.base import Batch, State


class Terms(NamedTuple):
    """loss: (sequences,) with gradients; metrics: name -> (sequences,) detached. The trainer averages over the global
    batch, independently of the micro-batches.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Context:
    """The inputs of an objective's ``build``, besides its own settings.

    Attributes:
        block_size: the block B of training.
        ids: the ids of mask, pad, stop and ordinary tokens.
        head_chunk: rows of the vocabulary projection at once.
        random_ratio: share of the masked positions that show a random token.
        temperature: the decoding temperature of the on-policy rounds.
        steps_per_block: their denoising steps per block; None = one token per step.
    """

    block_size: int
    ids: SpecialIds
    head_chunk: int = 1024
    random_ratio: float = 0.1
    temperature: float = 1.0
    steps_per_block: int | None = None


@dataclass
class ObjectiveSettings:
    """Keys of the training section that an objective reads. Make its fields with ``t3d.common.options.option``."""

    def check(self, training: Any) -> None:
        """Raise ``t3d.common.errors.fault`` if values conflict. ``training`` is the whole section."""


@dataclass
class FrozenSettings(ObjectiveSettings):
    """The settings of a frozen model that keeps the weights of the training's start."""

    reference_offload: bool = option(False, "keep the reference in CPU memory between its passes: less GPU memory")

    refreshed: ClassVar[bool] = False

    @property
    def is_student(self) -> bool:
        """Whether the reference is the student of the same step, so that there is no second model."""
        return False

    def round_at(self, step: int) -> int:
        """The number of the reference at optimizer ``step``, from 1."""
        return 1

    def ends_round(self, step: int) -> bool:
        """Whether the reference is refreshed after optimizer ``step``."""
        return False


@dataclass
class ReferenceSettings(FrozenSettings):
    """How the frozen reference of an objective is kept."""

    multi_round: bool = option(True, "refresh the reference from the student")
    round_interval: int = option(10, "optimizer steps between refreshes; 1 needs no second model", ge=1)

    refreshed: ClassVar[bool] = True

    @property
    def is_student(self) -> bool:
        """With interval 1 the reference is the student of the same step, and there is no second model."""
        return self.multi_round and self.round_interval == 1

    def round_at(self, step: int) -> int:
        """The number of the reference at optimizer ``step``, from 1."""
        return (step - 1) // self.round_interval + 1 if self.multi_round else 1

    def ends_round(self, step: int) -> bool:
        """Whether the reference is refreshed after optimizer ``step``."""
        return self.multi_round and step % self.round_interval == 0


class Teacher(NamedTuple):
    """A frozen model in a folder or under a hub id; ``autoregressive``: it is one, and no block-diffusion model."""

    source: str
    autoregressive: bool


class Objective(ABC):
    """One objective. A subclass defines ``Settings``, ``build``, ``noise`` and ``__call__``; the rest has defaults.

    Attributes:
        Settings: the dataclass whose fields are its keys of the training section.
        PRESETS: choices that it adds to ``training.preset``: name -> values of keys of the training section.
        data: "trajectories" of a teacher, or "examples": questions with given answers.
        noise: draws a training state of a sample. The trainer skips a state without targets, and counts it.
        counts_empty: a state without targets counts in the mean over sequences, with a loss of 0. Some estimators are
            unbiased only over all drawn states.
        progress: the share of the training's steps that are over, 0 to below 1; the trainer sets it before each step.
        block_causal: its states need the block-causal layout, so a model with full attention cannot have it.
        forwards: forward passes of the student before one backward pass (for the cost model).
        head_tables: fp32 tables of (a chunk's rows x vocabulary) that its head holds in the backward pass (for the cost
            model).
    """

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""
    Settings: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    data: ClassVar[str] = "trajectories"
    noise: Callable[[dict, torch.Generator], State]
    counts_empty: bool = False
    progress: float = 0.0
    block_causal: bool = False
    forwards: int = 1
    head_tables: int = 1

    @classmethod
    @abstractmethod
    def build(cls, settings: Any, context: Context) -> "Objective":
        """The objective with the values of its ``Settings``."""

    @abstractmethod
    def __call__(self, student: Callable, reference: Callable | None, batch: Batch) -> Terms:
        """The loss of a batch. ``reference`` is None if the objective has none, or if it is stopgrad(student)."""

    @property
    def reference(self) -> FrozenSettings | None:
        """The settings of its frozen reference; None if it has none."""
        return None

    @property
    def teacher(self) -> Teacher | None:
        """A reference that is another model; None = it begins as the student does."""
        return None

    @property
    def copies(self) -> int:
        """Most noisy copies of a sequence in the training layout (for the cost model)."""
        return 1

    def warning(self, sample: dict) -> str | None:
        """A warning for the user about training data with this first sample, or None."""
        return None

    def check_start(self, source: str, made_by: Mapping[str, Any], shift: bool) -> None:  # noqa: B027
        """Raise UserError if training cannot start from the model ``source``.

        made_by: the folder's t3d.json. shift: the model predicts a token from the state before it.
        """

    def check_refresh(self, sample: dict, training: Any) -> None:  # noqa: B027
        """Raise UserError if refreshed rollouts cannot replace data with this first sample."""


# ---------------------------------------------------------------------------------------------------------------------
# The registry

Class = TypeVar("Class", bound=type[Objective])
Result = TypeVar("Result")
_found: dict[str, type[Objective]] = {}


def register(name: str, about: str) -> Callable[[Class], Class]:
    """Class decorator: the name in ``training.objective``, and its text in ``--help``."""

    def keep(objective: Class) -> Class:
        objective.name, objective.about = name, about
        _found[name] = objective
        return objective

    return keep


@cache
def registered() -> dict[str, type[Objective]]:
    """Name -> objective, for every file of this folder; in the order of their names."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")
    return dict(sorted(_found.items()))


def find(name: str) -> type[Objective]:
    """The objective of ``training.objective``: a registered name, or a user's ``package.module:Class``.

    Raises:
        UserError: there is no such module or class, or the class is no objective.
    """
    return registered()[name] if name in registered() else _imported(name)


@cache
def _imported(name: str) -> type[Objective]:
    try:
        objective = load_object(name)
    except ValueError as error:
        raise fault("training.objective", name, str(error)) from error
    if not (isinstance(objective, type) and issubclass(objective, Objective)):
        raise fault("training.objective", name, "is no objective; derive it from t3d.objectives.base.Objective")
    if not (is_dataclass(objective.Settings) and issubclass(objective.Settings, ObjectiveSettings)):
        raise fault("training.objective", name, "its Settings must be a dataclass derived from ObjectiveSettings")
    if bare := [f.name for f in fields(objective.Settings) if f.default is f.default_factory is MISSING]:
        raise fault("training.objective", name, f"its key {bare[0]} has no default; make it with option(default, help)")
    return objective


# ---------------------------------------------------------------------------------------------------------------------
# The forward


def score(
    model: Callable,
    batch: Batch,
    *,
    draw: Draw | None = None,
    negatives: Tensor | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor | None]:
    """One forward of ``model`` on the batch: log-probabilities at the targets.

    Args:
        draw: draws y (N,) from this forward.
        negatives: y (N,), drawn before. Without both, only x_0 is scored.

    Returns:
        (log-probabilities (N, 1 or 2) fp32 of x_0 and y, y or None).
    """

    def head(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        if draw is not None:
            return draw_and_score(rows, weight, batch.targets.unsqueeze(-1), draw, chunk)
        targets = [batch.targets] if negatives is None else [batch.targets, negatives]
        return token_log_probs(rows, weight, torch.stack(targets, -1), chunk), negatives

    return read(model, batch, head)


def read(model: Callable, batch: Batch, head: Callable[[Tensor, Tensor], Result]) -> Result:
    """One forward of ``model`` on the batch, and the result of ``head`` in it.

    Args:
        head: takes the hidden states (N, width) that predict the targets, and the vocabulary head (vocab, width).
    """

    def of_rows(hidden: Tensor, weight: Tensor) -> Result:
        return head(loss_rows(hidden, batch), weight)

    return model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False, head=of_rows)


@torch.no_grad()
def read_teacher(reference: Callable, batch: Batch, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The frozen model's hidden states (N, width) in its own states of the batch, and its head (vocab, width).

    ``at``: (n,) the targets to keep; None = all of them.
    """
    assert batch.teacher is not None
    heads: list[Tensor] = []

    def head(rows: Tensor, weight: Tensor) -> Tensor:
        heads.append(weight.detach())  # the storage of this pass: an offloaded or split parameter leaves after it
        return rows if at is None else rows[at]

    rows = read(reference, batch.teacher, head)
    return rows, heads[0]


def loss_rows(hidden: Tensor, batch: Batch) -> Tensor:
    """(N, width) hidden states that predict the targets, of (rows, length, width)."""
    rows = hidden.flatten(0, 1)[batch.loss_index]
    if torch.is_autocast_enabled(rows.device.type):  # for the same precision in the backward pass
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    return rows

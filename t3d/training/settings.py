"""Every key of a training, with its default, its help and its limits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, ClassVar, get_type_hints

from t3d.blocks.settings import ATTENTION
from t3d.blocks.strategy import names
from t3d.common.errors import fault
from t3d.common.options import Released, option
from t3d.objectives.base import Objective, ObjectiveSettings, find, registered
from t3d.tasks import HELP, find_task


@dataclass
class WandbConfig:
    """The section ``wandb``."""

    entity: str | None = option(None, "user or team")
    project: str | None = option(None, "project; null = experiment.project")
    resume: bool = option(False, "continue the run run_id")
    run_id: str | None = option(None, "null = a new one")


@dataclass
class TrainExperiment:
    """The section ``experiment``: the run and its checkpoints."""

    project: str = option(
        "ddo_sdar_full_self", "a run's folder is <output_root>/<model>/<data_type>/<project>/<run_name>"
    )
    save_every_steps: int = option(256, "optimizer steps between checkpoints", ge=1)
    max_grad_norm: float = option(1.0, "gradient norm to clip at", gt=0)
    gradient_clipping: bool = option(True, "clip at all")
    checkpoints_total_limit: int | None = option(None, "keep the newest N checkpoints; null = all", ge=1)
    output_root: str = option("experiments", "folder of all runs")
    run_name: str | None = option(None, "null = the time of the start")
    resume: str | None = option(None, "null = a new run; auto = this project's newest run; or a run's folder")
    tracker: str = option(
        "none",
        "an additional log besides the run's own JSONL log; wandb is offline unless logged in",
        choices=("none", "wandb", "tensorboard"),
    )


@dataclass
class TrainModel:
    """The section ``model``: the student at its start."""

    pretrained_model: str = option("JetLM/SDAR-4B-Chat", "teacher and start of the student: a folder or a hub id")
    optimized_name: str = option("optimized", "name of the checkpoints, below <run>/ckpt/")
    random_ratio: float = option(
        0.1, "share of the masked positions that show a random token instead of the mask", ge=0, le=1
    )
    attn_implementation: str | None = option(
        None,
        "attention kernel; null = flex_attention on CUDA GPUs (it packs sequences and skips masked tiles), else sdpa; "
        "both give the same result",
        choices=ATTENTION,
    )
    dtype: str = option("float32", "master weights", choices=("float32", "bfloat16"))


@dataclass
class TrainDataset:
    """The section ``dataset``."""

    optimization_data: str = option(
        "SDAR-4B-Chat-MATH_train_renamed",
        "data/<name>.json, or the path of a JSON file or a folder of shards; sft: also .jsonl, .parquet or "
        "hub:owner/name[:split]",
    )
    data_type: str = option("math", HELP)
    allow_other_model: bool = option(
        False, "learn from another model's trajectories, such as a larger teacher's with the same tokenizer"
    )
    limit: int | None = option(None, "use only the first N rows; null = all", ge=1)
    question_key: str = option("question", "objective sft: the column with the question; dots lead into nested ones")
    answer_key: str = option("solution", "objective sft: the column with the answer; dots lead into nested ones")


@dataclass
class LoraSettings:
    """The section ``training.lora``."""

    rank: int = option(0, "train low-rank adapters of this rank on a frozen base; 0 = train all weights", ge=0)
    alpha: float = option(32.0, "adapters are scaled by alpha / rank", gt=0)
    dropout: float = option(0.0, "dropout before the adapters", ge=0, lt=1)
    target_modules: list[str] | None = option(
        None, "layers that get adapters; null = the model family's, by default all linear layers but the head"
    )


@dataclass
class TrainingConfig:
    """The keys that every training reads. ``training_section`` adds the objectives' own."""

    preset: str = option("t3d", "starting values of this section; YAML and command line change them")
    objective: str = option("t3d", "the loss; package.module:Class takes your own")
    gradient_checkpointing_enable: bool = option(True, "recompute activations: less memory, slower")
    gradient_accumulation_steps: int = option(32, "sequences per step = batch_size_lm x this x processes", ge=1)
    batch_size_lm: int = option(1, "sequences of one micro-batch per process", ge=1)
    tokens_per_batch: int | None = option(
        None,
        "most tokens (clean + noisy) of a micro-batch: packs with flex_attention, else groups by length; "
        "null = batch_size_lm sequences",
        ge=1,
    )
    mixed_precision: str = option(
        "bf16", "precision of the forward and backward passes", choices=("no", "bf16", "fp16")
    )
    enable_tf32: bool = option(True, "use TF32 products on NVIDIA GPUs")
    seed: int = option(10086, "seed of the data order, the masks and the random tokens", ge=0, le=2**32 - 1)
    num_train_epochs: int = option(30, "passes over the data", ge=1)
    max_steps: int | None = option(None, "number of optimizer steps, also for the schedule; null = all epochs", ge=1)
    block_size: int | None = option(
        None, "block size of training and of the student; null = the rollouts' (sft: the model's)", ge=1
    )
    max_gen_length: int = option(1024, "longer answers are cut at a block's end (tokens)", ge=1)
    max_prompt_len: int = option(512, "longer prompts are left out (tokens)", ge=1)
    instruction: bool = option(True, "keep the rollout's prompt; false: the bare question (the release)")
    refresh_rollouts: int | None = option(
        None, "draw new trajectories from the student every N optimizer steps; null = never", ge=1
    )
    refresh_steps_per_block: int | None = option(
        None, "refresh: denoising steps per block; null = one token per step", ge=1
    )
    refresh_at_start: bool = option(
        False, "refresh: before the first step too, so that no step sees the data's answers"
    )
    refresh_remasking_strategy: str = option(
        "low_confidence_static", "refresh: which positions a step unmasks", choices=names(), own=True
    )
    refresh_dynamic_threshold: float = option(
        0.9, "refresh: low_confidence_dynamic unmasks all above it, whatever the steps", ge=0, le=1
    )
    refresh_data_share: float = option(
        0.0,
        "refresh: share of the questions that keep the data's answers, a teacher's own, in the first round",
        ge=0,
        le=1,
    )
    refresh_data_rounds: int = option(100, "refresh: rounds until that share has fallen to 0, linearly", ge=1)
    refresh_first_length: int | None = option(
        None, "refresh: longest answers of the first round (tokens); null = max_gen_length from the start", ge=1
    )
    refresh_length_rounds: int = option(
        100, "refresh: rounds until answers may be max_gen_length long; slowly first (a quarter of a cosine)", ge=1
    )
    refresh_temperature: float = option(0.1, "refresh: decoding temperature; 0 = greedy", ge=0)
    refresh_random_init_ratio: float = option(
        0.0, "refresh: rollout.random_init_ratio of the new trajectories (redi)", ge=0, le=1
    )
    refresh_max_active: int = option(64, "refresh: answers decoded at once; lower it when memory runs out", ge=1)
    refresh_engine_urls: list[str] = option(
        [], "refresh: SGLang servers that load the student and decode, [http://host:30000, ...]; empty = this process"
    )
    lora: LoraSettings = field(default_factory=LoraSettings)
    ema_decay: float | None = option(
        None, "also export a moving average of the weights; null = off; costs one fp32 copy", gt=0, lt=1
    )
    compile: bool = option(False, "compile each layer with torch.compile: slow start, faster steps")
    head_chunk: int = option(1024, "rows of the vocabulary projection at once; a lower value needs less memory", ge=1)


@dataclass
class OptimizerParams:
    """The section ``optimizer.params``."""

    learning_rate: float = option(1e-5, "peak learning rate", gt=0)
    beta1: float = option(0.9, "decay of the gradient's mean", ge=0, lt=1)
    beta2: float = option(0.999, "decay of the squared gradient's mean", ge=0, lt=1)
    weight_decay: float = option(0.01, "decoupled weight decay", ge=0)
    epsilon: float = option(1e-8, "added to the denominator", gt=0)


@dataclass
class OptimizerConfig:
    """The section ``optimizer``."""

    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class SchedulerParams:
    """The section ``lr_scheduler.params``."""

    warmup_steps: int = option(20, "optimizer steps of linear warm-up", ge=0)
    min_lr_scale: float = option(0.1, "floor as a share of the peak", ge=0, le=1)


@dataclass
class SchedulerConfig:
    """The section ``lr_scheduler``."""

    scheduler: str = option("cosine", "course after the warm-up", choices=("cosine", "constant", "linear"))
    params: SchedulerParams = field(default_factory=SchedulerParams)


# ---------------------------------------------------------------------------------------------------------------------
# The training section: core keys and the objectives' keys


def objectives(own: str | None) -> dict[str, type[Objective]]:
    """Every registered objective, and the user's own one if ``own`` (``module:Class``) names it."""
    return registered() | ({own: find(own)} if own else {})


def objective_settings(training: TrainingConfig) -> ObjectiveSettings:
    """The values of the keys that the chosen objective reads."""
    schema = find(training.objective).Settings
    return schema(**{f.name: getattr(training, f.name) for f in fields(schema)})


def unread_keys(chosen: str) -> dict[str, str]:
    """Keys that the ``chosen`` objective does not read -> the objectives that read them, and the remedy."""
    readers: dict[str, list[str]] = {}
    for name, objective in registered().items():
        for f in fields(objective.Settings):
            readers.setdefault(f.name, []).append(name)
    own = {f.name for f in fields(find(chosen).Settings)}
    return {
        key: f"training.objective={' or '.join(names)}; leave it out"
        for key, names in readers.items()
        if key not in own
    }


@cache
def training_section(own: str | None) -> type[TrainingConfig]:
    """The schema of the training section: the core keys and the keys of ``objectives(own)``, the last one's first."""
    found = objectives(own)
    about = "; ".join(f"{name}: {objective.about}" for name, objective in found.items() if objective.about)
    core = {f.name: f for f in fields(TrainingConfig)}
    added = [
        ("objective", str, option("t3d", f"{about}; or package.module:Class of your own", choices=tuple(found))),
        ("preset", str, option("t3d", core["preset"].metadata["help"], choices=tuple(presets(own)))),
    ]
    keys = {}
    for name, objective in found.items():
        hints = get_type_hints(objective.Settings)
        for f in fields(objective.Settings):
            if f.name in core:
                raise fault("training.objective", name, f"its key {f.name} exists for every training; rename it")
            copied = field(default=f.default, default_factory=f.default_factory, metadata=f.metadata)
            keys[f.name] = (f.name, hints[f.name], copied)
    return make_dataclass("TrainingConfig", [*added, *keys.values()], bases=(TrainingConfig,))


def presets(own: str | None) -> dict[str, Mapping[str, Any]]:
    """Choices of ``training.preset`` -> values of other keys of the section."""
    return {name: values for objective in objectives(own).values() for name, values in objective.PRESETS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The whole


# The release's keys that change nothing here.
RELEASED = {
    "experiment.start_from_scratch": Released(
        (True,),
        "there is nothing to resume; set experiment.resume=auto",
        accepts=lambda value, config: value is False and config.experiment.resume is not None,
    ),
    "experiment.num_node": Released((), "accelerate launch starts the machines", accepts=lambda value, config: True),
    "training.method": Released(("semi-ar",), "training always works block by block; leave it out"),
    "training.target_temp": Released((0,), "has no effect: the reference draws y; set training.reference_temp"),
    "training.max_grad_norm": Released(
        (None, 1),
        "experiment.max_grad_norm decides; set that key",
        accepts=lambda value, config: value == config.experiment.max_grad_norm,
    ),
    "optimizer.name": Released(("adamw",), "AdamW is the only optimizer; leave it out"),
    "optimizer.params.scale_lr": Released((False,), "the rate is never scaled; set optimizer.params.learning_rate"),
    "lr_scheduler.params.learning_rate": Released(
        (None,),
        "optimizer.params.learning_rate decides; set that key",
        accepts=lambda value, config: value == config.optimizer.params.learning_rate,
    ),
}


@dataclass
class TrainConfig:
    """Stage 3: train a student on the teacher's trajectories (or a model on given answers: training.objective=sft).

    --dry-run prints the plan, its memory and the time of three steps. It writes only the data cache.
    """

    RELEASED: ClassVar = RELEASED
    PRESETS: ClassVar = {"training.preset": presets(None)}
    USUAL: ClassVar = (
        *("model.pretrained_model", "dataset.optimization_data", "dataset.data_type", "dataset.limit"),
        *("experiment.project", "experiment.run_name", "experiment.resume", "experiment.output_root"),
        *("experiment.save_every_steps", "experiment.checkpoints_total_limit", "experiment.tracker"),
        *("training.objective", "training.preset", "training.block_size", "training.max_steps"),
        *("training.num_train_epochs", "training.batch_size_lm", "training.gradient_accumulation_steps"),
        *("training.tokens_per_batch", "training.mixed_precision", "training.seed", "training.lora.rank"),
        *("optimizer.params.learning_rate", "lr_scheduler.scheduler", "lr_scheduler.params.warmup_steps"),
    )

    model_base: str | None = option(
        None, "family of the model; null = by the folder's model_type; module:Class makes known a family of your own"
    )
    wandb: WandbConfig = field(default_factory=WandbConfig)
    experiment: TrainExperiment = field(default_factory=TrainExperiment)
    model: TrainModel = field(default_factory=TrainModel)
    dataset: TrainDataset = field(default_factory=TrainDataset)
    training: TrainingConfig = field(default_factory=lambda: training_section(None)())
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    @classmethod
    def composed(cls, given: dict[str, Any]) -> "type[TrainConfig]":
        """The schema for the values ``given``, with the keys of the user's own objective if they name one."""
        own = given.get("training.objective")
        return with_objective(own) if isinstance(own, str) and ":" in own else cls

    @property
    def clip_norm(self) -> float | None:
        """The gradient norm to clip at; None = no clipping."""
        return self.experiment.max_grad_norm if self.experiment.gradient_clipping else None

    def check(self) -> None:
        training = self.training
        if self.model_base not in (None, "sdar"):
            import t3d.models.family

            t3d.models.family.use(self.model_base)
        find_task(self.dataset.data_type, "dataset.data_type")
        objective_settings(training).check(training)
        if training.lora.rank and training.lora.target_modules == []:
            raise fault("training.lora.target_modules", [], "name at least one layer, for example [q_proj,v_proj]")
        if training.max_gen_length < (training.block_size or 1):
            raise fault(
                "training.max_gen_length",
                training.max_gen_length,
                f"is shorter than one block; set at least training.block_size={training.block_size}",
            )
        if training.refresh_rollouts and not training.instruction:
            raise fault(
                "training.refresh_rollouts",
                training.refresh_rollouts,
                "the decoder uses the rollout's prompt; set training.instruction=true",
            )
        if (training.refresh_steps_per_block or 1) > (training.block_size or math.inf):
            raise fault(
                "training.refresh_steps_per_block",
                training.refresh_steps_per_block,
                f"more steps than the block has positions; set at most training.block_size={training.block_size}",
            )
        self._check_refresh()
        self._check_unread()

    def _check_refresh(self) -> None:
        """The keys of on-policy rounds that count with another one."""
        training = self.training
        if (training.refresh_first_length or 1) > training.max_gen_length:
            raise fault(
                "training.refresh_first_length",
                training.refresh_first_length,
                f"longer than answers become; at most training.max_gen_length={training.max_gen_length}",
            )
        for name, other in (
            ("refresh_data_rounds", "refresh_data_share"),
            ("refresh_length_rounds", "refresh_first_length"),
        ):
            value = getattr(training, name)
            if value != getattr(type(training)(), name) and not getattr(training, other):
                raise fault(f"training.{name}", value, f"counts with training.{other} only; set that, or leave it out")

    def _check_unread(self) -> None:
        """A key of the training section without a reader must have its default."""
        training, default = self.training, type(self.training)()
        unread = unread_keys(training.objective)
        if not training.refresh_rollouts:
            needed = "refreshed trajectories; set training.refresh_rollouts, for example to 150"
            names = [f.name for f in fields(training) if f.name.startswith("refresh_")]
            unread |= dict.fromkeys(names, needed)
        for name, needed in unread.items():
            value = getattr(training, name)
            if value == getattr(default, name):
                continue
            if self.PRESETS["training.preset"][training.preset].get(name) == value:
                raise fault("training.preset", training.preset, f"its {name}={value} works only with {needed}")
            raise fault(f"training.{name}", value, f"works only with {needed}")


@cache
def with_objective(own: str) -> type[TrainConfig]:
    """The schema of a training with the user's own objective ``module:Class``."""
    section = training_section(own)
    names = {"__doc__": TrainConfig.__doc__, "PRESETS": {"training.preset": presets(own)}}
    training = ("training", section, field(default_factory=section))
    return make_dataclass("TrainConfig", [training], bases=(TrainConfig,), namespace=names)

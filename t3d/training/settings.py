"""Every key of a training, with its default, its help and its limits."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from t3d.blocks.attention import ATTENTION
from t3d.common.options import fault, option
from t3d.tasks import HELP, find_task

# What training.preset changes beside it. `release` keeps the quirks of the paper's own scripts, to compare with it.
PRESETS: dict[str, dict[str, Any]] = {
    "t3d": {},
    "algorithm1": {"round_interval": 1},
    "release": {
        "trace_order": "reversed",
        "path_loss": "levels",
        "block_grid": "response",
        "instruction": False,
        "block_size": 8,
    },
}


OBJECTIVES = ("t3d", "naive_td", "block_likelihood", "dparallel", "redi", "sft")


ON_TRAJECTORIES = ("t3d", "naive_td", "block_likelihood")  # whose states follow the decode order


# Keys of the training section that some objectives alone read.
OBJECTIVE_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("alpha", "beta", "lambda_path", "ddo_weight", "forward_kl_weight", "ddo_level"), ("t3d",)),
    **dict.fromkeys(("reference_temp", "reference_offload", "multi_round", "round_interval"), ("t3d",)),
    **dict.fromkeys(("path_loss", "path_k_steps"), ("t3d",)),
    **dict.fromkeys(("mask_ratios", "mask_ratio_exponent", "mask_strategy"), ON_TRAJECTORIES),
    **dict.fromkeys(("trace_order", "block_grid"), ON_TRAJECTORIES),
    "likelihood_k": ("block_likelihood",),
    **dict.fromkeys(("certainty_weight", "certainty_temperature", "region_mask_ratio"), ("dparallel",)),
    **dict.fromkeys(("t_min", "t_max", "sft_t_per"), ("sft", "redi")),
    "post_num": (*ON_TRAJECTORIES, "dparallel", "redi"),  # sft learns all pads
    # sft has given answers, and redi couplings, whose ends are one model's
    "refresh_targets": (*ON_TRAJECTORIES, "dparallel"),
}


REFRESH_KEYS = ("targets", "steps_per_block", "temperature", "random_init_ratio", "max_active")


@dataclass
class WandbConfig:
    entity: str | None = option(None, "user or team")
    project: str | None = option(None, "project; null = experiment.project")
    resume: bool = option(False, "go on with the run run_id")
    run_id: str | None = option(None, "null = a new one")


@dataclass
class TrainExperiment:
    project: str = option(
        "ddo_sdar_full_self", "a run's folder is <output_root>/<model>/<data_type>/<project>/<run_name>"
    )
    start_from_scratch: bool = option(True, "start from model.pretrained_model; experiment.resume goes before it")
    num_node: int = option(1, "machines (for the record; accelerate launch starts them)", ge=1)
    save_every_steps: int = option(256, "optimizer steps between checkpoints", ge=1)
    max_grad_norm: float = option(1.0, "gradient norm to clip at", gt=0)
    gradient_clipping: bool = option(True, "clip at all")
    checkpoints_total_limit: int | None = option(None, "keep the newest N checkpoints; null = all", ge=1)
    output_root: str = option("experiments", "folder of all runs")
    run_name: str | None = option(None, "null = the time of the start")
    resume: str | None = option(None, "null = a new run; auto = this project's newest run; or a run's folder")
    tracker: str = option(
        "none",
        "besides the run's own JSONL log; wandb is offline unless logged in",
        choices=("none", "wandb", "tensorboard"),
    )


@dataclass
class TrainModel:
    pretrained_model: str = option("JetLM/SDAR-4B-Chat", "teacher and start of the student: a folder or a hub id")
    optimized_name: str = option("optimized", "name of the checkpoints, below <run>/ckpt/")
    random_ratio: float = option(
        0.1, "share of the masked positions that show a random token instead of the mask", ge=0, le=1
    )
    attn_implementation: str | None = option(
        None,
        "attention kernel; null = flex_attention on CUDA GPUs, which packs and skips, else sdpa; should it not run on "
        "yours: sdpa, with the same result",
        choices=ATTENTION,
    )
    dtype: str = option("float32", "master weights", choices=("float32", "bfloat16"))


@dataclass
class TrainDataset:
    optimization_data: str = option(
        "SDAR-4B-Chat-MATH_train_renamed",
        "data/<name>.json, or the path of a JSON file or a folder of shards; sft: also .jsonl, .parquet or "
        "hub:owner/name[:split]",
    )
    data_type: str = option("math", HELP)
    allow_other_model: bool = option(
        False, "learn from another model's trajectories, such as a larger teacher's with the same tokenizer"
    )
    limit: int | None = option(None, "the first N rows only; null = all", ge=1)
    question_key: str = option("question", "objective sft: the column with the question; dots lead into nested ones")
    answer_key: str = option("solution", "objective sft: the column with the answer to learn, likewise")


@dataclass
class LoraSettings:
    rank: int = option(0, "train low-rank adapters of this rank on a frozen base; 0 = train all weights", ge=0)
    alpha: float = option(32.0, "adapters are scaled by alpha / rank", gt=0)
    dropout: float = option(0.0, "dropout before the adapters", ge=0, lt=1)
    target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "layers that get adapters"
    )


@dataclass
class TrainingConfig:
    preset: str = option(
        "t3d", "starting values of this section; YAML and command line change them", choices=tuple(PRESETS)
    )
    objective: str = option(
        "t3d",
        "t3d: DDO + path on trajectories; naive_td: cross-entropy there; block_likelihood (AlphaDLM); dparallel "
        "(certainty forcing); redi (rectified couplings); sft: block NELBO on given answers",
        choices=OBJECTIVES,
    )
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
    enable_tf32: bool = option(True, "TF32 products on NVIDIA GPUs")
    seed: int = option(10086, "seed of the data order, the masks and the random tokens", ge=0, le=2**32 - 1)
    num_train_epochs: int = option(30, "passes over the data", ge=1)
    max_steps: int | None = option(
        None, "stop after so many optimizer steps; the schedule then runs over them; null = all epochs", ge=1
    )
    max_grad_norm: float | None = option(None, "the release's double of experiment.max_grad_norm, which counts", gt=0)
    method: str = option("semi-ar", "block by block, the only one", choices=("semi-ar",))
    mask_strategy: str = option(
        "trace", "which tokens a training state masks: by the trajectory, or at random", choices=("trace", "random")
    )
    block_size: int | None = option(
        None, "block of training, at which the student is decoded; null = the rollouts' (sft: the model's)", ge=1
    )
    post_num: int | None = option(
        2, "pad tokens after the end that count in the loss; null = all of the last block", ge=0
    )
    max_gen_length: int = option(1024, "longer answers are cut at a block's end (tokens)", ge=1)
    max_prompt_len: int = option(512, "longer prompts are left out (tokens)", ge=1)
    target_temp: float = option(
        0.0,
        "the release's; not used: y is the reference's draw",
        fixed="has no effect, y is drawn by the reference; set training.reference_temp",
    )
    reference_temp: float = option(0.0, "temperature at which the reference draws y; 0 = argmax", ge=0)
    alpha: float = option(0.5, "weight of DDO's term on the reference's draw", ge=0)
    beta: float = option(0.1, "DDO: scale of the log-probability ratio", gt=0)
    path_k_steps: int = option(4, "path_loss levels: tokens per level", ge=1)
    lambda_path: float = option(0.2, "weight of the path-consistency term; 0 = off", ge=0)
    ddo_weight: float = option(1.0, "t3d: weight of DDO; 0 = off, and no reference model is held", ge=0)
    forward_kl_weight: float = option(
        0.0, "t3d: weight of the cross-entropy on trajectories, in place of DDO or beside it", ge=0
    )
    likelihood_k: float = option(
        1.0, "block_likelihood: k of (1 - exp(k s))/k; more seeks modes more, 0 = cross-entropy", ge=0
    )
    mask_ratios: list[float] = option(
        [1.0, 0.75, 0.5, 0.25], "masked shares of a block; one is drawn per sequence", gt=0, le=1
    )
    mask_ratio_exponent: float = option(8.0, "a ratio is drawn with p ~ ratio^exponent", ge=0)
    multi_round: bool = option(True, "refresh the reference from the student")
    round_interval: int = option(10, "optimizer steps between refreshes; 1 needs no second model", ge=1)
    ddo_level: str = option(
        "sequence", "log-probabilities are means per sequence or block", choices=("sequence", "block")
    )
    trace_order: str = option(
        "visible_first",
        "a state shows the tokens decoded first, or hides them (the release)",
        choices=("visible_first", "reversed"),
    )
    path_loss: str = option(
        "rank", "weights by decode rank, or a mean over levels of k tokens (the release)", choices=("rank", "levels")
    )
    block_grid: str = option(
        "absolute",
        "blocks count from position 0, or from the prompt's end (the release)",
        choices=("absolute", "response"),
    )
    instruction: bool = option(True, "keep the rollout's prompt; false: the bare question (the release)")
    certainty_weight: float = option(2.0, "dparallel: weight of the entropy of tokens guessed right", ge=0)
    certainty_temperature: float = option(0.5, "dparallel: temperature of that entropy", gt=0)
    region_mask_ratio: float = option(
        0.5, "dparallel: chance of a token to be masked in the first pass; the second masks the others", gt=0, lt=1
    )
    t_min: float = option(0.05, "sft, redi: lowest mask probability", gt=0, le=1)
    t_max: float = option(1.0, "sft, redi: highest mask probability", gt=0, le=1)
    sft_t_per: str = option(
        "block", "sft, redi: one mask probability per block or sequence", choices=("block", "sequence")
    )
    refresh_rollouts: int | None = option(
        None, "draw the trajectories anew from the student every so many optimizer steps; null = never", ge=1
    )
    refresh_targets: str = option(
        "student",
        "refresh: learn the student's answers; or what the teacher (model.pretrained_model) writes in each of their "
        "blocks after the student's earlier ones",
        choices=("student", "teacher"),
    )
    refresh_steps_per_block: int | None = option(
        None, "refresh: denoising steps per block; null = one token per step", ge=1
    )
    refresh_temperature: float = option(0.1, "refresh: decoding temperature; 0 = greedy", ge=0)
    refresh_random_init_ratio: float = option(
        0.0, "refresh: rollout.random_init_ratio of the new trajectories (redi)", ge=0, le=1
    )
    refresh_max_active: int = option(64, "refresh: answers decoded at once; lower it when memory runs out", ge=1)
    reference_offload: bool = option(False, "keep the reference in CPU memory between its passes: less GPU memory")
    lora: LoraSettings = field(default_factory=LoraSettings)
    ema_decay: float | None = option(
        None, "export a moving average of the weights beside the student; null = off; costs one fp32 copy", gt=0, lt=1
    )
    compile: bool = option(False, "torch.compile each layer: slow start, faster steps")
    head_chunk: int = option(1024, "rows of the vocabulary projection at once: less memory when lower", ge=1)


@dataclass
class OptimizerParams:
    learning_rate: float = option(1e-5, "peak learning rate", gt=0)
    scale_lr: bool = option(False, "the release's; not used", fixed="the rate is not scaled; set learning_rate itself")
    beta1: float = option(0.9, "decay of the gradient's mean", ge=0, lt=1)
    beta2: float = option(0.999, "decay of the squared gradient's mean", ge=0, lt=1)
    weight_decay: float = option(0.01, "decoupled weight decay", ge=0)
    epsilon: float = option(1e-8, "added to the denominator", gt=0)


@dataclass
class OptimizerConfig:
    name: str = option("adamw", "optimizer", choices=("adamw",))
    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class SchedulerParams:
    learning_rate: float | None = option(
        None, "the release's double of optimizer.params.learning_rate; null = the same", gt=0
    )
    warmup_steps: int = option(20, "optimizer steps of linear warm-up", ge=0)
    min_lr_scale: float = option(0.1, "floor as a share of the peak", ge=0, le=1)


@dataclass
class SchedulerConfig:
    scheduler: str = option("cosine", "course after the warm-up", choices=("cosine", "constant", "linear"))
    params: SchedulerParams = field(default_factory=SchedulerParams)


@dataclass
class TrainConfig:
    """Stage 3: train a student on the teacher's trajectories (or a model on given answers: training.objective=sft).

    --dry-run beside the keys prints the plan, its memory and the time of three steps. It writes the data cache only.
    """

    PRESETS: ClassVar = {"training.preset": PRESETS}

    wandb: WandbConfig = field(default_factory=WandbConfig)
    experiment: TrainExperiment = field(default_factory=TrainExperiment)
    model: TrainModel = field(default_factory=TrainModel)
    dataset: TrainDataset = field(default_factory=TrainDataset)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    @property
    def clip_norm(self) -> float | None:
        """The gradient norm to clip at; None = no clipping. The release reads the experiment's, and so do we."""
        return self.experiment.max_grad_norm if self.experiment.gradient_clipping else None

    def check(self) -> None:
        training, experiment = self.training, self.experiment
        find_task(self.dataset.data_type, "dataset.data_type")
        if not training.mask_ratios:
            raise fault("training.mask_ratios", [], "give at least one ratio, for example training.mask_ratios=[1.0]")
        if training.t_min >= training.t_max:
            raise fault("training.t_min", training.t_min, f"must be below training.t_max={training.t_max}")
        if training.lora.rank and not training.lora.target_modules:
            raise fault("training.lora.target_modules", [], "name at least one layer, for example [q_proj,v_proj]")
        if training.max_gen_length < (training.block_size or 1):
            raise fault(
                "training.max_gen_length",
                training.max_gen_length,
                f"shorter than one block; at least training.block_size={training.block_size}",
            )
        if training.max_grad_norm not in (None, experiment.max_grad_norm) and experiment.max_grad_norm == 1.0:
            raise fault(
                "training.max_grad_norm",
                training.max_grad_norm,
                f"experiment.max_grad_norm counts; set experiment.max_grad_norm={training.max_grad_norm}",
            )
        peak, scheduled = self.optimizer.params.learning_rate, self.lr_scheduler.params.learning_rate
        if scheduled not in (None, peak):
            raise fault(
                "lr_scheduler.params.learning_rate",
                scheduled,
                f"differs from optimizer.params.learning_rate={peak}; set that one and leave this null",
            )
        if not experiment.start_from_scratch and experiment.resume is None:
            raise fault("experiment.start_from_scratch", False, "nothing to go on from; set experiment.resume=auto")
        if training.refresh_rollouts and (training.block_grid == "response" or not training.instruction):
            raise fault(
                "training.refresh_rollouts",
                training.refresh_rollouts,
                "the decoder has blocks from position 0 and the rollout's prompt; set training.block_grid=absolute and "
                "training.instruction=true",
            )
        if (training.refresh_steps_per_block or 1) > (training.block_size or math.inf):
            raise fault(
                "training.refresh_steps_per_block",
                training.refresh_steps_per_block,
                f"more steps than the block has positions; at most training.block_size={training.block_size}",
            )
        weights = (training.ddo_weight, training.forward_kl_weight, training.lambda_path)
        if training.objective == "t3d" and not any(weights):
            raise fault("training.ddo_weight", 0.0, "every term is off; give it, forward_kl_weight or lambda_path")
        self._check_unread()

    def _check_unread(self) -> None:
        """A key of the training section that nothing reads must be at its default."""
        training, default = self.training, TrainingConfig()
        unread = {
            name: f"training.objective={' or '.join(objectives)} only; leave it out"
            for name, objectives in OBJECTIVE_KEYS.items()
            if training.objective not in objectives
        }
        if not training.refresh_rollouts:
            needed = "refreshed trajectories only; set training.refresh_rollouts, for example to 150"
            unread |= {f"refresh_{name}": needed for name in REFRESH_KEYS}
        for name, needed in unread.items():
            value = getattr(training, name)
            if value == getattr(default, name):
                continue
            if PRESETS[training.preset].get(name) == value:
                raise fault("training.preset", training.preset, f"its {name}={value} counts with {needed}")
            raise fault(f"training.{name}", value, f"counts with {needed}")

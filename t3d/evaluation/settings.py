"""Every key of an evaluation and of an analysis, with its default, its help and its limits."""

from dataclasses import dataclass, field
from typing import ClassVar

from t3d.common.errors import fault
from t3d.common.options import option
from t3d.grading import code
from t3d.rollout.settings import RolloutConfig, SampleConfig, SampleEvaluation, SampleExperiment
from t3d.tasks import HELP

PROTOCOLS = ("few_step", "full_step", "dynamic", "paper", "sweep")


@dataclass
class EvalEvaluation(SampleEvaluation):
    """The section ``evaluation`` of stage 4."""

    eval_dataset: str = option(
        "MATH500",
        "data/<name>.json, or the path of a file; several as A,B or [A, B]; the model is loaded once",
        several=True,
    )
    data_type: str = option("math", f"{HELP}; auto = the kind that recognises a data set's first row")
    extraction: str = option(
        code.EXTRACTIONS[0],
        "code: the rule that chooses the block with the program; last = the release's rule",
        choices=code.EXTRACTIONS,
    )
    method: str | None = option(
        None,
        "the result's label; null = the objective that trained the checkpoint (its t3d.json), or original without one",
    )
    judge: str | None = option(
        None,
        "autoregressive model, with the same tokens, that measures the answers' likelihood; null = no such figures",
    )
    output: str | None = option(None, "results file (JSON); null = <project>/results/<method>-<model>-....json")
    seeds: list[int] | None = option(
        None, "evaluate with each of these instead of rollout.seed; null = only rollout.seed", ge=0, le=2**32 - 1
    )
    protocol: str | None = option(
        None,
        "replaces block_size, denoising_steps_per_block, remasking_strategy and dynamic_threshold of rollout. "
        "few_step: 2 and 4 tokens per step; full_step: 1; dynamic: threshold 0.9; paper: all three; sweep: dynamic at "
        "each of evaluation.thresholds, for AUP",
        choices=PROTOCOLS,
    )
    protocol_blocks: list[int] = option([4, 8], "block sizes of the protocol; dynamic takes the smallest", ge=1)
    thresholds: list[float] = option([0.5, 0.6, 0.7, 0.8, 0.9, 0.95], "dynamic_threshold of protocol=sweep", ge=0, le=1)


@dataclass
class EvalExecute:
    """The section ``execute``: grading."""

    num_chunk: int = option(64, "answers graded side by side, at most one per core", ge=1)
    time_limit: float | None = option(
        None, "CPU seconds to grade one answer; null = 10 for math, the row's test_time_limit for code", gt=0
    )
    allow_unsandboxed: bool = option(False, "run programs on a machine that cannot block network and files")


@dataclass
class EvalConfig(SampleConfig):
    """Stage 4: score a checkpoint on a data set under given decode settings."""

    USUAL: ClassVar = (
        *SampleConfig.USUAL,
        *(
            "evaluation.method",
            "evaluation.judge",
            "evaluation.protocol",
            "evaluation.protocol_blocks",
            "evaluation.seeds",
        ),
        "execute.allow_unsandboxed",
    )

    experiment: SampleExperiment = field(default_factory=lambda: SampleExperiment(project="eval"))
    rollout: RolloutConfig = field(
        default_factory=lambda: RolloutConfig(temperature=1.0, max_active=128, denoising_steps_per_block=1)
    )
    evaluation: EvalEvaluation = field(default_factory=EvalEvaluation)
    execute: EvalExecute = field(default_factory=EvalExecute)

    def check_task(self) -> None:
        if self.evaluation.data_type != "auto":
            super().check_task()

    def check(self) -> None:
        super().check()
        data = self.evaluation
        if data.seeds is not None and not 1 <= len(data.seeds) == len(set(data.seeds)):
            raise fault("evaluation.seeds", data.seeds, "give each seed once, for example evaluation.seeds=[1,2,3]")
        if not 1 <= len(data.protocol_blocks) == len(set(data.protocol_blocks)):
            raise fault("evaluation.protocol_blocks", data.protocol_blocks, "give each block size once, such as [4]")
        if not 2 <= len(data.thresholds) == len(set(data.thresholds)):
            raise fault("evaluation.thresholds", data.thresholds, "give at least two, each once, such as [0.5, 0.9]")
        if data.protocol in ("few_step", "paper") and (odd := [size for size in data.protocol_blocks if size % 4]):
            raise fault("evaluation.protocol_blocks", odd[0], "4 tokens per step do not divide it; use a multiple of 4")


@dataclass
class AnalysisConfig:
    """How dependent the tokens of one decoding step are, in a teacher and in its student."""

    teacher: str = option("JetLM/SDAR-4B-Chat", "a folder or a hub id")
    student: str | None = option(None, "a model distilled from the teacher; null = measure only the teacher")
    trajectories: str = option("SDAR-4B-Chat-MATH_train_renamed", "the states: data/<name>.json, a JSON file or shards")
    student_trajectories: str | None = option(
        None, "the student's own; null = the teacher's, so that both are measured at the same states"
    )
    tokens_per_step: list[int] = option([2, 4], "tokens that a step unmasks, in decode order", ge=1)
    draws: int = option(4, "draws of a step's tokens per state", ge=1)
    limit: int | None = option(64, "the first N trajectories; null = all", ge=1)
    max_gen_length: int = option(1024, "longer answers are cut at a block's end (tokens)", ge=1)
    batch_size: int = option(4, "trajectories in a forward", ge=1)
    seed: int = option(10086, "random seed of the draws", ge=0, le=2**32 - 1)
    dtype: str = option("auto", "weights; auto = as stored", choices=("auto", "float32", "bfloat16", "float16"))
    output: str = option("experiments/analysis.json", "results; the plot has the same name with .svg")

    def check(self) -> None:
        if not self.tokens_per_step:
            raise fault("tokens_per_step", [], "give at least one number, for example tokens_per_step=[4]")
        if len(set(self.tokens_per_step)) < len(self.tokens_per_step):
            raise fault("tokens_per_step", self.tokens_per_step, "give each number once")
        if self.student_trajectories and not self.student:
            raise fault("student_trajectories", self.student_trajectories, "there is no student; set student")

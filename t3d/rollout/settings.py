"""Every key of a rollout, with its default, its help and its limits."""

from dataclasses import dataclass, field, fields
from typing import ClassVar

from t3d.blocks.settings import ATTENTION, FLASH, DecodeSettings
from t3d.common.errors import fault
from t3d.common.options import Released, option
from t3d.decode.protocol import NOT_WITH_SGLANG, refuse_conflict
from t3d.tasks import HELP, find_task


@dataclass
class RolloutConfig(DecodeSettings):
    """The section ``rollout``: decode settings, and the engine that decodes."""

    engine: str = option("local", "the decoder: our own, or SGLang (docs/ENGINES.md)", choices=("local", "sglang"))
    engine_urls: list[str] = option(
        [], "sglang: running servers, [http://host:30000, ...]; empty = SGLang inside this process, on all visible GPUs"
    )
    engine_push: bool = option(False, "sglang: load evaluation.checkpoint_path into the servers first (self-play)")
    engine_timeout: float = option(1800.0, "sglang: seconds to wait for a server's answer, its queue included", gt=0)
    tensor_parallel_size: int = option(1, "sglang inside this process: GPUs that share one model", ge=1)
    max_active: int = option(
        256, "answers decoded at once per process (or server); lower it when memory runs out", ge=1
    )
    num_response_per_task: int = option(1, "answers drawn per question", ge=1)
    long_prompts: str = option(
        "error",
        "prompts that leave no room for rollout.max_token in the model's positions: error, or skip = leave them out "
        "and count them",
        choices=("error", "skip"),
    )
    start_with_think: bool = option(False, "begin every answer with <think>")
    batch_size: int | None = option(
        None, "most answers in flight per process (the smaller of this and max_active); null or 0 = no limit", ge=0
    )
    fused_commit: bool = option(True, "write a finished block's cache in the next block's first forward (same result)")
    compile: bool = option(
        False,
        "compile the blocks' forwards with torch.compile, on a GPU as at most 8 CUDA graphs: minutes at first, "
        "fewer launches afterwards",
    )
    seed: int = option(
        10086, "random seed; an answer's random numbers depend only on it and on the question", ge=0, le=2**32 - 1
    )
    num_processes: int | None = option(None, "decoding processes; null = one per visible GPU, else 1", ge=1)
    dtype: str = option("auto", "weights; auto = as stored", choices=("auto", "float32", "bfloat16", "float16"))
    attn_implementation: str | None = option(
        None,
        f"attention kernel; null = {FLASH} on a CUDA GPU if flash-attn is installed and the model fits, else sdpa",
        choices=(*ATTENTION, FLASH),
    )

    def decode_settings(self) -> DecodeSettings:
        """The decoder's own part, as the plain record that a trajectory keeps."""
        return DecodeSettings(**{f.name: getattr(self, f.name) for f in fields(DecodeSettings)})


def check_engine(rollout: RolloutConfig) -> None:
    """Refuse settings that the chosen engine does not support, unless they have their defaults."""
    if rollout.engine == "local":
        unsupported = {
            "engine_urls": "only with rollout.engine=sglang",
            "engine_push": "only with rollout.engine=sglang",
            "engine_timeout": "only with rollout.engine=sglang",
            "tensor_parallel_size": "the local engine loads a whole model per process; leave it at 1",
        }
    else:
        unsupported = {
            **NOT_WITH_SGLANG,
            "compile": "SGLang compiles by itself; leave it off",
            "fused_commit": "SGLang writes a block's cache in a separate forward; leave it at true",
            "attn_implementation": "SGLang chooses its own kernels; leave it at null",
            "num_processes": "with rollout.engine=sglang one process uses all servers; leave it at null",
        }
        if rollout.engine_urls:
            unsupported |= {
                "tensor_parallel_size": "the servers have their own (--tp-size); leave it at 1",
                "dtype": "the servers have their own (--dtype); leave it at auto",
            }
        else:
            unsupported |= {
                "engine_push": "there is no server; SGLang loads evaluation.checkpoint_path itself; leave it off",
                "engine_timeout": "works only with rollout.engine_urls; leave it at its default",
            }
    defaults = RolloutConfig()
    for name, remedy in unsupported.items():
        if (value := getattr(rollout, name)) != getattr(defaults, name):
            raise fault(f"rollout.{name}", value, remedy)
    for url in rollout.engine_urls:
        if not url.startswith(("http://", "https://")):
            raise fault("rollout.engine_urls", rollout.engine_urls, "write each address as http://host:port")


# The usual keys of decoding, for the help.
DECODING = (
    *("block_size", "denoising_steps_per_block", "remasking_strategy", "dynamic_threshold"),
    *("temperature", "top_k", "top_p", "max_token"),
)


@dataclass
class SampleExperiment:
    """The section ``experiment`` of stages 1 and 4."""

    project: str = option("your_project", "output folder; rollouts go to <project>/temp_data/")


@dataclass
class SampleEvaluation:
    """The section ``evaluation`` of stage 1: the model and its questions."""

    checkpoint_path: str = option("JetLM/SDAR-4B-Chat", "model: a folder or a hub id")
    eval_dataset: str = option("MATH_train", "data/<name>.json, or the path of a file")
    data_type: str = option("math", HELP)
    num_node: int = option(1, "machines that share the data set", ge=1)
    node_index: int = option(0, "this machine's share, 0..num_node-1", ge=0)
    output_unmasking_history: bool = option(True, "write the unmask steps (step_map) into the JSON file")
    limit: int | None = option(None, "the first N rows only; null = all", ge=1)


@dataclass
class SampleConfig:
    """Stage 1: record a model's decoding trajectories over a data set."""

    RELEASED: ClassVar = {
        "rollout.num_task_per_step": Released((1,), "a rollout always runs over the whole set; leave it out")
    }
    USUAL: ClassVar = (
        *(f"rollout.{name}" for name in DECODING),
        *("rollout.max_active", "rollout.engine", "rollout.seed", "experiment.project", "evaluation.checkpoint_path"),
        *("evaluation.eval_dataset", "evaluation.data_type", "evaluation.limit"),
    )

    model_base: str | None = option(
        None, "family of the model; null = by the folder's model_type; module:Class makes known a family of your own"
    )
    experiment: SampleExperiment = field(default_factory=SampleExperiment)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: SampleEvaluation = field(default_factory=SampleEvaluation)

    def check(self) -> None:
        rollout, data = self.rollout, self.evaluation
        if self.model_base not in (None, "sdar"):  # the release's value costs no import
            import t3d.models.family

            t3d.models.family.use(self.model_base)
        self.check_task()
        check_engine(rollout)
        refuse_conflict(rollout, "rollout.")
        if data.node_index >= data.num_node:
            raise fault(
                "evaluation.node_index",
                data.node_index,
                f"nodes count from 0; must be below evaluation.num_node={data.num_node}",
            )

    def check_task(self) -> None:
        find_task(self.evaluation.data_type)

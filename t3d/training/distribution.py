"""Processes: the accelerator, the states that DeepSpeed splits over them, and their exchange of gradients."""

import contextlib
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import gather_object
from packaging.version import Version
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from t3d.common.errors import UserError, fault
from t3d.training.settings import TrainConfig

# How long processes wait for a process that saves, checks a checkpoint or builds the data set. NCCL's 10 minutes are
# too short for large models.
PATIENCE = timedelta(hours=12)
# 0.18.6 to 0.18.10 exchange gradients without a step's last micro-batch (its pull request 7985). 0.19.0 keeps bf16
# gradients besides the fp32 gradients.
DEEPSPEED = Version("0.19.8")


def unwrapped(accelerator: Accelerator, model: Any) -> Any:
    """The model inside its wrappers. accelerate's own function imports DeepSpeed, which takes seconds."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.unwrap_model(model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of this launch: one process, plain data parallelism, or DeepSpeed ZeRO-1, 2 or 3.

    Raises:
        UserError: a kind of launch that training does not support, or an option that conflicts with it.
    """
    training = config.training
    refuse_without_gpu(training.mixed_precision)
    on_cpus = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()  # launched processes without a GPU
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    accelerator = Accelerator(
        # accelerate connects CPU processes only with cpu=True; and a Mac's GPU has no float64
        cpu=not torch.cuda.is_available() and not deepspeed,
        mixed_precision=training.mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if on_cpus else None, timeout=PATIENCE)],
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.enable_tf32
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "distributed_type: FSDP is not supported; launch with accelerate_configs/deepspeed_zero3.yaml",
            "distributed_type",
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if Version(version("deepspeed")) < DEEPSPEED:
            raise UserError(
                f"deepspeed {version('deepspeed')}: before {DEEPSPEED} gradients are averaged wrongly or kept twice "
                f"(ZeRO-1, bf16); pip install 'deepspeed>={DEEPSPEED}'",
                "deepspeed",
            )
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["gradient_clipping"] = config.clip_norm or 0.0
        settings["train_micro_batch_size_per_gpu"] = training.batch_size_lm
        if training.mixed_precision == "bf16":  # otherwise DeepSpeed adds up micro-batches in bf16
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            if zero_stage(accelerator) == 1:
                # Each gradient is added in fp32 at once, and exchanged in fp32. Otherwise a bf16 copy of all gradients
                # stays, and the exchange rounds the sums to bf16 in another copy.
                settings["bf16"]["immediate_grad_update"] = True
                settings["communication_data_type"] = "fp32"
        settings["gradient_accumulation_steps"] = 1  # the training loop decides when a step is complete
        if zero_stage(accelerator) == 3:
            settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
            refuse_with_zero_3(config)
    return accelerator


def refuse_without_gpu(mixed_precision: str) -> None:
    """Refuse to train on a CPU silently, at a hundredth of the speed, if the launch is meant for GPUs."""
    if torch.cuda.is_available():
        return
    if mixed_precision == "fp16":
        raise fault("training.mixed_precision", "fp16", "needs a GPU, and none is visible; set bf16 or no")
    if launched_for_gpus():
        raise UserError(
            "use_cpu=false: launched for GPUs, and none is visible; launch with accelerate_configs/cpu.yaml or --cpu, "
            "or make the GPUs visible",
            "use_cpu",
        )


def launched_for_gpus() -> bool:
    """Whether this launch asks for GPUs. accelerate tells a single process. Several processes read the launcher's own
    command line, because accelerate does not hand them ``use_cpu``.
    """
    if told := os.environ.get("ACCELERATE_USE_CPU"):
        return told.lower() == "false"
    if "LOCAL_RANK" not in os.environ:
        return False
    words = psutil.Process(os.getppid()).cmdline()
    names = ("launch", "accelerate-launch", "accelerate.commands.launch")
    start = next((at for at, word in enumerate(words[:4]) if Path(word).name in names), None)
    if start is None:  # another launcher, such as torchrun
        return False
    asked = launch_command_parser().parse_known_args(words[start + 1 :])[0]
    try:
        use_cpu = asked.cpu or load_config_from_file(asked.config_file).use_cpu
    except FileNotFoundError:  # no configuration, not even accelerate's default
        use_cpu = not (asked.multi_gpu or asked.use_deepspeed)
    return not use_cpu


def refuse_with_zero_3(config: TrainConfig) -> None:
    """Raises UserError for settings that conflict with weights split over processes."""
    training, remedy = config.training, "launch with ZeRO-2 or turn it off"
    if getattr(training, "reference_offload", False):
        raise fault(
            "training.reference_offload", True, "ZeRO-3 splits the reference over the processes already; turn it off"
        )
    if training.ema_decay is not None:
        raise fault("training.ema_decay", training.ema_decay, f"does not work with ZeRO-3; {remedy}")
    if training.lora.rank:
        raise fault("training.lora.rank", training.lora.rank, f"does not work with ZeRO-3; {remedy}")
    if training.compile:
        raise fault("training.compile", True, f"does not work with ZeRO-3; {remedy}")


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return accelerator.state.deepspeed_plugin.zero_stage


UNSHARDED = "whole states"


def kind(accelerator: Accelerator) -> str:
    """The sharding of a checkpoint's files, for people: "DeepSpeed ZeRO-2", or "whole states"."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return f"DeepSpeed ZeRO-{zero_stage(accelerator)}" if deepspeed else UNSHARDED


def gathered(parameters: Iterable[Parameter], written: bool = False) -> AbstractContextManager:
    """Inside the block, ZeRO-3's split parameters are whole. All processes enter it.

    Args:
        written: keep the values that the main process writes into them, on every process.
    """
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(split, modifier_rank=0 if written else None)


def declare_head(model: PreTrainedModel) -> None:
    """Tell ZeRO-3 that the model itself uses its vocabulary head's weight (``head=``), besides the head's own forward.

    DeepSpeed itself notices this use only while the weight is split. It then conflicts with the order it has recorded.
    """
    import deepspeed

    deepspeed.zero.register_external_parameter(model, model.get_output_embeddings().weight)


@torch.no_grad()
def copy_parameters(source: Iterable[Parameter], target: Iterable[Parameter]) -> None:
    """target <- source, one at a time."""
    for theirs, mine in zip(source, target, strict=True):
        with gathered([theirs]), gathered([mine], written=True):
            mine.copy_(theirs)


@contextlib.contextmanager
def accumulation(accelerator: Accelerator, model, last: bool):
    """A context for forward and backward of one micro-batch: only a step's last micro-batch exchanges gradients."""
    accelerator.gradient_state._set_sync_gradients(last)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.set_gradient_accumulation_boundary(last)  # before the forward pass
        yield
    else:
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            yield


def all_names(names: list[str]) -> list[str]:
    """The names of all processes, in one list on each."""
    return gather_object(names)

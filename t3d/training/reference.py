"""Frozen models: DDO's reference, refreshed from the student every ``round_interval`` steps, and a teacher.

For a full student the reference is a second model. A LoRA student shares its base with the reference, which is only a
second set of adapters. If the reference is refreshed at every step, there is neither.
"""

from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from t3d.common.errors import fault
from t3d.models.family import decoder_layers
from t3d.models.loading import load_model, load_tokenizer, training_attention
from t3d.objectives.base import Teacher
from t3d.training import adapters
from t3d.training.distribution import copy_parameters, declare_head, gathered, zero_stage
from t3d.training.settings import TrainConfig

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenModel:
    """A second model with the student's weights of the start or of a later step, without gradients and optimizer.

    Equal weights must give equal log-probabilities, so it computes exactly as the student does. DeepSpeed's bf16
    student has only bf16 weights, and so has the reference. Under autocast the student's weights are fp32, and every
    product rounds its matrix to bf16. The reference stores these matrices rounded: that takes half the memory, and the
    result is the same to the bit. Embeddings and norms stay in fp32, as under autocast.

    Args:
        offload: keep it in CPU memory between its passes.
        teacher: another model than the student's first weights, which takes the student's masks; None = those.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: str,
        accelerator: Accelerator,
        offload: bool = False,
        teacher: Teacher | None = None,
    ):
        self.accelerator = accelerator
        half = HALF.get(accelerator.mixed_precision)
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.offloaded = offload and accelerator.device.type == "cuda"
        rounded = None if deepspeed else half  # the dtype of the stored matrices
        self.model = load_model(
            teacher.source if teacher else source,
            dtype=half if deepspeed and half else config.model.dtype,
            attn_implementation=training_attention(config.model.attn_implementation, source, accelerator.device),
            device="cpu" if self.offloaded or rounded else accelerator.device,  # rounded before the move to a GPU
            autoregressive=teacher is not None and teacher.autoregressive,
            key="training.teacher" if teacher else "model.pretrained_model",
        )
        self.model.requires_grad_(False).eval()
        if rounded:
            store_matrices_as(self.model, rounded)
        if not self.offloaded:
            self.model.to(accelerator.device)
        else:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.pin_memory()
            for buffer in self.model.buffers():
                buffer.data = buffer.data.to(accelerator.device)
        if config.training.compile:
            compile_layers(self.model)
        if zero_stage(accelerator) == 3:
            split_over_processes(self.model, accelerator)

    def __call__(self, *args, **kwargs):
        with self.accelerator.autocast(), self.on_device():  # accelerate does not wrap it, so it needs autocast here
            return self.model(*args, **kwargs)

    @contextmanager
    def on_device(self):
        """Puts an offloaded model on the GPU: for this context, or for one pass that ends before the student's."""
        parameters = list(self.model.parameters()) if self.offloaded else []
        held = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.to(self.accelerator.device, non_blocking=True)
        try:
            yield
        finally:
            for parameter, data in zip(parameters, held, strict=True):
                parameter.data = data

    def refresh(self, student: nn.Module) -> None:
        """ref <- stopgrad(theta)."""
        copy_parameters(student.parameters(), self.model.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The whole weights on the main process, which writes them. All processes call it."""
        weights = {}
        for name, parameter in self.model.named_parameters():
            with gathered([parameter]):
                if self.accelerator.is_main_process:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        return weights

    @torch.no_grad()
    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            with gathered([parameter], written=True):
                parameter.copy_(weights[name])


class FrozenAdapters:
    """The student's own base with a frozen set of adapters. The adapters are saved with the student."""

    def __init__(self, student: nn.Module, accelerator: Accelerator):
        self.student, self.accelerator = student, accelerator

    def __call__(self, *args, **kwargs):
        adapters.activate(self.student, adapters.REFERENCE)
        try:
            with self.accelerator.autocast():
                return self.student(*args, **kwargs)
        finally:
            adapters.activate(self.student, adapters.STUDENT)

    def refresh(self, student: nn.Module) -> None:
        """ref <- stopgrad(theta)."""
        named = adapters.parameters(student, adapters.STUDENT), adapters.parameters(student, adapters.REFERENCE)
        copy_parameters(*named)


def refuse_other_tokens(source: str, tokenizer: Any) -> None:
    """Raises UserError where a token of the teacher at ``source`` has another id in the student's ``tokenizer``."""
    mine, theirs = tokenizer.get_vocab(), load_tokenizer(source, key="training.teacher").get_vocab()
    if other := next((token for token, number in theirs.items() if mine.get(token) != number), None):
        raise fault(
            "training.teacher",
            source,
            f"its token {other!r} has the id {theirs[other]}, in the student's tokenizer {mine.get(other)}; take a "
            "teacher with the student's tokenizer",
        )


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile each layer: one small graph serves all. Student and reference both use it, for equal rounding."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def store_matrices_as(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the matrices of linear layers to ``dtype``, except a head that shares the embedding's matrix."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in shared:
            module.to(dtype)


def split_over_processes(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """ZeRO-3 for a model without an optimizer: DeepSpeed's hooks gather each layer for its forward pass."""
    import deepspeed

    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = {name: value for name, value in settings["zero_optimization"].items() if name != "offload_optimizer"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": accelerator.mixed_precision == "bf16"},
        "fp16": {"enabled": accelerator.mixed_precision == "fp16"},
        "steps_per_print": 10**9,
    }
    declare_head(model)
    deepspeed.initialize(model=model, config=config)

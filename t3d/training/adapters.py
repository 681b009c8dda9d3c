"""LoRA by peft: low-rank adapters on a frozen base, injected in place; merged into ordinary weights on export.

Source: LoRA (arXiv 2106.09685): W + (alpha / rank) B A, of which A and B are trained; B starts at 0.
"""

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from t3d.common.errors import UserError, fault
from t3d.models.block_diffusion import BlockDiffusionLM
from t3d.models.family import lora_modules
from t3d.training.settings import LoraSettings

STUDENT, REFERENCE = "student", "reference"


def add(model: BlockDiffusionLM, settings: LoraSettings, with_reference: bool) -> None:
    """Freeze ``model`` and give it the student's adapters; ``with_reference``: also a frozen set for the reference.

    Raises:
        UserError: no layer has one of the names, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise fault("training.lora.rank", settings.rank, "needs peft; pip install peft") from error
    modules = settings.target_modules or lora_modules(model)
    for name in (STUDENT, REFERENCE) if with_reference else (STUDENT,):
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, so a float works
            lora_dropout=settings.dropout if name == STUDENT else 0.0,
            target_modules=list(modules),
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the second set is intended
                inject_adapter_in_model(config, model, adapter_name=name)
        except ValueError as error:  # peft's error if no layer has one of the names
            names = ", ".join(modules)
            raise UserError(
                f"training.lora.target_modules=[{names}]: not in this model ({str(error).splitlines()[0]})",
                "training.lora.target_modules",
            ) from error
    model.requires_grad_(False)
    for parameter in parameters(model, STUDENT):
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    activate(model, STUDENT)


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers and their names."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def parameters(model: nn.Module, adapter: str) -> Iterator[Parameter]:
    """One set of adapters, in the order of the layers."""
    for _, layer in layers(model):
        yield from (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)


def activate(model: nn.Module, adapter: str) -> None:
    """Compute with this set. Only the student's is ever trained."""
    for _, layer in layers(model):
        layer.set_adapter(adapter, inference_mode=adapter != STUDENT)


def merged(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``model`` without adapters: W + (alpha / rank) B A under W's own name."""
    result = {}
    for name, weight in weights.items():
        if ".lora_" not in name:
            result[name.replace(".base_layer.", ".")] = weight
    for name, layer in layers(model):
        a, b = (weights[f"{name}.lora_{factor}.{STUDENT}.weight"].float() for factor in "AB")
        base = weights[f"{name}.base_layer.weight"]
        result[f"{name}.weight"] = (base.float() + layer.scaling[STUDENT] * (b @ a)).cpu()  # only one stays on the GPU
    return result

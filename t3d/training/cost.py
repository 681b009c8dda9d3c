"""The computed cost of a training: memory of each process and floating-point operations of each step.

    python -m t3d.training.cost        the tables of docs/SCALING.md

The model is built without memory. Its weights, and the tensors that a layer keeps for its backward pass, are counted on
it. So any decoder of transformers works. Lengths are in tokens, memory in bytes. P is the number of weights, n the
number of processes. Sources: ZeRO (arXiv 1910.02054, section 3) for the sharding. A forward pass has 2 operations per
weight and token, a backward pass 4 (Kaplan et al., arXiv 2001.08361, section 2.1).
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from t3d.models import SDARConfig
from t3d.models.family import model_class

SHARDINGS = ("none", "zero1", "zero2", "zero3")


# ---------------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Model:
    """A decoder's sizes. weights: number of all weights; a tied head counts once. kept: bytes per token that a layer
    keeps for its backward pass.
    """

    config: Any
    weights: int
    kept: float

    @classmethod
    def of(cls, config: Any, half: bool = True) -> "Model":
        """The sizes of a configuration's model, which is built without memory. ``half``: its products are in bf16."""
        with torch.device("meta"):
            return cls(config, parameters(_built(config)), kept_per_token(config, half))


def parameters(model: nn.Module, trained: bool = False) -> int:
    """The number of weights of a model; ``trained``: only with a gradient. Under ZeRO-3 a parameter is empty, and
    DeepSpeed knows its size.
    """
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or not trained)


def kept_per_token(config: Any, half: bool) -> float:
    """The memory that autograd holds for two layers minus the memory for one, in bytes per token.

    A mixture of experts is measured in bf16, which transformers' grouped product takes without memory. In fp32 it holds
    twice as much.
    """
    if not half and hasattr(config, "num_experts_per_tok"):
        return 2 * kept_per_token(config, half=True)
    tokens, usual = 64, torch.get_default_dtype()

    def held(layers: int) -> int:
        model, found = _built(_with_layers(config, layers)), {}

        def keep(tensor):
            found[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no address repeats
            return tensor

        ids, mask = torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids, mask, position_ids=ids, use_cache=False, head=lambda hidden, weight: None)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in weights)

    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    try:
        with FakeTensorMode(), torch.device("cpu"):
            return (held(2) - held(1)) / tokens
    finally:
        torch.set_default_dtype(usual)


def _with_layers(config: Any, layers: int) -> Any:
    config = deepcopy(config)
    config.num_hidden_layers, config._attn_implementation = layers, "sdpa"
    if hasattr(config, "num_experts_per_tok"):  # a mixture; the plain loop would ask which experts are chosen
        config._experts_implementation = "grouped_mm"
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _built(config: Any) -> PreTrainedModel:
    """The model of a configuration, whole: ``from_config`` would shard it under ZeRO-3."""
    return model_class(config)(config)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@dataclass(frozen=True)
class Run:
    """How a training holds its model.

    Attributes:
        half: products in bf16.
        weight_bytes: bytes of a stored weight.
        trainable: weights with a gradient (LoRA); None = all.
        second_model: a frozen reference is held (``round_interval`` above 1).
        chunk: rows of the head at once.
        forwards, head_tables: the objective's (t3d.objectives.base).
    """

    processes: int = 1
    sharding: str = "none"
    half: bool = True
    weight_bytes: int = 4
    trainable: int | None = None
    second_model: bool = True
    checkpointing: bool = True
    chunk: int = 1024
    forwards: int = 1
    head_tables: int = 1


@dataclass(frozen=True)
class Memory:
    """One process's memory in bytes, by component."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(model: Model, run: Run, tokens: int) -> Memory:
    """The peak of one process, in the backward pass of a micro-batch.

    - ZeRO: 2 P for bf16 weights, 4 P for gradients added up in fp32, 12 P for the fp32 weights and both moments. Stage
      1 shards the 12 P, stage 2 also the gradients, stage 3 everything and the reference.
    - Without ZeRO: weights and gradients of ``weight_bytes`` each, and two moments. With ``half`` autocast keeps
      rounded copies for a pass, 2 P. DDP (n > 1) holds the gradients once more in its buckets.
    - The head's new gradient, V x width, exists at the same time as the sum to which it is added.
    - Activations with checkpointing: the residual stream before each layer, and the tensors that one layer keeps.
      Without it: the tensors that all layers keep (``Model.kept``). Both count once for each of the ``forwards`` before
      a backward pass. The reference has none, because its forward pass ends earlier.
    - Logits: ``head_tables`` times ``chunk`` rows of the vocabulary in fp32. With ``half`` also the bf16 product.

    Left out: masks, the allocator's slack, NCCL's and the libraries' own buffers: some GB on a GPU.

    Args:
        tokens: number of tokens of a micro-batch's layout, padding included.
    """
    config, weights = model.config, model.weights
    trained = weights if run.trainable is None else run.trainable
    stage, product = SHARDINGS.index(run.sharding), 2 if run.half else 4
    share = [1 / run.processes if stage >= needed else 1 for needed in (1, 2, 3)]  # of moments, gradients, weights
    if stage:
        held, gradients, optimizer = 2 * weights * share[2], 4 * trained * share[1], 12 * trained * share[0]
        gradient_bytes = 2
    else:
        held = weights * (run.weight_bytes + (2 if run.half and run.weight_bytes == 4 else 0))
        gradients = trained * run.weight_bytes * (2 if run.processes > 1 else 1)
        optimizer, gradient_bytes = 2 * trained * run.weight_bytes, run.weight_bytes
    if run.trainable is None:
        gradients += config.vocab_size * config.hidden_size * gradient_bytes
    residual = 4 if stage == 0 and run.weight_bytes == 4 else 2
    layers = run.forwards * config.num_hidden_layers
    per_token = layers * config.hidden_size * residual + model.kept if run.checkpointing else layers * model.kept
    return Memory(
        weights=held,
        gradients=gradients,
        optimizer=optimizer,
        reference=weights * product * share[2] if run.second_model else 0.0,
        activations=tokens * per_token,
        logits=run.chunk * config.vocab_size * (4 * run.head_tables + (2 if run.half else 0)),
    )


def flops(model: Model, tokens: float, passes: int) -> float:
    """Floating-point operations of ``tokens`` of the training layout (clean and noisy copy).

    Each pass has 2 operations per weight and token. The input's table is not multiplied, so it does not count.
    Attention is left out; it is small at these lengths. All experts of a mixture count.

    Args:
        passes: the student's forward 1, its backward 2, recomputation 1 with checkpointing, the reference's forward 1.
    """
    return 2 * (model.weights - model.config.vocab_size * model.config.hidden_size) * tokens * passes


# ---------------------------------------------------------------------------------------------------------------------
# The tables of docs/SCALING.md


def _shape(width: int, hidden: int, layers: int, heads: int) -> SDARConfig:
    return SDARConfig(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )


# SDAR-4B-Chat: its config.json. The others: Qwen3-1.7B and Qwen3-8B (arXiv 2505.09388, table 1, and their config.json),
# from which SDAR starts (arXiv 2510.06303). Their heads are assumed to be untied, like SDAR-4B-Chat's.
MODELS = {
    "SDAR-1.7B": _shape(2048, 6144, 28, 16),
    "SDAR-4B": _shape(2560, 9728, 36, 32),
    "SDAR-8B": _shape(4096, 12288, 36, 32),
}
DEVICE_MEMORY, PEAK = 80e9, 989e12  # H100 SXM, bf16 without sparsity, the vendor's data sheet
UTILISATION = 0.35  # assumed
SEQUENCES, PROMPT, ANSWER, EPOCHS = 8451, 97, 400, 30  # MATH_train; the mean answer is assumed
MICRO_BATCH = 8192  # tokens of the layout


def tables() -> str:
    """Markdown: the weights, memory per GPU under each sharding, and the time of a run."""
    models = {name: Model.of(config) for name, config in MODELS.items()}
    sizes = [[name, f"{m.weights / 1e9:.2f} billion", f"{2 * m.weights / 1e9:.1f} GB"] for name, m in models.items()]
    tokens = SEQUENCES * EPOCHS * (PROMPT + 2 * ANSWER)  # packed: no padding
    needs, parts = [], ("weights", "gradients", "optimizer", "reference", "activations", "logits")
    for name, model in models.items():
        for processes in (1, 8, 64):
            totals = [memory(model, Run(processes, kind), MICRO_BATCH).total for kind in SHARDINGS]
            cells = [f"{need / 1e9:.0f} GB" + ("" if need < DEVICE_MEMORY else " (no)") for need in totals]
            seconds = flops(model, tokens, passes=5) / (processes * PEAK * UTILISATION)
            needs.append([name, str(processes), *cells, f"{seconds / 60:,.0f} min"])
    zero1, split = Run(8, "zero1"), []
    for name, model in models.items():
        usual = memory(model, zero1, MICRO_BATCH)
        others = [replace(zero1, checkpointing=False), replace(zero1, second_model=False)]
        totals = [memory(model, run, MICRO_BATCH).total for run in others]
        cells = [f"{getattr(usual, part) / 1e9:.1f} GB" for part in parts]
        split.append([name, *cells, *(f"{total / 1e9:.0f} GB" for total in totals)])
    heads = ("Model", "GPUs", "DDP, fp32 weights", "ZeRO-1", "ZeRO-2", "ZeRO-3", "30 epochs")
    split_heads = ("8 GPUs, ZeRO-1", *parts, "without checkpointing", "round_interval=1")
    found = ((("Model", "Weights", "bf16"), sizes), (heads, needs), (split_heads, split))
    return "\n\n".join(_markdown([columns, ["---"] * len(columns), *cells]) for columns, cells in found)


def _markdown(lines: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(tables())

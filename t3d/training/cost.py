"""What a training costs, computed: memory of each process and floating-point operations of each step.

    python -m t3d.training.cost        the tables of docs/SCALING.md

The formulas stand above their functions. Lengths are in tokens, memory in bytes, P is the number of weights, n the
number of processes. Sources: ZeRO (arXiv 1910.02054, section 3) for what is sharded; 2 operations for a weight and a
token in a forward pass, twice that in a backward pass (Kaplan et al., arXiv 2001.08361, section 2.1).
"""

from dataclasses import dataclass
from typing import Any

SHARDINGS = ("none", "zero1", "zero2", "zero3")


# ---------------------------------------------------------------------------------------------------------------------
# Models


def layer_matrices(config: Any) -> int:
    """Weights of one layer's products: queries, keys, values, output; gate, up, down."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    return 2 * width * heads + 2 * width * shared + 3 * width * config.intermediate_size


def parameters(config: Any) -> int:
    """All weights of an SDAR model; ``config`` has Qwen3's names. A tied head counts once."""
    width, tables = config.hidden_size, 1 if config.tie_word_embeddings else 2
    norms = 2 * width + 2 * config.head_dim
    return tables * config.vocab_size * width + config.num_hidden_layers * (layer_matrices(config) + norms) + width


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@dataclass(frozen=True)
class Memory:
    """One process's memory in bytes, by component."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    logits: float
    mask: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(
    config: Any,
    *,
    tokens: int,
    longest: int,
    processes: int = 1,
    sharding: str = "none",
    half: bool = True,
    weight_bytes: int = 4,
    trainable: int | None = None,
    second_model: bool = True,
    checkpointing: bool = True,
    chunk: int = 1024,
    dense_mask: bool = False,
    forwards: int = 1,
    head_tables: int = 1,
) -> Memory:
    """The peak of one process, in the backward pass of a micro-batch.

    - ZeRO: bf16 weights, 2 P, gradients added up in fp32, 4 P, and 12 P for the fp32 weights and both moments. Stage 1
      shards the 12 P, stage 2 the gradients too, stage 3 everything and the reference.
    - Without it: weights of ``weight_bytes`` and gradients like them, two moments, and with ``half`` the rounded copies
      that autocast keeps for a pass, 2 P. DDP (n > 1) holds the gradients once more in its buckets.
    - The head's gradient, V x width, exists beside the sum that it is added to.
    - Activations: with checkpointing the residual stream before each layer, and what one layer keeps; else what all
      keep (``kept_per_token``): of each of the ``forwards`` before a backward pass, but for the one layer. The
      reference has none: its forward pass is over before.
    - Logits: ``head_tables`` times ``chunk`` rows of the vocabulary in fp32, and with ``half`` the product before it is
      widened.
    - A dense mask: rows x longest^2, bool and as numbers. FlexAttention has none.

    Left out: the allocator's slack, NCCL's and the libraries' own buffers: some GB on a GPU.

    Args:
        tokens: of a micro-batch's layout, padding included. longest: of one row.
        half: products in bf16. trainable: weights with a gradient (LoRA); None = all.
        second_model: a frozen reference is held (``round_interval`` above 1).
        forwards, head_tables: the objective's (t3d.objectives.base).
    """
    assert sharding in SHARDINGS, sharding
    weights_count = parameters(config)
    trained = weights_count if trainable is None else trainable
    table, product = config.vocab_size * config.hidden_size, 2 if half else 4
    stage = SHARDINGS.index(sharding)
    share = [1 / processes if stage >= needed else 1 for needed in (1, 2, 3)]  # of moments, gradients, weights
    if stage:
        weights, gradients, optimizer = 2 * weights_count * share[2], 4 * trained * share[1], 12 * trained * share[0]
        gradient_bytes = 2
    else:
        weights = weights_count * (weight_bytes + (2 if half and weight_bytes == 4 else 0))
        gradients = trained * weight_bytes * (2 if processes > 1 else 1)
        optimizer, gradient_bytes = 2 * trained * weight_bytes, weight_bytes
    if trainable is None:
        gradients += table * gradient_bytes
    kept, residual = kept_per_token(config, product), 4 if stage == 0 and weight_bytes == 4 else 2
    layers = config.num_hidden_layers
    per_token = forwards * layers * config.hidden_size * residual + kept if checkpointing else forwards * layers * kept
    rows = tokens / longest
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        reference=weights_count * product * share[2] if second_model else 0.0,
        activations=tokens * per_token,
        logits=chunk * config.vocab_size * (4 * head_tables + (2 if half else 0)),
        mask=rows * longest**2 * (1 + product) if dense_mask else 0.0,
    )


def kept_per_token(config: Any, product: int) -> float:
    """Bytes that a layer keeps of a token for its backward pass; ``product`` bytes a number in the products.

    Each of the two norms: its input in fp32, the normalised and the scaled. Norms of queries and keys: input in fp32
    and the normalised. Attention: queries, keys and values for all heads, and its result. MLP: gate, its activation,
    up, and their product.
    """
    width, hidden = config.hidden_size, config.intermediate_size
    heads, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = 2 * (4 + 2 * product) * width + (4 + product) * (heads + shared)
    return norms + 4 * product * heads + 4 * product * hidden


# ---------------------------------------------------------------------------------------------------------------------
# Computation


def flops(
    config: Any,
    *,
    tokens: float,
    keys: float,
    targets: float,
    second_model: bool = True,
    checkpointing: bool = True,
) -> float:
    """Floating-point operations of T3D on ``tokens`` of the training layout (clean and noisy copy), all passes.

    - A pass over the layers: 2 x weights of the products, and 4 x (width of all heads) x ``keys`` for attention, for
      each token and layer. Passes: the student's forward 1, backward 2, recomputation 1 with checkpointing; the
      reference's forward 1.
    - The head, 2 x V x width for each of the ``targets`` (the rows where the loss looks): the student's forward 1,
      backward 2 and the projection once more there; the reference's 1, from which y is drawn too.

    Args:
        keys: that a token sees, on average; with a dense mask all of its row.
    """
    heads = config.num_attention_heads * config.head_dim
    layer = 2 * layer_matrices(config) + 4 * heads * keys
    passes = 3 + checkpointing + second_model
    head = 2 * config.vocab_size * config.hidden_size * (4 + second_model)
    return tokens * config.num_hidden_layers * layer * passes + targets * head


def seconds(operations: float, processes: int, peak: float, utilisation: float) -> float:
    """Time of so many operations at a share of the devices' peak. Recomputed ones count as done."""
    return operations / (processes * peak * utilisation)


# ---------------------------------------------------------------------------------------------------------------------
# The tables of docs/SCALING.md


@dataclass(frozen=True)
class Shape:
    """What a model's config.json says of its size."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    vocab_size: int = 151_936
    tie_word_embeddings: bool = False


# SDAR-4B-Chat: its config.json. The others: Qwen3-1.7B and Qwen3-8B (arXiv 2505.09388, table 1, and their config.json),
# from which SDAR starts (arXiv 2510.06303); their heads are taken to be untied, as SDAR-4B-Chat's is.
MODELS = {
    "SDAR-1.7B": Shape(2048, 6144, 28, 16, 8),
    "SDAR-4B": Shape(2560, 9728, 36, 32, 8),
    "SDAR-8B": Shape(4096, 12288, 36, 32, 8),
}
DEVICE, DEVICE_MEMORY, PEAK = "H100 SXM", 80e9, 989e12  # bf16 without sparsity, the vendor's data sheet
UTILISATION = 0.35  # assumed
SEQUENCES, PROMPT, ANSWER, EPOCHS = 8451, 97, 400, 30  # MATH_train; the mean answer is assumed
MASKED = 0.976  # mean ratio drawn from (1, .75, .5, .25) with p ~ ratio^8
MICRO_BATCH, LONGEST = 8192, 512 + 2 * 1024  # tokens of the layout


def run_seconds(config: Any, processes: int) -> float:
    """A whole training of the released length with packing: no padding, a token sees half its sequence on average."""
    tokens = SEQUENCES * EPOCHS * (PROMPT + 2 * ANSWER)
    targets = SEQUENCES * EPOCHS * ANSWER * MASKED
    return seconds(
        flops(config, tokens=tokens, keys=(PROMPT + ANSWER) / 2, targets=targets), processes, PEAK, UTILISATION
    )


def tables() -> str:
    """Markdown: the weights, memory per GPU under each sharding, and the time of a run."""
    lines = ["| Model | Weights | bf16 |", "| --- | --- | --- |"]
    for name, config in MODELS.items():
        lines.append(f"| {name} | {parameters(config) / 1e9:.2f} billion | {2 * parameters(config) / 1e9:.1f} GB |")
    head = ("Model", "GPUs", "DDP, fp32 weights", "ZeRO-1", "ZeRO-2", "ZeRO-3", "30 epochs")
    lines += ["", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, config in MODELS.items():
        for processes in (1, 8, 64):
            cells = [name, str(processes)]
            for sharding in SHARDINGS:
                need = memory(config, tokens=MICRO_BATCH, longest=LONGEST, processes=processes, sharding=sharding).total
                cells.append(f"{need / 1e9:.0f} GB" + ("" if need < DEVICE_MEMORY else " (no)"))
            minutes = run_seconds(config, processes) / 60
            lines.append("| " + " | ".join([*cells, f"{minutes:,.0f} min"]) + " |")
    parts = ("weights", "gradients", "optimizer", "reference", "activations", "logits")
    lines += ["", "| 8 GPUs, ZeRO-1 | " + " | ".join(parts) + " | without checkpointing | round_interval=1 |"]
    lines.append("| --- " * (len(parts) + 3) + "|")
    for name, config in MODELS.items():
        settings = {"tokens": MICRO_BATCH, "longest": LONGEST, "processes": 8, "sharding": "zero1"}
        usual = memory(config, **settings)
        cells = [f"{getattr(usual, part) / 1e9:.1f}" for part in parts]
        cells += [
            f"{memory(config, **settings, **{key: False}).total / 1e9:.0f}" for key in ("checkpointing", "second_model")
        ]
        lines.append(f"| {name} | " + " | ".join(f"{cell} GB" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())

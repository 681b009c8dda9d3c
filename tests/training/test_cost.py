"""The cost model against real models: their weights, what autograd keeps, what a process needs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from studies.benchmarks import train_step
from t3d.blocks.attention import Labels, dense_mask
from t3d.common.paths import ROOT
from t3d.models import SDARConfig, SDARForCausalLM
from t3d.models.family import families, model_class
from t3d.models.loading import load_model
from t3d.training import cost
from tests.conftest import reset_accelerator
from tests.models.test_families import FAMILIES, plain_config

SMALL = dict(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)


@pytest.fixture(scope="module")
def sdar_4b() -> cost.Model:
    return cost.Model.of(cost.MODELS["SDAR-4B"])


def test_the_embedded_teacher_is_counted_without_its_weights():
    model = load_model(str(ROOT / "models" / "embedded-teacher"))
    assert cost.Model.of(model.config).weights == sum(parameter.numel() for parameter in model.parameters())


def test_the_real_configuration_and_the_size_of_its_weights(shared, sdar_4b):
    config, ours = SDARConfig.from_pretrained(shared / "sdar-4b-chat"), sdar_4b.config
    assert all(getattr(config, name) == getattr(ours, name) for name in (*SMALL, "tie_word_embeddings"))
    assert 2 * sdar_4b.weights == 8_822_848_512  # total_size of its weight index, in bf16


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_what_a_layer_keeps_is_what_autograd_saves(half):
    """Distinct memory that the backward pass of real layers holds on to, of three against two; weights left out."""

    def saved(layers: int) -> int:
        torch.manual_seed(0)
        model = SDARForCausalLM(SDARConfig(**SMALL | {"num_hidden_layers": layers}))
        model = model.to(torch.bfloat16 if half else torch.float32)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        held = {}

        def keep(tensor):
            held[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address comes twice
            return tensor

        ids = torch.arange(128)[None]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model(ids, labels_mask(128), position_ids=ids)
        return sum(t.untyped_storage().nbytes() for address, t in held.items() if address not in weights)

    per_token = (saved(3) - saved(2)) / 128
    assert cost.kept_per_token(SDARConfig(**SMALL), half) == pytest.approx(per_token, rel=0.02)
    assert torch.get_default_dtype() == torch.float32


def test_any_decoder_of_transformers_is_counted():
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 500}
    for config in (LlamaConfig(**sizes, intermediate_size=96), GPTNeoXConfig(**sizes, intermediate_size=96)):
        model = cost.Model.of(config)
        real = AutoModelForCausalLM.from_config(config)
        assert model.weights == sum(parameter.numel() for parameter in real.parameters())
        assert 20 * 64 < model.kept < 60 * 64  # some tens of bytes for each number of the residual stream
        assert cost.memory(model, cost.Run(), tokens=100).total > 16 * model.weights


def labels_mask(length: int) -> torch.Tensor:
    block = torch.arange(length)[None] // 4
    return dense_mask(Labels(torch.zeros_like(block), block, torch.zeros_like(block, dtype=torch.bool)))


def test_operations_are_those_that_torch_counts():
    """A student's forward and backward pass on a short layout, its head included."""
    torch.manual_seed(0)
    model, ids = SDARForCausalLM(SDARConfig(**SMALL)), torch.arange(128)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, attention_mask=labels_mask(128), position_ids=ids).logits.sum().backward()
    # sdpa's CPU kernel is not counted, as attention is left out here
    assert counter.get_total_flops() == pytest.approx(cost.flops(cost.Model.of(model.config), 128, passes=3), rel=0.02)


def test_sharding_divides_what_it_says(sdar_4b):
    def memory(**run):
        return cost.memory(sdar_4b, cost.Run(processes=8, **run), tokens=4096)

    weights = sdar_4b.weights
    plain, one, two, three = (memory(sharding=sharding) for sharding in cost.SHARDINGS)
    assert plain.optimizer == 8 * weights and one.optimizer == two.optimizer == 12 * weights / 8
    assert one.gradients - two.gradients == pytest.approx(4 * weights * 7 / 8)
    assert two.weights - three.weights == two.reference - three.reference == 2 * weights * 7 / 8
    assert plain.total > one.total > two.total > three.total
    assert one.total - memory(sharding="zero1", second_model=False).total == 2 * weights
    assert memory(trainable=weights // 100).optimizer < plain.optimizer / 90


@pytest.mark.slow
@pytest.mark.parametrize("variant", [train_step.OURS, train_step.CHECKPOINTING])
def test_computed_memory_is_near_the_measured(variant, tmp_path):
    """A process's peak above its models on a CPU: within a factor of 1.5 of the computed."""
    shape = train_step.Shape(layers=4, width=256, vocab=30_000, sequences=4)
    train_step.write_models(shape, tmp_path)
    measured = train_step.peak_megabytes(shape, tmp_path, variant)
    reset_accelerator()
    computed = train_step.computed_peak(train_step.Bench(shape, tmp_path), variant)
    assert computed / 1.5 < measured < computed * 1.5, f"measured {measured:.0f} MB, computed {computed:.0f}"


def test_the_tables_name_every_model_and_number_of_gpus():
    text = cost.tables()
    assert all(f"| {name} | {gpus} |" in text for name in cost.MODELS for gpus in (1, 8, 64))
    page = (ROOT / "docs" / "SCALING.md").read_text()
    assert text in page, "run python -m t3d.training.cost and put its tables there"


@pytest.mark.parametrize("kind", ["sdar_moe", "llada2_moe"])
def test_a_mixture_of_experts_is_measured_too(kind):
    base, own, _ = FAMILIES[kind]
    families()  # registers LLaDA2
    model = cost.Model.of(plain_config(base, own), half=True)
    assert model.weights == cost.parameters(model_class(model.config)(model.config)) and model.kept > 0
    assert cost.kept_per_token(model.config, half=False) == 2 * model.kept

"""The cost model against real models: their weights, what autograd keeps, what a process needs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from studies.benchmarks import train_step
from t3d.blocks.attention import Labels, dense_mask
from t3d.common.paths import ROOT
from t3d.models import SDARConfig, SDARForCausalLM
from t3d.models.loading import load_model
from t3d.training import cost
from tests.conftest import reset_accelerator

SMALL = dict(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)


def built(**sizes) -> SDARForCausalLM:
    with torch.device("meta"):
        return SDARForCausalLM(SDARConfig(**sizes))


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_built_model(tied):
    model = built(**SMALL, tie_word_embeddings=tied)
    assert cost.parameters(model.config) == count(model)


def test_parameters_of_the_embedded_teacher():
    model = load_model(str(ROOT / "models" / "embedded-teacher"))
    assert cost.parameters(model.config) == count(model)


@pytest.mark.parametrize("name", cost.MODELS)
def test_parameters_of_the_released_shapes(name):
    model = built(**vars(cost.MODELS[name]))
    assert cost.parameters(cost.MODELS[name]) == count(model)


def test_the_real_configuration_and_the_size_of_its_weights(shared):
    config = SDARConfig.from_pretrained(shared / "sdar-4b-chat")
    shape = cost.MODELS["SDAR-4B"]
    assert {name: getattr(config, name) for name in vars(shape)} == vars(shape)
    assert 2 * cost.parameters(config) == 8_822_848_512  # total_size of its weight index, in bf16


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_what_a_layer_keeps_is_what_autograd_saves(half):
    """Distinct memory that the backward pass holds on to, of three layers against two; weights left out."""

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
    assert per_token == pytest.approx(cost.kept_per_token(SDARConfig(**SMALL), 2 if half else 4), rel=0.1)


def labels_mask(length: int) -> torch.Tensor:
    block = torch.arange(length)[None] // 4
    return dense_mask(Labels(torch.zeros_like(block), block, torch.zeros_like(block, dtype=torch.bool)))


def test_operations_are_those_that_torch_counts():
    """The student's passes without a reference, on a layout of 128 tokens whose head looks at 40."""
    torch.manual_seed(0)
    model = SDARForCausalLM(SDARConfig(**SMALL))
    ids = torch.arange(128)[None]
    # sdpa's CPU kernel is not counted: eager attention is two products
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(ids, labels_mask(128), position_ids=ids).last_hidden_state
        torch.nn.functional.linear(hidden[0, :40], model.lm_head.weight).sum().backward()
    shape = {"tokens": 128, "keys": 128, "second_model": False, "checkpointing": False}
    chunked = cost.flops(model.config, targets=40, **shape)
    again = 2 * SMALL["vocab_size"] * SMALL["hidden_size"] * 40  # ours projects once more in the backward pass
    assert counter.get_total_flops() == pytest.approx(chunked - again, rel=0.02)
    whole = cost.flops(model.config, targets=40, **shape | {"second_model": True, "checkpointing": True})
    assert whole / chunked == pytest.approx(5 / 3, rel=0.02)


def test_sharding_divides_what_it_says():
    config, settings = cost.MODELS["SDAR-4B"], {"tokens": 4096, "longest": 2048, "processes": 8}
    weights = cost.parameters(config)
    plain, one, two, three = (cost.memory(config, **settings, sharding=sharding) for sharding in cost.SHARDINGS)
    assert plain.optimizer == 8 * weights and one.optimizer == two.optimizer == 12 * weights / 8
    assert one.gradients - two.gradients == pytest.approx(4 * weights * 7 / 8)
    assert two.weights - three.weights == two.reference - three.reference == 2 * weights * 7 / 8
    assert plain.total > one.total > two.total > three.total
    alone = cost.memory(config, **settings, sharding="zero1", second_model=False)
    assert one.total - alone.total == 2 * weights
    adapters = cost.memory(config, **settings, trainable=weights // 100)
    assert adapters.optimizer < plain.optimizer / 90


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

"""LoRA: what is trained, what the reference is, and that the merged export computes what the adapted model does."""

import pytest
import torch

from t3d.training import adapters
from t3d.training.settings import LoraSettings
from tests.conftest import raises_key, tiny_model

pytest.importorskip("peft")

SETTINGS = LoraSettings(rank=3, alpha=12.0)


@pytest.fixture
def adapted():
    """A model whose student adapters are far from zero."""
    model = tiny_model()
    adapters.add(model, SETTINGS, with_reference=True)
    torch.manual_seed(1)
    for parameter in adapters.parameters(model, adapters.STUDENT):
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits


def test_only_the_students_adapters_are_trained_and_start_as_the_base():
    model = tiny_model()
    plain = logits(model)
    adapters.add(model, SETTINGS, with_reference=True)
    torch.testing.assert_close(logits(model), plain)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in name and ".student." in name for name in trained)
    for active in (adapters.REFERENCE, adapters.STUDENT):
        adapters.activate(model, active)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_the_reference_is_the_base_until_it_is_refreshed(adapted):
    student, plain = logits(adapted), logits(tiny_model())
    assert (student - plain).abs().max() > 0.1
    adapters.activate(adapted, adapters.REFERENCE)
    torch.testing.assert_close(logits(adapted), plain)
    with torch.no_grad():
        names = adapters.STUDENT, adapters.REFERENCE
        for mine, theirs in zip(*(adapters.parameters(adapted, name) for name in names), strict=True):
            theirs.copy_(mine)
    torch.testing.assert_close(logits(adapted), student)


def test_merged_weights_are_an_ordinary_model_with_the_same_logits(adapted):
    plain = tiny_model(seed=5)
    merged = adapters.merged(adapted, adapted.state_dict())
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-4, atol=1e-5)


def test_a_name_that_no_layer_has_is_one_line():
    with raises_key("training.lora.target_modules", "[query]"):
        adapters.add(tiny_model(), LoraSettings(rank=2, target_modules=["query"]), with_reference=False)

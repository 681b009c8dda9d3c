"""The frozen reference: how it is stored, and where."""

import pytest
import torch

from t3d.training.reference import FrozenModel, store_matrices_as
from tests.conftest import tiny_model

IDS = torch.arange(24).reshape(2, 12)


def test_stored_as_autocast_rounds_it_is_the_same_to_the_bit():
    model, plain = tiny_model(), tiny_model()
    with torch.no_grad():
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            a.copy_(torch.randn(a.shape) * 0.3)  # not on bf16's grid
            b.copy_(a)
    store_matrices_as(model, torch.bfloat16)
    kinds = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters()}
    assert kinds["q_proj"] == kinds["down_proj"] == kinds["lm_head"] == torch.bfloat16
    assert kinds["embed_tokens"] == kinds["q_norm"] == kinds["input_layernorm"] == kinds["norm"] == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_a_head_that_is_the_embedding_stays_as_it_is():
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    store_matrices_as(model, torch.bfloat16)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.gpu
def test_an_offloaded_reference_is_in_cpu_memory_but_for_its_passes(story_teacher):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from accelerate import Accelerator

    from t3d.common.options import load
    from t3d.training.settings import TrainConfig

    accelerator = Accelerator(mixed_precision="bf16")
    line = [f"model.pretrained_model={story_teacher}", "model.attn_implementation=sdpa"]
    resident, offloaded = (
        FrozenModel(load(TrainConfig, line), str(story_teacher), accelerator, offload) for offload in (False, True)
    )
    assert {p.device.type for p in offloaded.model.parameters()} == {"cpu"}
    assert all(p.is_pinned() for p in offloaded.model.parameters())
    with torch.no_grad():
        assert torch.equal(offloaded(IDS.cuda()).logits, resident(IDS.cuda()).logits)
        with offloaded.on_device():  # for several passes
            assert torch.equal(offloaded(IDS.cuda()).logits, resident(IDS.cuda()).logits)
            assert {p.device.type for p in offloaded.model.parameters()} == {"cuda"}
    assert {p.device.type for p in offloaded.model.parameters()} == {"cpu"}

"""What does not go together is one line before a model loads. That the stages compute alike: test_training.py."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

from t3d.common.options import load
from t3d.training import distribution
from t3d.training.settings import TrainConfig
from tests.conftest import raises_key


@pytest.mark.parametrize(
    "override",
    ["training.reference_offload=true", "training.ema_decay=0.9", "training.lora.rank=4", "training.compile=true"],
)
def test_what_zero_3_does_not_do(override):
    with raises_key(override.partition("=")[0], override, "ZeRO-3", "turn it off"):
        distribution.refuse_with_zero_3(load(TrainConfig, [override]))
    distribution.refuse_with_zero_3(load(TrainConfig, []))


@pytest.mark.parametrize("launched", [False, True])
def test_processes_on_cpus_wait_for_the_one_that_saves(monkeypatch, launched):
    """Not NCCL's 10 minutes. And without a launcher a Mac's GPU, which has no float64, is not taken."""
    given = {}

    class Plain:
        distributed_type = DistributedType.NO

    monkeypatch.setattr(distribution, "Accelerator", lambda **options: given.update(options) or Plain())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    distribution.make_accelerator(load(TrainConfig, []))
    (handler,) = given["kwargs_handlers"]
    assert given["cpu"] and handler.timeout >= timedelta(hours=1)
    assert handler.backend == ("gloo" if launched else None)


@pytest.mark.parametrize("written", ["False", "false"])
def test_a_launch_for_gpus_is_refused_where_there_are_none(monkeypatch, written):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", written)
    with raises_key("use_cpu", "accelerate_configs/cpu.yaml"):
        distribution.make_accelerator(load(TrainConfig, []))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    distribution.refuse_without_gpu("fp16")


@pytest.mark.parametrize("use_cpu", [None, "True"])
def test_fp16_is_refused_on_a_cpu(monkeypatch, use_cpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if use_cpu:
        monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    with raises_key("training.mixed_precision"):
        distribution.make_accelerator(load(TrainConfig, ["training.mixed_precision=fp16"]))
    for precision in ("bf16", "no"):
        distribution.refuse_without_gpu(precision)


def test_fsdp_is_refused(monkeypatch):
    class FSDP:
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr(distribution, "Accelerator", lambda **_: FSDP())
    with raises_key("distributed_type", "FSDP", "accelerate_configs/deepspeed_zero3.yaml"):
        distribution.make_accelerator(load(TrainConfig, []))


@pytest.fixture
def zero_1(monkeypatch):
    """What make_accelerator makes of DeepSpeed's settings under ZeRO-1: (overrides) -> settings."""

    class ZeRO1:
        distributed_type = DistributedType.DEEPSPEED
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=1, deepspeed_config={}))

    def settings(*line: str) -> dict:
        ZeRO1.state.deepspeed_plugin.deepspeed_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
        distribution.make_accelerator(load(TrainConfig, line))
        return ZeRO1.state.deepspeed_plugin.deepspeed_config

    monkeypatch.setattr(distribution, "Accelerator", lambda **_: ZeRO1())
    return settings


def test_zero_1_in_bf16_sums_and_exchanges_gradients_in_fp32(zero_1):
    """And keeps no bf16 copy of them all, which the cost model does not count."""
    found = zero_1("training.mixed_precision=bf16")
    assert found["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert found["data_types"] == {"grad_accum_dtype": "fp32"} and found["communication_data_type"] == "fp32"
    assert not {"data_types", "communication_data_type"} & set(zero_1("training.mixed_precision=no"))


def test_a_deepspeed_that_averages_wrongly_is_refused(zero_1, monkeypatch):
    monkeypatch.setattr(distribution, "version", lambda package: "0.18.9")
    with raises_key("deepspeed", "0.18.9", "pip install 'deepspeed>=0.19.8'"):
        zero_1()

"""What T3D uses of SGLang, checked on the installed package: an upgrade that breaks us is seen here, without a GPU."""

import argparse
import inspect
import pkgutil
import shlex
import subprocess
import sys
import tomllib

import pytest

from t3d.blocks.settings import DecodeSettings
from t3d.common.paths import ROOT
from t3d.decode.protocol import Request
from t3d.decode.sglang import SGLangEngine, Weights, _Run
from t3d.integrations.sglang_plugin import HOOKS, IGNORED_BY_ALGORITHMS, KEY, NAME, Rules, _hand_over_requests

sglang = pytest.importorskip("sglang", reason="SGLang is not installed (pip install -e '.[sglang]')")


def parameters(path: str) -> list[str]:
    return list(inspect.signature(pkgutil.resolve_name(path)).parameters)


def test_the_version_is_the_pinned_one():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    from importlib.metadata import version

    assert extras["sglang"] == [f"sglang=={version('sglang')}"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("sglang.srt.dllm.algorithm.get_algorithm_cls", ["name"]),
        ("sglang.srt.dllm.config.DllmConfig.from_server_args", ["server_args"]),
        (
            "sglang.srt.managers.tp_worker.TpModelWorker._forward_batch_generation_dllm",
            ["self", *list(inspect.signature(_hand_over_requests).parameters)[1:]],
        ),
        (
            "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
            ".is_request_level_customized_info_key",
            ["self", "key"],
        ),
        ("sglang.srt.models.sdar.SDARForCausalLM.__init__", ["self", "config", "quant_config", "prefix"]),
        ("sglang.srt.models.sdar_moe.SDARMoeForCausalLM.__init__", ["self", "config", "quant_config", "prefix"]),
    ],
)
def test_hooked_functions(path, expected):
    assert parameters(path) == expected
    assert path in [target for target, _, _ in HOOKS]


@pytest.mark.parametrize("method", ["init_step_state", "prepare_inputs", "step", "validate_request"])
def test_overridden_methods(method):
    path = f"sglang.srt.dllm.algorithm.base.DllmAlgorithm.{method}"
    assert parameters(path) == list(inspect.signature(getattr(Rules, method)).parameters)


def test_what_a_dllm_configuration_holds():
    held = parameters("sglang.srt.dllm.config.DllmConfig.__init__")
    assert {"algorithm", "algorithm_config", "block_size", "mask_id", "first_done_first_out_mode"} <= set(held)


def test_what_a_request_holds():
    """Req's attributes are set in __init__, which needs a server; its source names them."""
    from sglang.srt.managers.schedule_batch import Req

    source = "".join(inspect.getsource(c) for c in Req.__mro__ if c.__module__.startswith("sglang"))
    names = ("rid", "origin_input_ids", "sampling_params", "customized_info", "dllm_config", "dllm_algo_state")
    for name in names:
        assert f"self.{name}" in source, name


def payload() -> dict:
    settings = DecodeSettings(top_k=5, top_p=0.5)
    engine = SGLangEngine(list, Weights("m", "v"), mask_id=63, stop_ids=[1, 2], words=60)
    request = Request("data/0", 3, (7, 8, 9))
    return _Run(engine, [request], settings, seed=5)._payload(request, rid="x")


def test_a_request_of_ours_is_one_of_theirs():
    import msgspec
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    body = payload()
    assert set(body) <= set(parameters("sglang.srt.managers.io_struct.GenerateReqInput.__init__"))
    assert set(body) <= set(parameters("sglang.srt.entrypoints.engine.Engine.async_generate"))
    request = GenerateReqInput(**body)
    request.normalize_batch_and_arguments()
    sampling = SamplingParams(**body["sampling_params"])
    sampling.verify(vocab_size=64)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=SamplingParams)
    assert wire.custom_params == body["sampling_params"]["custom_params"], "it does not survive the way to a worker"
    assert wire.stop_token_ids == {1, 2} and wire.max_new_tokens == 2000
    for name, neutral in IGNORED_BY_ALGORITHMS.items():
        assert getattr(sampling, name) == neutral, name
    assert SamplingParams(temperature=0.0).top_k == 1, "greedy is told otherwise now"
    assert SamplingParams().top_k >= 2**30, "'all tokens' is told otherwise now"


def test_the_contract_of_generate():
    from sglang.srt.entrypoints.api_contract import generate_contract_error

    assert generate_contract_error(payload()) is None


def test_pushing_weights():
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    sent = UpdateWeightFromDiskReqInput(model_path="m", weight_version="v", flush_cache=True)
    assert not sent.abort_all_requests, "it waits for what is running"


def test_the_routes():
    """Read in the source: importing the server starts parts of it."""
    (spec,) = [
        m
        for m in pkgutil.iter_modules(pkgutil.resolve_name("sglang.srt.entrypoints").__path__)
        if m.name == "http_server"
    ]
    source = spec.module_finder.find_spec("http_server").loader.get_source("http_server")
    for route in ('"/generate"', '"/model_info"', '"/update_weights_from_disk"', '"weight_version"', '"model_path"'):
        assert route in source, route


def test_the_documented_command():
    from sglang.srt.server_args import ServerArgs

    text = (ROOT / "docs/ENGINES.md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("sglang serve "))
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    given = parser.parse_args([*shlex.split(command)[2:], "--tp-size", "2", "--dp-size", "2", "--no-dllm-fdfo"])
    assert (given.dllm_algorithm, given.dllm_fdfo, given.max_running_requests) == (NAME, False, 256)
    offline = {"model_path", "dllm_algorithm", "dllm_algorithm_config", "max_running_requests", "dtype", "log_level"}
    assert offline | {"tp_size", "dp_size"} <= set(vars(given))


APPLY = f"""
from t3d.integrations.sglang_plugin import HOOKS, Rules, register
from sglang.srt.plugins.hook_registry import HookRegistry
register()
HookRegistry.apply_hooks()
assert HookRegistry._patched == {{target for target, _, _ in HOOKS}}, HookRegistry._patched

from types import SimpleNamespace as N
from sglang.srt.dllm.algorithm import get_algorithm, get_algorithm_cls
from sglang.srt.dllm.algorithm.base import DllmAlgorithm
theirs = get_algorithm_cls("LowConfidence")
assert theirs.__name__ == "LowConfidence" and not issubclass(theirs, Rules)
config = N(algorithm="{NAME}", block_size=4, mask_id=9, first_done_first_out_mode=True, algorithm_config={{}})
ours = get_algorithm(config)
assert isinstance(ours, Rules) and isinstance(ours, DllmAlgorithm) and ours.fdfo and ours.mask_id == 9

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer as Streamer
assert Streamer.is_request_level_customized_info_key(None, "{KEY}") is True
assert Streamer.is_request_level_customized_info_key(None, "other") is False

import json, tempfile
from sglang.srt.dllm.config import DllmConfig
from sglang.srt.server_args import ServerArgs
with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    json.dump({{"block_size": 8, "mask_id": 77}}, file)
    file.flush()
    arguments = {{"dllm_algorithm": "{NAME}", "dllm_algorithm_config": file.name, "max_running_requests": 7}}
    made = DllmConfig.from_server_args(ServerArgs(model_path="models/embedded-teacher", device="cpu", **arguments))
assert (made.block_size, made.mask_id, made.max_running_requests) == (8, 77, 7)

from sglang.srt.utils.hf_transformers.config import get_config
from t3d.integrations.sglang_plugin import _keep_rope_theta
model = get_config("models/embedded-teacher", trust_remote_code=False)
_keep_rope_theta(None, model)
assert model.rope_theta == model.rope_parameters["rope_theta"]
print("applied")
"""


def test_the_hooks_apply():
    """In a process of its own: they patch the package."""
    done = subprocess.run([sys.executable, "-c", APPLY], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("applied\n"), done.stderr[-2000:]

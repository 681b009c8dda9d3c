"""T3D's algorithm behind SGLang's interface, in both schedules: the local engine's trajectories, request by request."""

import asyncio
import dataclasses
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from studies.storymath.problems import generate as problem
from t3d.blocks.settings import DecodeSettings
from t3d.common.paths import ROOT
from t3d.decode.local import LocalEngine
from t3d.decode.protocol import Request
from t3d.decode.sglang import SGLangEngine, Weights, _Run
from t3d.integrations.sglang_plugin import KEY, Rules, asked, denoise
from t3d.models.loading import load_model, load_tokenizer, special_ids
from t3d.tasks import prompt
from tests.conftest import MASK, PAD, STOP, VOCAB, raises_key, tiny_model
from tests.decode.test_local import requests
from tests.integrations.fake_sglang import NEUTRAL, FakeSGLang, TheirScheduler, dllm_config


@pytest.fixture(params=["written down", "SGLang's own"])
def make_server(request):
    """What runs the algorithm: SGLang's loops and result processing as written down, or the installed ones."""
    if request.param == "written down":
        return FakeSGLang
    pytest.importorskip("sglang", reason="SGLang is not installed (pip install -e '.[sglang]')")
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm

    return partial(TheirScheduler, base=DllmAlgorithm)


@pytest.fixture(params=[True, False], ids=["fdfo", "sync"])
def fdfo(request) -> bool:
    return request.param


def essence(trajectories) -> dict:
    kept = ("response_ids", "unmask_step", "length", "finish_reason", "steps", "decode")
    return {t.id: {name: getattr(t, name) for name in kept} for t in trajectories}


def engine(server, *, mask_id=MASK, stop_ids=(STOP, PAD), words=VOCAB) -> SGLangEngine:
    weights = Weights("m", "v")
    return SGLangEngine(lambda: [server], weights, mask_id=mask_id, stop_ids=stop_ids, words=words)


@pytest.mark.parametrize("steps", [4, 2])
def test_the_embedded_teachers_greedy_trajectories(make_server, fdfo, steps):
    source = str(ROOT / "models/embedded-teacher")
    model, tokenizer = load_model(source), load_tokenizer(source)
    ids = special_ids(model.config, tokenizer, model.generation_config)
    settings = DecodeSettings(temperature=0.0, denoising_steps_per_block=steps, max_token=80)
    rng = random.Random(1)
    asked = [Request(f"Story/{i}", 0, tuple(prompt(problem(rng, 2).question, tokenizer)[0].tolist())) for i in range(4)]
    local = LocalEngine(model, mask_id=ids.mask_id, stop_ids=ids.stop_ids, forbidden_ids=ids.forbidden_ids)
    expected = essence(local.generate(asked, settings, seed=0))
    model.config.block_size = settings.block_size
    server = make_server(model, dllm_config(4, ids.mask_id, fdfo=fdfo))
    served = engine(server, mask_id=ids.mask_id, stop_ids=ids.stop_ids, words=len(tokenizer))
    result = list(served.generate(asked, settings, seed=0))
    assert essence(result) == expected and len(result) == len(asked)
    assert {t.finish_reason for t in result} == {"stop"}, "the teacher ends its answers"
    assert max(server.batches) == 3, "requests were not decoded together"
    for t in result:  # a forward per prompt block, per step, and one more per block for the cache
        blocks = (len(t.prompt_ids) + len(t.response_ids)) // 4 - len(t.prompt_ids) // 4
        assert t.forwards == len(t.prompt_ids) // 4 + t.steps + blocks


CASES = [
    DecodeSettings(temperature=0.0, max_token=17, denoising_steps_per_block=3),
    DecodeSettings(temperature=1.0, max_token=18, denoising_steps_per_block=2),
    DecodeSettings(temperature=1.0, top_k=5, top_p=0.8, max_token=18, block_size=8, denoising_steps_per_block=3),
    DecodeSettings(temperature=0.0, max_token=18, remasking_strategy="sequential", denoising_steps_per_block=2),
    DecodeSettings(temperature=0.0, max_token=18, remasking_strategy="low_confidence_dynamic", dynamic_threshold=0.3),
    DecodeSettings(temperature=0.7, max_token=18, remasking_strategy="low_confidence_dynamic", dynamic_threshold=0.3),
    DecodeSettings(temperature=0.7, top_p=0.9, max_token=18, remasking_strategy="random"),
    DecodeSettings(temperature=0.0, max_token=18, remasking_strategy="entropy_bounded", eb_threshold=1.5),
]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.remasking_strategy}-T{s.temperature}-B{s.block_size}")
def test_every_rule_and_the_same_random_stream(make_server, fdfo, settings):
    model = tiny_model(block_size=settings.block_size)
    local = LocalEngine(model, mask_id=MASK, stop_ids=[STOP, PAD], forbidden_ids=[])
    expected = essence(local.generate(requests(), settings, seed=5))
    server = make_server(model, dllm_config(settings.block_size, MASK, fdfo=fdfo))
    assert essence(engine(server).generate(requests(), settings, seed=5)) == expected


def test_requests_with_other_settings_share_a_batch(fdfo):
    """Two clients at one server: the settings belong to the request."""
    model = tiny_model()
    server = FakeSGLang(model, dllm_config(4, MASK, fdfo=fdfo), running=8)
    greedy, hot = DecodeSettings(temperature=0.0, max_token=12), DecodeSettings(temperature=1.5, max_token=12, top_k=9)
    local = LocalEngine(model, mask_id=MASK, stop_ids=[STOP, PAD], forbidden_ids=[])
    expected = [essence(local.generate(requests(), settings, seed=2)) for settings in (greedy, hot)]

    async def both():
        runs = [_Run(engine(server), requests(), settings, 2) for settings in (greedy, hot)]
        for run in runs:
            await run.start()
        results = [[await asyncio.ensure_future(run.next()) for _ in requests()] for run in runs]
        for run in runs:
            await run.stop()
        return results

    assert [essence(result) for result in asyncio.run(both())] == expected
    assert expected[0] != expected[1] and max(server.batches) > len(requests()) // 2


def test_the_mask_and_ids_beyond_the_tokenizer_are_never_drawn():
    settings = DecodeSettings(temperature=0.0)
    ids = torch.full((2, 4), MASK)
    logits = torch.zeros(2, 4, VOCAB)
    logits[..., MASK], logits[..., 50:] = 9.0, 8.0
    logits[..., 7] = 1.0
    before = logits.clone()
    count = torch.zeros(2, dtype=torch.long)
    position = torch.arange(4).expand(2, 4)
    new, unmasked, broken = denoise(ids, logits, position, count, count + 1, count, settings, mask_id=MASK, words=50)
    assert unmasked.sum(1).tolist() == [1, 1] and set(new[unmasked].tolist()) == {7}
    assert torch.equal(logits, before), "the server's logits were changed"
    assert not broken.any()


def test_logits_that_are_no_numbers_end_the_run_with_the_server_named(fdfo):
    model = tiny_model()
    model.lm_head.weight.data[7, 3] = torch.nan
    server = FakeSGLang(model, dllm_config(4, MASK, fdfo=fdfo), running=8)
    with raises_key("model", f"model m on {server.name}: step 1 "):
        list(engine(server).generate(requests(), DecodeSettings(temperature=0.0, max_token=12), seed=2))


def request(prompt=(1, 2, 3), rid="r", config=None, **sampling) -> SimpleNamespace:
    config = config or dllm_config(4, MASK, fdfo=True)
    sampling = SimpleNamespace(**{**NEUTRAL, **sampling})
    return SimpleNamespace(origin_input_ids=list(prompt), rid=rid, sampling_params=sampling, dllm_config=config)


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"custom_params": {KEY: {"block_size": 8}}}, "block_size differs: this server has 4"),
        ({"custom_params": {KEY: {"mask_id": 5}}}, "mask_id differs: this server has 63"),
        ({"custom_params": {KEY: {"remasking_strategy": "best"}}}, "remasking_strategy=best: must be one of"),
        ({"custom_params": {KEY: {"denoising_steps_per_block": 5}}}, "denoising_steps_per_block=5: more steps"),
        ({"custom_params": {KEY: {"self_verify": True}}}, "self_verify"),
        ({"custom_params": {KEY: {"energy_candidates": 2}}}, "energy_candidates"),
        ({"custom_params": {KEY: {"random_init_ratio": 0.1}}}, "random_init_ratio"),
        ({"custom_params": {KEY: {"speed": 1}}}, "t3d.speed: unknown setting"),
        ({"custom_params": {KEY: {"temperature": -1.0}}}, "temperature=-1.0: must be at least 0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1: T3D does not support it"),
        ({"regex": "a+"}, "regex=a+: T3D does not support it"),
        ({"prompt": (1, MASK)}, "the prompt contains the mask token 63"),
    ],
)
def test_what_the_server_cannot_do_is_refused(sampling, told):
    assert told in Rules.validate_request(request(**sampling))


def test_other_clients_use_sglangs_own_parameters():
    config = dllm_config(4, MASK, fdfo=True, remasking_strategy="sequential", mask_id=MASK)
    greedy = asked(request(temperature=1.0, top_k=1, config=config))  # what SGLang makes of temperature 0
    assert dataclasses.replace(greedy.settings, max_token=2000) == DecodeSettings(
        temperature=0.0, top_k=1, remasking_strategy="sequential"
    )
    warm = asked(request(temperature=0.7, top_p=0.9, config=config))
    assert (warm.settings.temperature, warm.settings.top_p, warm.settings.top_k) == (0.7, 0.9, 0)
    assert asked(request(rid="a")).key != asked(request(rid="b")).key


def test_a_batch_without_its_requests_is_an_error():
    server = FakeSGLang(tiny_model(), dllm_config(4, MASK, fdfo=True))
    with pytest.raises(RuntimeError, match="came without its requests"):
        server.algorithm.init_step_state(SimpleNamespace(input_ids=torch.tensor([1, 2, 3, 4])))


def test_what_cannot_be_served_is_refused_before_any_request():
    served = engine(FakeSGLang(tiny_model(), dllm_config(4, MASK, fdfo=True)))
    with raises_key("rollout.self_verify"):
        next(served.generate(requests(), DecodeSettings(self_verify=True), 0))
    with raises_key("rollout.energy_candidates"):
        next(served.generate(requests(), DecodeSettings(energy_candidates=2), 0))
    with raises_key("rollout.engine"):
        next(served.generate(requests(), DecodeSettings(), 0, on_step=print))
    with raises_key("prompt", "p/0/0"):
        next(served.generate([Request("p/0", 0, (1, MASK))], DecodeSettings(), 0))
    assert list(served.generate([], DecodeSettings(), 0)) == []


def test_a_short_context_is_told_apart_from_an_answers_end():
    model = tiny_model()
    model.lm_head.weight.data[[STOP, PAD]] = 0
    served = engine(FakeSGLang(model, dllm_config(4, MASK, fdfo=True), context=16))
    with raises_key("rollout.engine", "1 of 1 requests", "context"):
        list(served.generate(requests([5]), DecodeSettings(temperature=0.0, max_token=40), 0))

"""EDLM's reweighting against enumeration and against a slow loop at block size 1."""

import itertools
import math
from collections import deque
from dataclasses import replace

import pytest
import torch

from t3d.blocks.decoding import choose, distribution, draw, inverse_cdf, stream_key, uniforms
from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import names
from t3d.common.options import load
from t3d.decode import energy
from t3d.decode.energy import candidate_uniforms
from t3d.decode.local import Run
from t3d.decode.protocol import Request
from t3d.evaluation.results import fixed_steps
from t3d.evaluation.run import results_file
from t3d.evaluation.scoring import strategy
from t3d.evaluation.settings import EvalConfig
from t3d.rollout.settings import SampleConfig
from tests.conftest import MASK, PAD, STOP, raises_key, tiny_model
from tests.decode.test_local import engine, requests
from tests.decode.test_verify import block_logits, decode, ended, next_logits


def log_ar(model, before: list[int], block: list[int], settings: DecodeSettings) -> torch.Tensor:
    """(block,) log-probabilities of a block's tokens, each from a forward of its own at block size 1."""
    start, size = len(before), settings.block_size
    rows = [next_logits(model, before + block[:i], start, size) for i in range(size)]
    scores = (torch.stack(rows) / settings.temperature).log_softmax(-1)
    return scores.gather(-1, torch.tensor(block).unsqueeze(-1)).squeeze(-1)


def slow_energy(model, request: Request, settings: DecodeSettings, seed: int) -> tuple[list[int], list[int], int]:
    """Ids and unmask steps of the response, and the forwards they take, candidate by candidate, token by token."""
    model.config.block_size = size = settings.block_size
    ids, prompt, steps, when = list(request.prompt_ids), len(request.prompt_ids), 0, []
    forwards = int(prompt >= size)
    key = torch.tensor([stream_key(seed, request.prompt, request.sample)])
    while not ended(ids, prompt, settings.max_token) or len(ids) == prompt:
        start = len(ids) // size * size
        known, at = len(ids) - start, [0] * size
        ids += [MASK] * (size - known)
        for stage in range(2 * size):
            masked = torch.tensor([token == MASK for token in ids[start:]])
            if not masked.any():
                break
            steps += 1
            forwards += 1 + settings.energy_candidates
            position, now = torch.arange(start, start + size), torch.tensor(steps)
            logits = block_logits(model, ids, start)
            fillings, weights = [], []
            for candidate in range(settings.energy_candidates):
                u = uniforms(key, position, now, stream=4 + candidate if candidate else 0)
                token, sure, entropy = draw(logits, u, settings, need_entropy=True)
                token = torch.where(masked, token, torch.tensor(ids[start:]))
                weight = log_ar(model, ids[:start], token.tolist(), settings)[int(masked.nonzero()[0]) :].sum()
                fillings.append((token, sure))
                weights.append(weight - sure.log()[masked].sum())
            u = uniforms(key, torch.tensor([start]), now, stream=4)
            token, sure = fillings[int(inverse_cdf(torch.stack(weights).softmax(-1)[None], u))]
            here = {"key": key, "position": position[None], "step": now[None], "stage": torch.tensor([stage])}
            picked = choose(masked[None], sure[None], entropy[None], settings, **here)[0]
            for i in picked.nonzero().flatten().tolist():
                ids[start + i], at[i] = int(token[i]), steps
        when += at[known:]
    return ids[prompt:], when, forwards


CASES = [
    DecodeSettings(temperature=1.0, denoising_steps_per_block=1, energy_candidates=5),
    DecodeSettings(temperature=0.7, denoising_steps_per_block=2, energy_candidates=3, block_size=8),
    DecodeSettings(temperature=2.0, denoising_steps_per_block=3, energy_candidates=2, top_k=8, top_p=0.9),
    DecodeSettings(temperature=1.0, denoising_steps_per_block=2, energy_candidates=4, remasking_strategy="sequential"),
    DecodeSettings(temperature=1.0, denoising_steps_per_block=2, energy_candidates=4, remasking_strategy="random"),
    DecodeSettings(
        temperature=1.0, energy_candidates=3, remasking_strategy="low_confidence_dynamic", dynamic_threshold=0.3
    ),
    DecodeSettings(temperature=1.0, energy_candidates=3, remasking_strategy="entropy_bounded", eb_threshold=2.0),
]
CASES = [replace(settings, max_token=9) for settings in CASES]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.remasking_strategy}-B{s.block_size}-T{s.temperature}")
def test_equals_the_oracle(settings):
    """Ids, unmask steps and forwards: each step takes its own and one per candidate. Lanes are refilled and drift."""
    model = tiny_model()
    found, plain = decode(model, settings, max_active=3), decode(model, replace(settings, energy_candidates=1))
    for request in requests():
        result = found[request.id]
        assert (result.response_ids, result.unmask_step, result.forwards) == slow_energy(model, request, settings, 5)
    assert any(plain[name].response_ids != found[name].response_ids for name in found)


@pytest.mark.parametrize("strategy", names())
def test_lanes_order_commits_and_portions_change_nothing(model, strategy, monkeypatch):
    settings = DecodeSettings(
        temperature=1.0, max_token=12, denoising_steps_per_block=2, energy_candidates=5, remasking_strategy=strategy
    )
    runs = []
    there, back = requests(), requests()[::-1]
    for lanes, prompts, fused, tokens in [(1, there, True, 1), (3, back, True, 80), (64, there, False, 2**15)]:
        monkeypatch.setattr(energy, "TOKENS_SCORED", tokens)  # how many candidates go side by side
        results = decode(model, settings, prompts, seed=1, max_active=lanes, fused_commit=fused).values()
        runs.append({r.id: (r.response_ids, r.unmask_step, r.length, r.finish_reason) for r in results})
    assert runs[0] == runs[1] == runs[2]


def test_forwards(model):
    """A prompt of two blocks, then per block two steps and for each of them three candidates."""
    model.lm_head.weight.data[:] = 0  # nothing but ties, and no answer that stops but by chance
    settings = DecodeSettings(
        temperature=1.0, top_k=1, denoising_steps_per_block=2, max_token=20, energy_candidates=3
    )  # top_k=1: id 0 again and again
    (result,) = decode(model, settings, requests([8])).values()
    assert result.steps == 10 and result.forwards == 1 + 10 * (1 + 3)
    done = []
    model.register_forward_hook(lambda *_: done.append(1))
    (result,) = decode(model, replace(settings, energy_candidates=1), requests([8])).values()
    assert result.steps == 10 and result.forwards == 1 + 10 == len(done), "nothing is scored when it is off"


# ---------------------------------------------------------------------------------------------------------------------
# The law


def enumerated(model, request: Request, settings: DecodeSettings) -> tuple[dict, dict]:
    """{filling: probability} of a block of two masks: the draft's, and EDLM's."""
    ids, model.config.block_size = list(request.prompt_ids), 2
    first, second = distribution(block_logits(model, [*ids, MASK, MASK], len(ids)), settings)
    places = [p.nonzero().flatten().tolist() for p in (first, second)]
    draft = {pair: float(first[pair[0]] * second[pair[1]]) for pair in itertools.product(*places)}
    likelihood = {pair: float(log_ar(model, ids, list(pair), settings).sum().exp()) for pair in draft}
    return draft, {pair: p / sum(likelihood.values()) for pair, p in likelihood.items()}


def counted(model, request: Request, settings: DecodeSettings, draws: int) -> dict:
    count: dict[tuple, int] = {}
    prompts = [replace(request, sample=k) for k in range(draws)]
    for result in engine(model, max_active=1000).generate(prompts, settings, seed=0):
        pair = tuple(result.response_ids)
        count[pair] = count.get(pair, 0) + 1
    return count


def test_the_law_of_the_choice():
    """Two tokens with four choices each. Of two candidates it is known exactly, of many it is EDLM's."""
    model, (prompt,) = tiny_model(2), requests([6])
    settings = DecodeSettings(block_size=2, denoising_steps_per_block=1, temperature=2.0, top_k=4, max_token=2)
    draft, edlm = enumerated(model, prompt, settings)
    of_two = dict.fromkeys(draft, 0.0)
    for a, b in itertools.product(draft, repeat=2):
        weights = edlm[a] / draft[a], edlm[b] / draft[b]
        for pair, weight in zip((a, b), weights, strict=True):
            of_two[pair] += draft[a] * draft[b] * weight / sum(weights)
    n = 4000
    two = counted(model, prompt, replace(settings, energy_candidates=2), n)
    assert two.keys() <= draft.keys() and len(draft) == 16
    chi_square = sum((two.get(pair, 0) - n * p) ** 2 / (n * p) for pair, p in of_two.items())
    assert chi_square < 37.7  # 15 degrees of freedom: exceeded with a chance of .001

    n = 2000
    many = counted(model, prompt, replace(settings, energy_candidates=48), n)
    from_edlm, from_two, from_draft = (
        sum(abs(many.get(pair, 0) / n - p) for pair, p in law.items()) / 2 for law in (edlm, of_two, draft)
    )
    # What the frequencies of n draws from the law itself are away from it, on average.
    by_chance = sum((p * (1 - p) / (2 * math.pi * n)) ** 0.5 for p in edlm.values())
    assert from_edlm < 2 * by_chance < from_two < from_draft


def test_the_log_likelihood_is_that_of_a_slow_loop(model):
    """Fillings of a half-shown block: what stands before the first mask is left out, what stands behind it is not."""
    settings = DecodeSettings(temperature=0.7, max_token=8, energy_candidates=3, block_size=4)
    prompts = requests([9, 6])
    model.config.block_size = 4
    run = Run(engine(model), settings, seed=0, lanes=2, capacity=20)
    generator = torch.Generator().manual_seed(0)
    filled = torch.randint(0, 60, (2, 3, 4), generator=generator)
    masked = torch.tensor([[False, True, False, True], [False, False, True, True]])
    for row, request in enumerate(prompts):  # what the prompts show of their blocks
        known = len(request.prompt_ids) % 4
        filled[row, :, :known] = torch.tensor(request.prompt_ids[len(request.prompt_ids) - known :])
    with torch.inference_mode():
        run.refill(deque(prompts))
        found = run.energy.log_likelihood(torch.tensor([0, 1]), filled, masked)
    for row, request in enumerate(prompts):
        before = list(request.prompt_ids[: len(request.prompt_ids) // 4 * 4])
        for candidate in range(3):
            scores = log_ar(model, before, filled[row, candidate].tolist(), settings)
            expected = scores[int(masked[row].nonzero()[0]) :].sum()
            torch.testing.assert_close(found[row, candidate], expected, atol=1e-4, rtol=1e-5)


def test_the_first_candidate_is_the_plain_draft_and_more_leave_the_others_alone():
    key, position, step = torch.tensor([3, 4]), torch.tensor([0, 9]), torch.tensor([1, 2])
    few, many = (candidate_uniforms(key, position, step, n) for n in (2, 7))
    assert torch.equal(few, many[:, :2]) and torch.equal(many[:, 0], uniforms(key, position, step))
    assert len(many.unique()) == 14


# ---------------------------------------------------------------------------------------------------------------------
# The option


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["rollout.temperature=0"], "temperature 0"),
        (["rollout.self_verify=true"], "self_verify"),
        (["rollout.block_size=1", "rollout.denoising_steps_per_block=1"], "block_size"),
        (["rollout.engine=sglang"], "rollout.engine=sglang"),
        (["rollout.energy_candidates=0"], "=0"),
    ],
)
@pytest.mark.parametrize("schema", [SampleConfig, EvalConfig])
def test_invalid_combinations_are_one_line(schema, more, told):
    with raises_key("rollout.energy_candidates", told):
        load(schema, ["rollout.temperature=1", "rollout.energy_candidates=8", *more])


def test_off_by_default_and_a_result_of_its_own():
    off, on = load(EvalConfig, []), load(EvalConfig, ["rollout.energy_candidates=8"])
    assert off.rollout.energy_candidates == 1 and on.rollout.decode_settings().energy_candidates == 8
    assert results_file(off) != results_file(on)
    assert strategy(on.rollout) == "low_confidence_static+energy8" and fixed_steps(strategy(on.rollout))
    assert not fixed_steps("low_confidence_static+verify") and not fixed_steps("entropy_bounded+energy8")


def test_generate_takes_it(model):
    request = requests([6])[0]
    shared = {"do_sample": True, "max_new_tokens": 14, "denoising_steps_per_block": 2, "eos_token_id": [STOP, PAD]}
    prompt = torch.tensor([request.prompt_ids])
    new = model.generate(prompt, energy_candidates=4, seed=5, **shared)[0, 6:].tolist()
    settings = DecodeSettings(temperature=1.0, max_token=14, denoising_steps_per_block=2, energy_candidates=4)
    expected, _, _ = slow_energy(model, replace(request, prompt="0"), settings, seed=5)
    assert new == expected[: len(new)] and len(new) > 4
    with raises_key("energy_candidates", "=4"):
        model.generate(prompt, energy_candidates=4, max_new_tokens=4, do_sample=False)

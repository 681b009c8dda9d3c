"""Self-verification against slow oracles that know no cache, no lanes and no mask predicate."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from t3d.blocks.decoding import choose, distribution, draw, inverse_cdf, stream_key, uniforms
from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import names
from t3d.common.options import load
from t3d.data.shards import claim_folder
from t3d.data.trajectory import Trajectory
from t3d.decode.protocol import Request, Step
from t3d.decode.verify import accepted, close_up, replacement
from t3d.evaluation.run import results_file
from t3d.evaluation.settings import EvalConfig
from t3d.rollout.run import claimed_settings
from t3d.rollout.settings import SampleConfig
from tests.conftest import MASK, PAD, STOP, raises_key, tiny_model
from tests.decode.test_local import engine, requests


def decode(model, settings: DecodeSettings, prompts=None, seed: int = 5, **options) -> dict[str, Trajectory]:
    prompts = requests() if prompts is None else prompts
    found = list(engine(model, **options).generate(prompts, settings, seed))
    assert len(found) == len(prompts)
    return {r.id: r.validate(mask_id=MASK) for r in found}


@torch.no_grad()
def block_logits(model, ids: list[int], start: int) -> torch.Tensor:
    """(block, vocab) of a drafting step: one forward over everything, on the model's own grid."""
    logits = model(torch.tensor([ids])).logits[0, start:].clone()
    logits[:, MASK] = -torch.inf
    return logits


@torch.no_grad()
def next_logits(model, ids: list[int], start: int, size: int) -> torch.Tensor:
    """(vocab,) of the next token at block size 1: blocks of ``size`` before ``start``, from there one token each."""
    n = len(ids) + 1
    sees = [[k <= q if q >= start else k // size <= q // size for k in range(n)] for q in range(n)]
    logits = model(torch.tensor([[*ids, MASK]]), torch.tensor(sees)[None, None]).logits[0, -1].clone()
    logits[MASK] = -torch.inf
    return logits


def ended(ids: list[int], prompt: int, max_token: int) -> bool:
    answer = ids[prompt : prompt + max_token]
    return STOP in answer or PAD in answer or len(ids) >= prompt + max_token


def one_by_one(model, request: Request, settings: DecodeSettings) -> list[int]:
    """Greedy decoding at block size 1 behind blocks of ``settings.block_size``."""
    ids, prompt, size = list(request.prompt_ids), len(request.prompt_ids), settings.block_size
    while True:
        ids.append(int(next_logits(model, ids, len(ids) // size * size, size).argmax()))
        if len(ids) % size == 0 and ended(ids, prompt, settings.max_token):
            return ids[prompt:]


def slow_self_verify(model, request: Request, settings: DecodeSettings, seed: int) -> tuple[list[int], list[int], int]:
    """Draft, verify, draft again: ids and unmask steps of the response, and the forwards they take."""
    model.config.block_size = size = settings.block_size
    ids, prompt, steps, when = list(request.prompt_ids), len(request.prompt_ids), 0, []
    forwards = int(prompt >= size)
    key = torch.tensor([stream_key(seed, request.prompt, request.sample)])

    def u(position: int, stream: int) -> torch.Tensor:
        return uniforms(key, torch.tensor([position]), torch.tensor(steps), stream)

    def judge(position: int, token: int, drawn_from) -> tuple[bool, int]:
        """Whether a drafted token stays, and the verifier's own."""
        logits = next_logits(model, ids[:position], start, size)[None]
        if settings.temperature == 0:
            return token == int(logits.argmax()), int(logits.argmax())
        p = distribution(logits, settings)
        if token == MASK:
            return False, int(inverse_cdf(p, u(position, 0)))
        stays = float(u(position, 2)) < min(1.0, float(p[0, token] / drawn_from[token]))
        left = (p - drawn_from).clamp(min=0)
        return stays, int(inverse_cdf(left / left.sum() if left.sum() > 0 else p, u(position, 0)))

    while not ended(ids, prompt, settings.max_token) or len(ids) == prompt:
        start = len(ids) // size * size
        settled, at = len(ids), [0] * size
        ids += [MASK] * (start + size - settled)
        drawn_from: list = [None] * size
        while settled < start + size:
            if settled < start + size - 1 or not any(at):  # the last position alone needs no second draft
                for stage in range(2 * size):
                    masked = torch.tensor([[token == MASK for token in ids[start:]]])
                    if not masked.any():
                        break
                    steps, forwards = steps + 1, forwards + 1
                    logits, position = block_logits(model, ids, start), torch.arange(start, start + size)
                    token, sure, entropy = draw(
                        logits, uniforms(key, position, torch.tensor(steps)), settings, need_entropy=True
                    )
                    here = {"key": key, "position": position[None]}
                    here |= {"step": torch.tensor([steps]), "stage": torch.tensor([stage])}
                    picked = choose(masked, sure[None], entropy[None], settings, **here)[0]
                    for i in picked.nonzero().flatten().tolist():
                        ids[start + i], at[i] = int(token[i]), steps
                        drawn_from[i] = distribution(logits, settings)[i] if settings.temperature else None
            steps, forwards = steps + 1, forwards + 1
            while settled < start + size:
                stays, own = judge(settled, ids[settled], drawn_from[settled - start])
                settled += 1
                if not stays:
                    ids[settled - 1], at[settled - 1 - start] = own, steps
                    ids[settled:] = [MASK] * (start + size - settled)
                    break
        when += at[max(0, prompt - start) :]
    numbers = {step: n for n, step in enumerate(sorted(set(when)), 1)}
    return ids[prompt:], [numbers[step] for step in when], forwards


CASES = [
    DecodeSettings(temperature=0.0, max_token=18, denoising_steps_per_block=1),
    DecodeSettings(temperature=0.0, max_token=17, denoising_steps_per_block=3),
    DecodeSettings(temperature=0.0, max_token=18, block_size=8, denoising_steps_per_block=2),
    DecodeSettings(temperature=0.0, max_token=18, remasking_strategy="low_confidence_dynamic", dynamic_threshold=0.3),
    DecodeSettings(temperature=1.0, max_token=18, denoising_steps_per_block=1),
    DecodeSettings(temperature=0.7, top_k=8, top_p=0.9, max_token=18, block_size=8, denoising_steps_per_block=2),
    DecodeSettings(temperature=2.0, max_token=15, remasking_strategy="sequential", denoising_steps_per_block=2),
    DecodeSettings(temperature=1.0, max_token=18, remasking_strategy="entropy_bounded", eb_threshold=1.5),
]
CASES = [replace(settings, self_verify=True) for settings in CASES]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.remasking_strategy}-T{s.temperature}-B{s.block_size}")
def test_equals_the_oracle(settings, fused):
    """Ids, unmask steps and the number of forwards; lanes are refilled and drift apart."""
    model = tiny_model()
    found, redrafted = decode(model, settings, max_active=3, fused_commit=fused), 0
    for request in requests():
        result = found[request.id]
        ids, when, forwards = slow_self_verify(model, request, settings, seed=5)
        assert (result.response_ids, result.unmask_step) == (ids, when), request.id
        blocks = (len(request.prompt_ids) % settings.block_size + len(ids)) // settings.block_size
        assert result.forwards == forwards + (0 if fused else blocks - 1)
        redrafted += result.forwards > result.steps + 1
    assert redrafted  # or nothing was ever rejected, and the test shows nothing


@pytest.mark.parametrize("strategy", names())
@pytest.mark.parametrize("steps", [1, 3])
def test_greedy_is_sequential_decoding_at_block_size_1(strategy, steps):
    """Whatever drafted it: strategies and steps change the forwards, never the answer."""
    model = tiny_model(1)
    settings = DecodeSettings(
        temperature=0.0,
        max_token=19,
        remasking_strategy=strategy,
        denoising_steps_per_block=steps,
        dynamic_threshold=0.2,
        eb_threshold=2.0,
        self_verify=True,
    )
    found = decode(model, settings)
    for request in requests():
        assert found[request.id].response_ids == one_by_one(model, request, settings)
    plain = decode(model, replace(settings, self_verify=False))
    assert any(plain[name].response_ids != found[name].response_ids for name in found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_slots_order_and_commits_change_nothing(model, temperature):
    settings = DecodeSettings(temperature=temperature, max_token=20, denoising_steps_per_block=2, self_verify=True)
    runs = []
    for lanes, prompts, fused in [(1, requests(), True), (3, requests()[::-1], True), (64, requests(), False)]:
        results = decode(model, settings, prompts, seed=1, max_active=lanes, fused_commit=fused).values()
        runs.append({r.id: (r.response_ids, r.unmask_step, r.length, r.finish_reason) for r in results})
    assert runs[0] == runs[1] == runs[2]


def test_forwards_of_a_draft_that_always_passes(model):
    """A head that knows one word: every verification passes, and a block takes its steps and one forward more."""
    model.lm_head.weight.data[:] = 0  # all ties: the argmax is id 0 for drafter and verifier alike
    settings = DecodeSettings(temperature=0.0, denoising_steps_per_block=2, max_token=20, self_verify=True)
    (result,) = decode(model, settings, requests([8])).values()
    assert result.unmask_step == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10]
    assert result.steps == 10 and result.forwards == 1 + 10 + 5


def test_forwards_of_a_draft_that_never_passes(model, monkeypatch):
    """Each verification settles one token, the last of a block without a draft: 3 x 2 + 1 forwards for four tokens."""
    from t3d.decode import verify

    monkeypatch.setattr(verify, "accepted", lambda logits, token, *args: torch.zeros_like(token, dtype=torch.bool))
    settings = DecodeSettings(temperature=0.0, denoising_steps_per_block=1, max_token=8, self_verify=True)
    model.lm_head.weight.data[[STOP, PAD]] = 0
    (result,) = decode(model, settings, requests([8])).values()
    assert result.unmask_step == [1, 2, 3, 4, 5, 6, 7, 8] and result.forwards == 1 + 2 * 7
    assert result.response_ids == one_by_one(model, requests([8])[0], settings)


def test_the_law_of_a_verified_token_is_the_verifiers():
    """Draws by the draft, accepted or replaced: their frequencies are p_verify's, filters included."""
    generator = torch.Generator().manual_seed(0)
    ours, drafts = 1.5 * torch.randn(2, 1, 12, generator=generator)
    rows = 400_000
    settings = DecodeSettings(temperature=0.8, top_k=9, top_p=0.95)
    p, q = distribution(ours, settings), distribution(drafts, settings)
    u = torch.rand(3, rows, generator=generator)
    token = inverse_cdf(q.expand(rows, -1), u[0])
    stays = accepted(ours.expand(rows, -1), token, q[0, token], u[1], settings)
    drafted = torch.ones(rows, dtype=torch.bool)
    own = replacement(ours.expand(rows, -1), drafts.expand(rows, -1), drafted, u[2], settings)
    frequency = torch.bincount(torch.where(stays, token, own), minlength=12) / rows
    torch.testing.assert_close(frequency, p[0], atol=4e-3, rtol=0)
    assert math.isclose(float(stays.float().mean()), float(torch.minimum(p, q).sum()), abs_tol=4e-3)
    undrafted = replacement(ours.expand(rows, -1), drafts.expand(rows, -1), ~drafted, u[2], settings)
    torch.testing.assert_close(torch.bincount(undrafted, minlength=12) / rows, p[0], atol=4e-3, rtol=0)


@pytest.mark.parametrize("strategy, steps", [("low_confidence_static", 1), ("sequential", 2)])
def test_the_law_of_a_verified_block_is_that_of_sequential_sampling(strategy, steps):
    """Answers of two tokens with six choices each: 36 frequencies against their probabilities."""
    model = tiny_model(2)
    settings = DecodeSettings(
        block_size=2,
        denoising_steps_per_block=steps,
        remasking_strategy=strategy,
        temperature=3.0,
        top_k=6,
        max_token=2,
        self_verify=True,
    )
    prompt, law = requests([6])[0], {(): 1.0}
    for _ in range(2):
        grown = {}
        for said, chance in law.items():
            p = distribution(next_logits(model, [*prompt.prompt_ids, *said], 6, 2)[None], settings)[0]
            grown |= {(*said, i): chance * float(p[i]) for i in p.nonzero().flatten().tolist()}
        law = grown
    prompts = [replace(prompt, sample=k) for k in range(6000)]
    count = dict.fromkeys(law, 0)
    for result in engine(model, max_active=1000).generate(prompts, settings, seed=0):
        count[tuple(result.response_ids)] += 1  # KeyError: an answer that the verifier cannot give
    expected = {said: len(prompts) * chance for said, chance in law.items()}
    chi_square = sum((count[said] - n) ** 2 / n for said, n in expected.items())
    assert len(law) == 36 and chi_square < 66.6  # 35 degrees of freedom: exceeded with a chance of .001


def test_streams_do_not_meet():
    """No two (position, stream) share a number, and the streams of old are what they were."""
    key, position, step = torch.tensor(stream_key(1, "p/0", 0)), torch.arange(20_000), torch.tensor(3)
    drawn = torch.stack([uniforms(key, position, step, stream) for stream in range(8)])
    assert abs(float(drawn.double().mean()) - 0.5) < 0.005
    assert float(torch.corrcoef(drawn.double()).triu(1).abs().max()) < 0.03
    shifted = torch.stack([drawn[0, 1:], drawn[2, :-1]]).double()
    assert float(torch.corrcoef(shifted)[0, 1].abs()) < 0.03
    old = uniforms(torch.tensor(7), torch.tensor([0, 5]), torch.tensor(2), stream=1)
    assert [round(float(x), 6) for x in old] == [
        0.902735,
        0.01396,
    ]


def test_close_up():
    assert close_up([7, 3, 3, 9]) == [2, 1, 1, 3]
    assert close_up([1, 2, 2, 3]) == [1, 2, 2, 3]


def test_an_observer_sees_drafts_verdicts_and_finished_blocks(model):
    settings = DecodeSettings(temperature=0.0, denoising_steps_per_block=2, max_token=12, self_verify=True)
    seen: list[Step] = []
    (result,) = engine(model).generate(requests([6]), settings, 0, seen.append)
    assert [len(step.response_ids) for step in seen if step.block_complete] == [2, 6, 10, 14][: len(seen)]
    for step in seen:
        assert not (step.block_complete and MASK in step.response_ids)
        if step.block_complete:
            assert step.response_ids == result.response_ids[: len(step.response_ids)]
    assert [step.step for step in seen] == list(range(1, len(seen) + 1))
    assert result.forwards == 1 + len(seen)


def test_generate_takes_it(model):
    prompt = torch.tensor([requests([6])[0].prompt_ids])
    shared = {"do_sample": False, "max_new_tokens": 14, "denoising_steps_per_block": 1, "eos_token_id": [STOP, PAD]}
    new = model.generate(prompt, self_verify=True, **shared)[0, 6:].tolist()
    settings = DecodeSettings(temperature=0.0, max_token=14)
    expected = one_by_one(model, requests([6])[0], settings)
    assert new == expected[: len(new)]


# ---------------------------------------------------------------------------------------------------------------------
# The option


def test_invalid_combinations_are_one_line(model):
    for schema in (SampleConfig, EvalConfig):
        with raises_key("rollout.self_verify", "=true", "block_size"):
            load(schema, ["rollout.self_verify=true", "rollout.block_size=1", "rollout.denoising_steps_per_block=1"])
    with raises_key("rollout.self_verify", "=yes please"):
        load(EvalConfig, ["rollout.self_verify=yes please"])
    with raises_key("self_verify", "=true"):
        model.generate(torch.tensor([[1, 2]]), self_verify=True, block_size=1, max_new_tokens=4)


def test_off_by_default_and_a_result_of_its_own():
    off, on = load(EvalConfig, []), load(EvalConfig, ["rollout.self_verify=true"])
    assert not off.rollout.self_verify and on.rollout.decode_settings().self_verify
    assert results_file(off) != results_file(on)
    assert asdict(off.rollout.decode_settings())["self_verify"] is False


def test_a_folder_holds_either(tmp_path):
    off, on = load(SampleConfig, []), load(SampleConfig, ["rollout.self_verify=true"])
    claim_folder(tmp_path, claimed_settings(off, "hub/id"))
    with raises_key("self_verify", "self_verify=False", "self_verify=True"):
        claim_folder(tmp_path, claimed_settings(on, "hub/id"))

"""Token editing against a brute-force loop, its record, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch

from t3d.blocks.decoding import choose, draw, stream_key, uniforms
from t3d.blocks.settings import DecodeSettings
from t3d.common.options import load
from t3d.data.shards import ShardWriter, read_shards
from t3d.data.trajectory import Trajectory, shown_after
from t3d.decode.edit import Editor
from t3d.decode.local import Run
from t3d.rollout.settings import SampleConfig
from t3d.states.base import State
from tests.conftest import MASK, STOP, raises_key
from tests.decode.test_local import engine, requests
from tests.test_training_equals_decoding import draw_states, training_logits

STATIC = DecodeSettings(edit_threshold=0.1, edit_steps=3, temperature=0.0, max_token=18)
CASES = [
    replace(STATIC, denoising_steps_per_block=1),
    replace(STATIC, denoising_steps_per_block=1, edit_steps=1),
    replace(STATIC, denoising_steps_per_block=2, temperature=1.5),
    replace(STATIC, block_size=8, denoising_steps_per_block=3, temperature=3.0, edit_threshold=0.05),
    replace(STATIC, remasking_strategy="low_confidence_dynamic", dynamic_threshold=0.5, temperature=1.0),
]
NAMES = [f"{s.remasking_strategy}-B{s.block_size}-{s.denoising_steps_per_block}+{s.edit_steps}" for s in CASES]


def oracle(model, request, settings: DecodeSettings, seed: int) -> dict:
    """Whole forwards over the sequence so far; the rule of edits written out for one block."""
    model.config.block_size = size = settings.block_size
    prompt, ids, steps, when, edits = len(request.prompt_ids), list(request.prompt_ids), 0, [], []
    key, allowed = (
        torch.tensor([stream_key(seed, request.prompt, request.sample)]),
        settings.denoising_steps_per_block + settings.edit_steps,
    )
    forwards = int(prompt >= size)
    while True:
        start = len(ids) // size * size
        known = len(ids) - start
        block, written = ids[start:] + [MASK] * (size - known), [0] * size
        for stage in range(100):
            steps, forwards = steps + 1, forwards + 1
            masked = torch.tensor([[token == MASK for token in block]])
            with torch.no_grad():
                logits = model(torch.tensor([ids[:start] + block])).logits[0, start:].clone()
            logits[:, MASK] = -torch.inf
            position = torch.arange(start, start + size)
            token, confidence, _ = draw(logits, uniforms(key, position, torch.tensor(steps)), settings)
            at = {"key": key, "position": position[None], "step": torch.tensor([steps]), "stage": torch.tensor([stage])}
            picked = choose(masked, confidence[None], None, settings, **at)[0].tolist()
            sure, best = logits.softmax(-1).max(-1)
            changed = False
            for i in range(known, size):
                if picked[i]:
                    block[i], written[i], changed = int(token[i]), steps, True
                elif not masked[0, i] and best[i] != block[i] and sure[i] > settings.edit_threshold:
                    edits.append([start + i - prompt, written[i], block[i]])
                    block[i], written[i], changed = int(best[i]), steps, True
            if MASK not in block and (not changed or stage + 1 >= allowed):
                break
        ids, when = ids[:start] + block, when + written[known:]
        answer = ids[prompt : prompt + settings.max_token]
        if STOP in answer[start - prompt if start > prompt else 0 :] or len(ids) - prompt >= settings.max_token:
            return {
                "response_ids": ids[prompt:],
                "unmask_step": when,
                "edits": sorted(edits),
                "steps": steps,
                "forwards": forwards,
            }


def decoded(model, settings: DecodeSettings, **options) -> list[Trajectory]:
    decoder = engine(model, **options)
    decoder.stop_ids, decoder.stops = torch.tensor([STOP]), frozenset([STOP])
    return sorted(decoder.generate(requests(), settings, seed=5), key=lambda t: t.id)


@pytest.mark.parametrize("settings", CASES, ids=NAMES)
def test_equals_the_brute_force_loop(model, settings):
    answers = decoded(model, settings, max_active=3)
    for answer, request in zip(answers, requests(), strict=True):
        expected = oracle(model, request, settings, 5)
        for name, value in expected.items():
            found = getattr(answer, name)
            assert (sorted(found) if name == "edits" else found) == value, f"{name} of {answer.id}"
    assert sum(len(answer.edits) for answer in answers) > 5


@pytest.mark.parametrize("settings", CASES, ids=NAMES)
def test_lanes_order_and_fusion_change_nothing(model, settings):
    one = decoded(model, settings, max_active=1)
    for options in ({"max_active": 8}, {"max_active": 3, "fused_commit": False}):
        for a, b in zip(one, decoded(model, settings, **options), strict=True):
            fields = ("response_ids", "unmask_step", "edits", "steps")
            assert all(getattr(a, name) == getattr(b, name) for name in fields)


def test_at_threshold_1_nothing_changes(model):
    plain = decoded(model, DecodeSettings(temperature=1.0, max_token=18))
    off = decoded(model, DecodeSettings(temperature=1.0, max_token=18, edit_threshold=1.0))
    for a, b in zip(plain, off, strict=True):
        assert vars(replace(a, seconds=0.0)) == vars(replace(b, seconds=0.0)) and not a.edits


def test_an_edit_that_never_happens_costs_the_forward_that_looks(model):
    """Above every probability of this model: the same tokens, and one more forward for each block."""
    never = replace(STATIC, edit_threshold=0.9999999, denoising_steps_per_block=1)
    plain = decoded(model, replace(never, edit_threshold=1.0, edit_steps=1))
    for a, b in zip(plain, decoded(model, never), strict=True):
        blocks = a.steps
        assert (a.response_ids, b.edits) == (b.response_ids, [])
        assert (b.steps, b.forwards) == (2 * blocks, a.forwards + blocks)


def test_the_record_replays_every_step(model, tmp_path):
    """The observer's view after each step is what the trajectory, written and read again, shows after that step."""
    seen: dict[tuple[str, int], list[int]] = {}
    decoder = engine(model)
    settings = replace(STATIC, denoising_steps_per_block=2, temperature=1.5)
    answers = list(
        decoder.generate(requests(), settings, 5, on_step=lambda s: seen.update({(s.id, s.step): s.response_ids}))
    )
    with ShardWriter(tmp_path / "shards", 0) as writer:
        for answer in answers:
            writer.write(answer)
    read = {t.id: t for t in read_shards(tmp_path / "shards")}
    for (name, step), shown in seen.items():
        after = shown_after(read[name], step)
        assert [MASK if token is None else token for token in after[: len(shown)]] == shown
        assert not any(token is not None for token in after[len(shown) :])
    assert any(t.edits for t in read.values())


@pytest.mark.parametrize("shift", [False, True], ids=["own", "shift"])
def test_training_equals_decoding_where_shown_tokens_are_wrong(model, monkeypatch, shift):
    """At every step that reads shown tokens again: the states of the records, given to the training forward, have the
    logits on which the editor decided."""
    model.config.logit_shift = shift
    seen, runs = [], []
    look, denoise = Editor.look, Run._denoise

    def watching_denoise(run, *args):
        runs.append(run)
        return denoise(run, *args)

    def watching_look(editor, hidden, weight, at, shape):
        lanes, logits = editor.runner.lanes, hidden @ weight.T
        for lane, column, row in zip(*(x.tolist() for x in at), logits, strict=True):
            place = int(lanes.start[lane]) + column
            seen.append((runs[-1].requests[lane].id, int(lanes.steps[lane]), place, row))
        return look(editor, hidden, weight, at, shape)

    monkeypatch.setattr(Run, "_denoise", watching_denoise)
    monkeypatch.setattr(Editor, "look", watching_look)
    settings = replace(STATIC, denoising_steps_per_block=2, temperature=1.5)
    answers = {answer.id: answer for answer in decoded(model, settings, max_active=3)}
    states = {(name, step): edited_state(answers[name], step) for name, step, *_ in seen}
    trained = dict(zip(states, training_logits(model, list(states.values()), [len(states)]), strict=True))
    wrong = 0
    for name, step, place, logits in seen:
        state = states[name, step]
        at = place - state.start
        wrong += int(state.noisy[at]) not in (MASK, int(state.ids[place]))
        torch.testing.assert_close(trained[name, step][at], logits, rtol=0, atol=1e-5)
    assert wrong > 20


def edited_state(answer: Trajectory, step: int) -> State:
    """The state after a step: the tokens that the record shows then, right or wrong, and masks."""
    [state] = draw_states([vars(answer)], answer.block_size, random_ratio=0.0)
    shown = shown_after(answer, step)
    now = [*answer.prompt_ids, *(MASK if token is None else token for token in shown)]
    return replace(state, noisy=torch.tensor(now[state.start :]))


def test_records_that_cannot_be():
    good = Trajectory("x/0/0", [], [2, 3], [1, 2], 2, 2, "stop", edits=[[1, 1, 5]], decode={"edit_threshold": 0.5})
    assert shown_after(good, 1) == [2, 5] and shown_after(good, 2) == [2, 3] and shown_after(good, 0) == [None, None]
    for edits in ([[2, 1, 5]], [[1, 2, 5]], [[0, 0, 5]]):
        with pytest.raises(ValueError, match="edit"):
            replace(good, edits=edits)
    with pytest.raises(ValueError, match="mask"):
        good.validate(mask_id=5)
    assert replace(good, steps=3).steps == 3
    with pytest.raises(ValueError, match="steps"):
        replace(good, steps=3, edits=[], decode={})


@pytest.mark.parametrize(
    "line, key",
    [
        (["rollout.edit_steps=2"], "rollout.edit_steps"),
        (["rollout.edit_threshold=0.5", "rollout.self_verify=true"], "rollout.edit_threshold"),
        (["rollout.edit_threshold=0.5", "rollout.energy_candidates=4"], "rollout.edit_threshold"),
        (["rollout.edit_threshold=0.5", "rollout.random_init_ratio=0.5"], "rollout.edit_threshold"),
        (["rollout.edit_threshold=0.5", "rollout.engine=sglang"], "rollout.edit_threshold"),
    ],
)
def test_settings_that_do_not_go_together(line, key):
    with raises_key(key):
        load(SampleConfig, line)

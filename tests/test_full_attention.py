"""Full attention: whole sequences of fixed length, block after block; training sees what the decoder saw."""

import pytest
import torch

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.special_ids import SpecialIds
from t3d.common.options import load
from t3d.decode import local
from t3d.objectives.base import Context, find
from t3d.states.base import collate
from t3d.states.trajectory import TrajectoryNoise
from t3d.states.whole import WholeSequence
from t3d.training.loop import noise_for
from t3d.training.settings import TrainConfig
from tests.conftest import MASK, PAD, STOP, raises_key, tiny_model
from tests.test_training_equals_decoding import CLOSE, ORDINARY, requests

MAX = 17
IDS = SpecialIds(MASK, PAD, (STOP, PAD), (MASK,), ORDINARY)


def whole_model(shift: bool):
    model = tiny_model()
    model.config.full_attention, model.config.logit_shift = True, shift
    return model


def engine(model, **options) -> local.LocalEngine:
    return local.LocalEngine(model, mask_id=MASK, stop_ids=[STOP, PAD], forbidden_ids=[], **options)


def settings_of(**options) -> DecodeSettings:
    return DecodeSettings(**{"temperature": 3.0, "max_token": MAX, **options})


@torch.no_grad()
def logits_of(model, sequence: torch.Tensor) -> torch.Tensor:
    """(length, vocab) what predicts each position, by a forward over one whole sequence."""
    logits = model(sequence[None]).logits[0]
    return logits.roll(1, 0) if model.config.logit_shift else logits


@pytest.mark.parametrize("shift", [False, True], ids=["own", "shift"])
@pytest.mark.parametrize("steps, block", [(2, 4), (3, 8)])
def test_training_sees_what_the_decoder_saw_and_both_equal_a_plain_forward(steps_seen, shift, steps, block):
    """Every step of a watched run: its logits are those of a forward over [decided | x_t | masks to the fixed length],
    and every training state is such a moment, with the same logits, packed beside others."""
    model = whole_model(shift)
    settings = settings_of(block_size=block, denoising_steps_per_block=steps)
    answers = list(engine(model, max_active=4).generate(requests(), settings, seed=2))
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert all(answer.forwards == answer.steps for answer in answers)  # no prefill, no commit
    watched = {(seen.request.id, tuple(seen.position.tolist())): seen.logits for seen in steps_seen}
    for seen in steps_seen:
        whole = seen.shown[: -(-(len(seen.request.prompt_ids) + MAX) // block) * block]
        plain = logits_of(model, whole)[seen.position].index_fill(-1, torch.tensor([MASK]), -torch.inf)
        torch.testing.assert_close(seen.logits, plain, **CLOSE)

    samples = [vars(answer) | {"max_token": answer.decode["max_token"]} for answer in answers]
    looked_up = set()
    for ratio in (1.0, 0.5):
        noise = TrajectoryNoise(block, MASK, ORDINARY, mask_ratios=(ratio,), random_ratio=0.0)
        whole = WholeSequence(noise, block, MASK, max_token=1)
        for seed in range(3):
            states = [whole(sample, torch.Generator().manual_seed(seed + i)) for i, sample in enumerate(samples)]
            batch = collate([states[:5], states[5:6], states[6:]], PAD, shift=shift)
            with torch.no_grad():
                logits = model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids).logits
            found = logits.flatten(0, 1)[batch.loss_index].split([len(state.position) for state in states])
            for sample, state, of_state in zip(samples, states, found, strict=True):
                here = state.position[0] // block * block + torch.arange(block)
                masked = here[state.noisy[here] == MASK]
                key = sample["id"], tuple(masked.tolist())
                looked_up.add(key)
                seen = dict(zip(masked.tolist(), watched[key], strict=True))
                for position, row in zip(state.position.tolist(), of_state, strict=True):
                    torch.testing.assert_close(row[:MASK], seen[position][:MASK], **CLOSE)
                assert (state.noisy[here[-1] + 1 :] == MASK).all()
    assert len(looked_up) > 0.3 * len(watched)


def test_answers_do_not_depend_on_what_else_is_decoded():
    model, settings = whole_model(True), settings_of()
    alone, together = (
        {a.id: (a.response_ids, a.unmask_step) for a in engine(model, max_active=n).generate(requests(), settings, 5)}
        for n in (1, 4)
    )
    assert alone == together


def test_a_block_is_drawn_and_weights_make_up_for_the_others():
    noise = TrajectoryNoise(4, MASK, ORDINARY, random_ratio=0.0)
    sample = {"id": "a/0", "prompt_ids": [1, 2], "response_ids": list(range(3, 17)), "unmask_step": [*range(1, 15)]}
    sample |= {"length": 14, "max_token": 20}
    whole, chosen = WholeSequence(noise, 4, MASK, max_token=99), set()
    for seed in range(40):
        state = whole(sample, torch.Generator().manual_seed(seed))
        assert len(state.noisy) == len(state.ids) == 24 and state.clean_length == 0
        assert set(state.weight.tolist()) == {4.0}
        assert len(set((state.position // 4).tolist())) == 1
        chosen.add(int(state.position[0]) // 4)
    assert chosen == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["sft", "naive_td", "t3d", "dparallel", "block_likelihood"])
@pytest.mark.parametrize("shift", [False, True], ids=["own", "shift"])
def test_objectives_run_on_it_and_their_losses_fall(name, shift):
    model = whole_model(shift)
    answers = list(engine(model, max_active=8).generate(requests(), settings_of(), seed=2))
    samples = [vars(answer) | {"max_token": answer.decode["max_token"]} for answer in answers]
    config = load(TrainConfig, [f"training.objective={name}", "training.block_size=4"])
    objective = find(name).build(find(name).Settings(), Context(4, IDS, random_ratio=0.0))
    noise = noise_for(config, objective, IDS, model.config)
    states = [noise(sample, torch.Generator().manual_seed(i)) for i, sample in enumerate(samples)]
    states = [state for state in states if state.masked.any()]
    optimizer, losses, frozen = torch.optim.SGD(model.parameters(), lr=0.01), [], whole_model(shift)
    for _ in range(3):
        loss = objective(model, frozen, collate([states[:3], states[3:]], PAD, shift=shift)).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "line, key",
    [
        (["training.objective=redi"], "training.objective"),
        (["training.objective=opdlm"], "training.objective"),
        (["training.objective=consistency"], "training.objective"),
        (["training.objective=trajectory_aware"], "training.objective"),
        (["training.path_states=own"], "training.path_states"),
    ],
)
def test_what_needs_the_block_causal_layout_says_so(line, key):
    config = load(TrainConfig, [*line, "training.block_size=4"])
    chosen = find(config.training.objective)
    settings = chosen.Settings(**{"path_states": "own"} if "own" in str(line) else {})
    with raises_key(key):
        noise_for(config, chosen.build(settings, Context(4, IDS)), IDS, whole_model(False).config)


@pytest.mark.parametrize("option", [{"self_verify": True}, {"energy_candidates": 2}, {"random_init_ratio": 0.5}])
def test_decoding_that_needs_the_block_causal_layout_says_so(option):
    model = whole_model(False)
    (name,) = option
    with raises_key(f"rollout.{name}"):
        list(engine(model, ordinary_ids=ORDINARY).generate(requests(), settings_of(**option), seed=0))


def test_generate_works_by_whole_sequences():
    model = whole_model(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [STOP, PAD], PAD
    prompt = torch.tensor([[5, 9, 40]])
    found = model.generate(prompt, max_new_tokens=MAX, do_sample=False, denoising_steps_per_block=4)[0]
    request = [local.Request("0", 0, (5, 9, 40))]
    (answer,) = engine(model).generate(request, settings_of(temperature=0.0), seed=0)
    assert found[3:].tolist() == answer.response_ids[: answer.length]

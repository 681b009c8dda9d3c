"""A teacher's completion of every block of an answer against the decoder itself, block by block."""

import pytest
import torch

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.special_ids import SpecialIds
from t3d.blocks.strategy import names
from t3d.data.trajectory import Trajectory, grows_over_blocks
from t3d.decode import completion
from t3d.decode.completion import complete
from t3d.decode.protocol import Request
from tests.conftest import MASK, PAD, STOP, tiny_model
from tests.test_training_equals_decoding import engine, requests

IDS = SpecialIds(MASK, PAD, (STOP, PAD), (MASK,), torch.arange(60))


def answers(model, settings: DecodeSettings) -> list[Trajectory]:
    """Answers to prompts of 1 to 13 tokens; some stop, some are cut."""
    found = list(engine(model, max_active=5).generate(requests(), settings, seed=2))
    assert {answer.finish_reason for answer in found} == {"stop", "length"}
    return found


def completed(model, trajectories, settings) -> dict[str, completion.Completion]:
    found = complete(model, trajectories, settings, 2, IDS, device=torch.device("cpu"), chunk=5)
    return {answer.id: done for answer, done in found}


@pytest.mark.parametrize("block_size", [4, 8])
@pytest.mark.parametrize("temperature", [0.0, 3.0], ids=["greedy", "sampled"])
def test_an_author_asked_for_its_blocks_writes_them_again(model, block_size, temperature):
    settings = DecodeSettings(block_size, block_size, temperature=temperature, max_token=17, top_k=40, top_p=0.95)
    found = list(engine(model).generate(requests(), settings, seed=2))
    again = completed(model, found, settings)
    assert len(again) == len(found) == 13
    for answer in found:
        assert again[answer.id] == (answer.response_ids, answer.unmask_step)


@pytest.mark.parametrize("strategy", names())
def test_every_strategy_completes_blocks(model, strategy):
    """The numbers of its steps may be others than the answer's; the greedy tokens are the same."""
    settings = DecodeSettings(remasking_strategy=strategy, eb_threshold=3.0, temperature=0.0, max_token=17)
    found = list(engine(model).generate(requests(), settings, seed=2))
    again = completed(model, found, settings)
    for answer in found:
        ids, step = again[answer.id]
        assert MASK not in ids and grows_over_blocks(step, len(answer.prompt_ids), 4)
        assert ids == answer.response_ids or strategy == "ancestral"  # its lots are drawn by the step's number


@pytest.mark.parametrize("block_size", [4, 8])
def test_every_block_is_what_the_decoder_writes_after_the_students_earlier_blocks(block_size):
    """The student's answers are few-step ones, of another model than the teacher."""
    student, teacher = tiny_model(0), tiny_model(1)
    found = answers(student, DecodeSettings(block_size, 2, temperature=3.0, max_token=17))
    greedy = DecodeSettings(block_size, block_size, temperature=0.0, max_token=block_size)
    targets = completed(teacher, found, greedy)
    differing = 0
    for answer in found:
        target, prompt, at = targets[answer.id], len(answer.prompt_ids), 0
        sequence = answer.prompt_ids + answer.response_ids
        assert len(target.ids) == len(target.unmask_step) == len(answer.response_ids)
        while at < len(answer.response_ids):
            end = (prompt + at) // block_size * block_size + block_size - prompt
            request = Request("p/0", 0, tuple(sequence[: prompt + at]))
            (alone,) = engine(teacher).generate([request], greedy, seed=0)
            assert target.ids[at:end] == alone.response_ids[: end - at]
            steps = target.unmask_step[at:end]
            assert [step - at for step in steps] == alone.unmask_step[: end - at]
            differing += target.ids[at:end] != answer.response_ids[at:end]
            at = end
    assert differing > 20


def test_what_goes_into_a_forward_together_changes_nothing(model, monkeypatch):
    settings = DecodeSettings(temperature=3.0, max_token=17)
    found = answers(model, settings)
    together = completed(tiny_model(1), found, settings)
    monkeypatch.setattr(completion, "TOKENS_PREFILLED", 60)
    assert completed(tiny_model(1), found[::-1], settings) == together


def test_no_target_is_a_forbidden_token(model):
    settings = DecodeSettings(temperature=50.0, max_token=17)
    found = answers(model, settings)
    targets = completed(tiny_model(1), found, settings)
    drawn = {token for target in targets.values() for token in target.ids}
    assert MASK not in drawn and len(drawn) > 40

"""A student's states with a teacher's targets: what an objective makes of them."""

import pytest
import torch

from t3d.objectives.block_likelihood import BlockLikelihood
from t3d.objectives.dparallel import DParallel
from t3d.objectives.naive_td import NaiveTD
from t3d.objectives.t3d import T3D, T3DSettings
from t3d.states.base import collate
from t3d.states.unordered import RandomMaskNoise
from tests.conftest import MASK, PAD, STOP, tiny_model
from tests.objectives.test_t3d import mean
from tests.states.test_states import noise, trajectory
from tests.test_training_equals_decoding import plain_logits

POST = 1
END = {"stop_ids": (STOP,), "post_num": POST}
ALONG = {"random_ratio": 0.2, "mask_ratio_exponent": 0.0, **END}
OBJECTIVES = {
    "t3d": T3D(noise(4, **ALONG), torch.tensor([MASK])),
    "t3d, levels": T3D(
        noise(4, every_target=True, **ALONG), torch.tensor([MASK]), T3DSettings(path_loss="levels", path_k_steps=2)
    ),
    "t3d, own states": T3D(noise(4, own_states=True, **ALONG), torch.tensor([MASK]), T3DSettings(path_states="own")),
    "naive_td": NaiveTD(noise(4, **ALONG)),
    "block_likelihood": BlockLikelihood(noise(4, **ALONG)),
    "dparallel": DParallel(RandomMaskNoise(4, MASK, **END)),
}


def with_targets(prompt: int, length: int) -> dict:
    """A student's answer, and a teacher's blocks, some of which end."""
    sample, other = trajectory(prompt, length, seed=1), trajectory(prompt, length, seed=2)
    targets = [STOP if i % 6 == 1 else token for i, token in enumerate(other["response_ids"])]
    return sample | {"target_ids": targets, "target_step": other["unmask_step"]}


def draw(objective, samples: list[dict]) -> list:
    return [objective.noise(sample, torch.Generator().manual_seed(i)) for i, sample in enumerate(samples)]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_an_answer_of_one_block_is_the_teachers_whatever_the_student_wrote(objective):
    """Nothing sees the clean copy of the last block: with the teacher's own trajectory every term is the same."""
    samples = [with_targets(prompt, length) for prompt, length in [(4, 4), (5, 3), (6, 2), (7, 1), (9, 3)]]
    own = []
    for sample in samples:
        targets = sample["target_ids"]
        end = targets.index(STOP) + 1 if STOP in targets else len(targets) + POST
        own.append({**sample, "response_ids": targets, "unmask_step": sample["target_step"], "length": end})
        del own[-1]["target_ids"], own[-1]["target_step"]
    student, reference = tiny_model(0), tiny_model(1)
    mine, theirs = (objective(student, reference, collate([draw(objective, s)], PAD)) for s in (samples, own))
    assert torch.equal(mine.loss, theirs.loss) and mine.loss.std() > 0
    assert mine.metrics.keys() == theirs.metrics.keys()
    assert all(torch.equal(value, theirs.metrics[name]) for name, value in mine.metrics.items())


def test_cross_entropy_equals_the_slow_loop():
    """[the student's earlier blocks | the teacher's block with masks] -> the teacher's tokens, a forward a block."""
    student, objective = tiny_model(), OBJECTIVES["naive_td"]
    samples = [with_targets(*lengths) for lengths in [(1, 3), (3, 9), (5, 2), (6, 17)]]
    states = draw(objective, samples)
    loss = objective(student, None, collate([states[:1], states[1:3], states[3:]], PAD)).loss
    slow = []
    for sample, state in zip(samples, states, strict=True):
        prompt = len(sample["prompt_ids"])
        assert state.ids.tolist() == sample["prompt_ids"] + sample["response_ids"]
        log_probs = plain_logits(student, state, 4).log_softmax(-1)
        found = []
        for i, target in enumerate(sample["target_ids"]):
            p = prompt + i
            of_block = sample["target_ids"][max(0, p // 4 * 4 - prompt) : i]
            ended = of_block.index(STOP) if STOP in of_block else len(of_block)
            hidden = int(state.noisy[p - state.start]) != target
            if hidden and len(of_block) - ended <= POST:
                found.append(log_probs[p - state.start, target])
        slow.append(-mean(found))
    torch.testing.assert_close(loss, torch.stack(slow), rtol=1e-4, atol=1e-5)

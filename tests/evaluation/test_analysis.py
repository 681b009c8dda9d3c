"""The estimators against enumeration of small distributions, and the measures against plain forwards."""

import functools
import itertools
import json
import math
import shutil

import pytest
import torch

from t3d.common.options import load
from t3d.evaluation.analysis import (
    analyse,
    entropy,
    kl,
    measure,
    measure_checkpoint,
    predictor,
    step_correlation,
    whole_blocks,
)
from t3d.evaluation.settings import AnalysisConfig
from t3d.states.trajectory import TrajectoryNoise
from tests.conftest import MASK, PAD, raises_key, tiny_model
from tests.states.test_states import trajectory
from tests.test_training_equals_decoding import plain_logits

LETTERS, TOKENS = 3, 4
HIDDEN = LETTERS  # the mask of the tabulated model
SAMPLES = [trajectory(*lengths) for lengths in [(1, 3), (3, 9), (5, 13), (6, 17)]]


def random_joint(seed: int = 0) -> torch.Tensor:
    """(3, 3, 3, 3) probabilities of a sequence of four."""
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn((LETTERS,) * TOKENS, generator=generator)).flatten().softmax(0).view((LETTERS,) * TOKENS)


def tabulated(joint: torch.Tensor):
    """The exact conditionals of a joint distribution, as a model: p(x_i | whatever of the row is visible)."""

    @functools.cache
    def conditional(row: tuple, i: int) -> torch.Tensor:
        masses = torch.zeros(LETTERS)
        for x in itertools.product(range(LETTERS), repeat=TOKENS):
            if all(shown in (HIDDEN, letter) for shown, letter in zip(row, x, strict=True)):
                masses[x[i]] += joint[x]
        return (masses / masses.sum()).log()

    def predict(ids: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        pairs = zip(ids.tolist(), place.tolist(), strict=True)
        return torch.stack([torch.stack([conditional(tuple(row), p % TOKENS) for p in where]) for row, where in pairs])

    return predict


def enumerated(joint: torch.Tensor, shown: dict[int, int], chosen: list[int]) -> float:
    """Conditional total correlation: sum over x_S of p(x_S | shown) log [p(x_S | shown) / prod_i p(x_i | shown)]."""
    p_s: dict[tuple, float] = {}
    for x in itertools.product(range(LETTERS), repeat=TOKENS):
        if all(x[i] == letter for i, letter in shown.items()):
            key = tuple(x[i] for i in chosen)
            p_s[key] = p_s.get(key, 0.0) + float(joint[x])
    total = sum(p_s.values())
    p_s = {key: p / total for key, p in p_s.items()}
    single = [{a: sum(p for key, p in p_s.items() if key[k] == a) for a in range(LETTERS)} for k in range(len(chosen))]
    return sum(p * math.log(p / math.prod(single[k][a] for k, a in enumerate(key))) for key, p in p_s.items())


@pytest.mark.parametrize(
    "shown, chosen",
    [({}, [0, 1, 2, 3]), ({}, [2, 0]), ({1: 2}, [3, 0, 2]), ({0: 1, 3: 0}, [1, 2]), ({2: 1}, [3])],
    ids=str,
)
def test_the_estimator_equals_enumeration(shown, chosen):
    joint, draws = random_joint(), 3000
    state = torch.full((draws, TOKENS), HIDDEN)
    for i, letter in shown.items():
        state[:, i] = letter
    place = torch.arange(draws).unsqueeze(1) * TOKENS + torch.tensor(chosen)
    u = torch.rand(place.shape, generator=torch.Generator().manual_seed(1))
    values = step_correlation(tabulated(joint), state, place, u)
    assert (values >= -1e-6).all() and (state[:, chosen] == HIDDEN).all()  # the state is left as it was
    error = float(values.std()) / draws**0.5
    assert float(values.mean()) == pytest.approx(enumerated(joint, shown, chosen), abs=4 * error + 1e-6)
    if len(chosen) > 1:
        assert error < 0.1 * float(values.mean())


def test_independent_tokens_lose_nothing_and_copies_lose_all_but_one():
    u = torch.rand(5, TOKENS, generator=torch.Generator().manual_seed(0))
    state, place = torch.full((5, TOKENS), HIDDEN), torch.arange(5 * TOKENS).view(5, TOKENS)
    single = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]])
    independent = torch.einsum("a,b,c,d->abcd", *single)
    assert step_correlation(tabulated(independent), state, place, u).abs().max() < 1e-6
    copies = torch.zeros((LETTERS,) * TOKENS)
    for letter in range(LETTERS):
        copies[(letter,) * TOKENS] = 1 / LETTERS
    torch.testing.assert_close(
        step_correlation(tabulated(copies), state, place, u), torch.full((5,), 3 * math.log(LETTERS))
    )


def test_divergence_and_entropy_by_hand():
    """KL((1/2, 1/2, 0) || (3/4, 1/4, 0)) = log 2 - log(3) / 2; an id that cannot be drawn adds nothing."""
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.75, 0.25, 0.0]).log()
    assert float(kl(p, q)) == pytest.approx(math.log(2) - math.log(3) / 2)
    assert float(entropy(p)) == pytest.approx(math.log(2))
    assert math.isnan(kl(torch.tensor([math.nan, 0.0]), q[:2]))  # a broken model is not called independent


# ---------------------------------------------------------------------------------------------------------------------
# On a model


def test_a_networks_correlation_equals_enumeration():
    """p(x_1) p(x_2 | x_1) against p(x_1) p(x_2) over all 64 x 64 pairs, though the network is not consistent."""
    model, sample = tiny_model(), SAMPLES[2]
    blocks = whole_blocks([sample], 4, MASK, PAD)
    forbidden = torch.tensor([MASK, 0])
    predict, place = predictor(model, blocks.batch, forbidden), blocks.place[:, :2]
    with torch.inference_mode():
        draws = 256
        u = ((torch.arange(draws) + 0.5) / draws)[:, None, None].expand(draws, *place.shape)
        got = torch.stack([step_correlation(predict, blocks.ids, place, row) for row in u]).mean(0)
        marginal, expected = predict(blocks.ids, place), torch.zeros(len(place))
        for first in range(1, 63):
            ids = blocks.ids.clone()
            ids.view(-1)[place[:, 0]] = first
            after = predict(ids, place[:, 1:])[:, 0]
            weight = marginal[:, 0, first].exp()
            ratio = after - marginal[:, 1]
            ratio[:, forbidden] = 0
            expected += weight * (after.exp() * ratio).sum(-1)
    assert float(expected.min()) > 0.01
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0)


def slow_blocks(sample: dict, size: int) -> list[int]:
    prompt = len(sample["prompt_ids"])
    return [b for b in range((prompt + sample["length"]) // size) if b * size >= prompt]


def test_cross_entropy_and_entropy_equal_plain_forwards():
    """Block by block, after each number of visible tokens, by a forward over [earlier blocks | x_t of the block]."""
    model, size, forbidden = tiny_model(), 4, torch.tensor([MASK, 1])
    groups = [whole_blocks(SAMPLES[:2], size, MASK, PAD), whole_blocks(SAMPLES[2:], size, MASK, PAD)]
    found = measure(model, forbidden, groups, [2, 4], draws=2, seed=0)
    assert found["blocks"] == sum(len(slow_blocks(sample, size)) for sample in SAMPLES)
    noise = TrajectoryNoise(size, MASK, torch.zeros(1, dtype=torch.long), mask_ratios=(1.0,), random_ratio=0.0)
    for visible, row in enumerate(found["states"]):
        risks, entropies = [], []
        for sample in SAMPLES:
            state, prompt = noise(sample, torch.Generator()), len(sample["prompt_ids"])
            hidden = {}
            for block in slow_blocks(sample, size):
                step = {p: sample["unmask_step"][p - prompt] for p in range(block * size, (block + 1) * size)}
                order = sorted(step, key=lambda p: (step[p], p))
                hidden[block] = order[visible:]
                for p in order[:visible]:
                    state.noisy[p - state.start] = state.ids[p]
            logits = plain_logits(model, state, size).detach()
            logits[:, forbidden] = -torch.inf
            p = logits.log_softmax(-1)
            rows = [[q - state.start for q in block] for block in hidden.values()]
            truth = [[state.ids[q] for q in block] for block in hidden.values()]
            if rows:
                entropies.append(torch.stack([entropy(p[r]).mean() for r in rows]).mean())
                risks.append(torch.stack([-p[r, x].mean() for r, x in zip(rows, truth, strict=True)]).mean())
        assert row["visible"] == visible
        assert row["cross_entropy"] == pytest.approx(float(torch.stack(risks).mean()), rel=1e-4)
        assert row["entropy"] == pytest.approx(float(torch.stack(entropies).mean()), rel=1e-4)
        assert row["cross_entropy_error"] == pytest.approx(
            float(torch.stack(risks).std()) / len(risks) ** 0.5, rel=1e-3
        )
    assert [(row["tokens_per_step"], row["visible"]) for row in found["steps"]] == [(2, 0), (2, 2), (4, 0)]
    at_2 = sum(row["correlation"] for row in found["steps"][:2])
    assert found["per_block"][0]["correlation"] == pytest.approx(at_2)
    assert 0 < at_2 < found["per_block"][1]["correlation"]  # four at once lose more than two and two


def chain_by_enumeration(predict, ids, place, letters) -> list[tuple[float, tuple]]:
    """(probability, letters) of every filling of ``place``, (n,), by one-by-one decoding."""
    every = [(1.0, ())]
    for k in range(len(place)):
        longer = []
        for mass, x in every:
            state = ids.clone()
            state.view(-1)[place[:k]] = torch.tensor(x, dtype=ids.dtype)
            p = predict(state, place[None, k : k + 1])[0, 0].exp()
            longer += [(mass * float(p[letter]), (*x, letter)) for letter in letters]
        every = longer
    return every


def lost(predict, ids, place, letters, marginal) -> float:
    """KL of a product of marginals (n, vocab) from the chain, over all fillings."""
    chain = chain_by_enumeration(predict, ids, place, letters)
    assert sum(mass for mass, _ in chain) == pytest.approx(1, abs=1e-4)
    return sum(m * (math.log(m) - sum(float(marginal[k, a]) for k, a in enumerate(x))) for m, x in chain)


def test_pair_and_risk_equal_enumeration():
    """TC(x_0 | x_t) + TC(x_t | x_T) at every t, and KL(p_phi(x_0 | x_t) || prod p_theta), over all fillings of a block
    of three tokens with four letters; phi and theta are two networks.
    """
    student, teacher, size = tiny_model(), tiny_model(seed=5), 3
    letters = [2, 3, 5, 7]
    forbidden = torch.tensor([i for i in range(student.config.vocab_size) if i not in letters])
    sample = trajectory(3, 3, size=3)
    blocks = whole_blocks([sample], size, MASK, PAD)
    groups = [whole_blocks([sample | {"id": f"copy/{i}"} for i in range(1500)], size, MASK, PAD)]  # one draw each
    found = measure(student, forbidden, groups, [1, 3], draws=1, seed=0, teacher=teacher)
    assert found["blocks"] == 1500
    theta, phi = predictor(student, blocks.batch, forbidden), predictor(teacher, blocks.batch, forbidden)
    pairs = []
    with torch.inference_mode():
        for visible, row in enumerate(found["states"]):
            state, rest, shown = blocks.state(visible), blocks.place[0, visible:], blocks.place[0, :visible]
            p = theta(state, rest[None])[0]
            future = lost(theta, state, rest, letters, p)
            past = lost(theta, blocks.ids, shown, letters, theta(blocks.ids, shown[None])[0]) if visible else 0.0
            assert row["rest"] == pytest.approx(future, rel=0.1, abs=1e-4)
            assert row["shown"] == pytest.approx(past, rel=0.1, abs=1e-4)
            assert row["pair"] == pytest.approx(row["rest"] + row["shown"], rel=1e-4, abs=1e-6)
            assert row["risk"] == pytest.approx(lost(phi, state, rest, letters, p), rel=0.1)
            pairs.append(row["pair"])
    assert found["pair"] == pytest.approx(sum(pairs) / size, rel=1e-4) and found["pair"] > 0.01
    assert found["states"][0]["rest"] == pytest.approx(found["per_block"][1]["correlation"], rel=1e-4), "all at once"
    own = measure(student, forbidden, [blocks], [3], draws=2, seed=0)["states"]
    assert all(row["risk"] == row["rest"] for row in own), "the teacher's own risk is its correlation"


def command(story_teacher, story_trajectories, tmp_path, *more: str) -> AnalysisConfig:
    line = (f"teacher={story_teacher}", f"trajectories={story_trajectories}", f"output={tmp_path / 'found.json'}")
    return load(AnalysisConfig, [*line, "limit=6", "draws=1", *more])


def test_the_command_writes_figures_and_a_plot(story_teacher, story_trajectories, tmp_path, cache_aside, capsys):
    output = analyse(command(story_teacher, story_trajectories, tmp_path, f"student={story_teacher}"))
    found = json.loads(output.read_text())
    assert found["teacher"]["states"] == found["student"]["states"] and found["teacher"]["sequences"] > 1
    assert found["teacher"]["per_block"] == found["student"]["per_block"]  # the same draws
    assert output.with_suffix(".svg").read_text().count("<svg") == 1
    printed = capsys.readouterr().out
    assert "teacher  correlation at 4 tokens per step: " in printed and "student  TC(x_0|x_t) + TC(x_t|x_T) " in printed
    batches = analyse(command(story_teacher, story_trajectories, tmp_path, "batch_size=1"))
    alone = json.loads(batches.read_text())["teacher"]
    for table in ("states", "steps", "per_block"):
        for a, b in zip(alone[table], found["teacher"][table], strict=True):
            assert a == pytest.approx(b, rel=1e-3)


def test_one_sequence_has_no_error(story_teacher, story_trajectories, tmp_path, cache_aside, capsys):
    output = analyse(command(story_teacher, story_trajectories, tmp_path, "limit=1"))
    found = json.loads(output.read_text(), parse_constant=pytest.fail)["teacher"]
    assert found["sequences"] == 1 and {row["correlation_error"] for row in found["per_block"]} == {None}
    assert "+-" not in capsys.readouterr().out and "<svg" in output.with_suffix(".svg").read_text()


def test_another_block_than_the_models_is_told(story_teacher, story_trajectories, tmp_path, cache_aside, caplog):
    config = command(story_teacher, story_trajectories, tmp_path, "limit=1")
    measure_checkpoint(config, "student", str(story_teacher), config.trajectories)
    assert not caplog.text
    folder = shutil.copytree(story_teacher, tmp_path / "eight")
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"block_size": 8})
    )
    measure_checkpoint(config, "student", str(folder), config.trajectories)
    assert "eight decodes blocks of 8; it is measured on the trajectories' blocks of 4" in caplog.text


def test_faults_are_one_line(story_teacher, story_trajectories, tmp_path, cache_aside):
    with raises_key("tokens_per_step", "=8", "blocks of 4"):
        analyse(command(story_teacher, story_trajectories, tmp_path, "tokens_per_step=[8]"))
    with raises_key("tokens_per_step", "[2, 4, 2]"):
        load(AnalysisConfig, ["tokens_per_step=[2,4,2]"])
    with raises_key("student_trajectories", "set student"):
        load(AnalysisConfig, ["student_trajectories=x"])
    with raises_key("trajectories", story_trajectories):
        analyse(command(story_teacher, story_trajectories, tmp_path, "max_gen_length=4", "limit=1"))

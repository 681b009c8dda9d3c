"""Reinforcement learning on trajectories: by hand, against a slow loop, and the decoder's own probabilities."""

import math
from dataclasses import replace

import pytest
import torch

from t3d.blocks.settings import DecodeSettings
from t3d.common.options import load
from t3d.objectives.likelihood import policy_log_probs
from t3d.objectives.trace_rl import TraceRL, TraceRLSettings, clipped_surrogate, k3
from t3d.states.base import PER_TARGET, collate
from t3d.states.trace import TraceStates
from t3d.training.settings import TrainConfig
from tests.conftest import MASK, PAD, raises_key, tiny_model
from tests.objectives.test_t3d import POST, SAMPLES, assert_same_gradients, mean
from tests.states.test_states import replay
from tests.test_training_equals_decoding import engine, plain_logits, requests

FORBIDDEN = torch.tensor([MASK, 7])
BLOCK, T, EPSILON = 4, 0.7, 0.2
ROUNDS = ("training.refresh_rollouts=2", "training.refresh_at_start=true", "training.refresh_temperature=1")


def objective(shrink: int = 1, one: bool = False, chunk: int = 5, **settings) -> TraceRL:
    states = TraceStates(BLOCK, MASK, shrink, one, POST)
    return TraceRL(states, FORBIDDEN, TraceRLSettings(**settings), T, chunk)


def recorded(samples: list[dict] = SAMPLES, shrink: int = 1) -> list[dict]:
    """The samples with log-probabilities of slightly other weights than the student's, and advantages of both signs."""
    rl, old, found = objective(shrink), nearby(2), []
    for i, sample in enumerate(samples):
        state = rl.whole(sample)
        log_prob = torch.empty(len(state.position))
        with torch.no_grad():
            log_prob[state.position - len(sample["prompt_ids"])] = rl.policy(old, collate([[state]], PAD))[0]
        found.append(sample | {"old_log_prob": log_prob.tolist(), "advantage": [1.5, -0.5, -1.0, 0.25][i % 4]})
    return found


def nearby(seed: int):
    """The student with noise on its weights."""
    model, generator = tiny_model(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.005 * torch.randn(parameter.shape, generator=generator)
    return model


def draw(rl: TraceRL, samples: list[dict]) -> list:
    return [rl.noise(sample, torch.Generator().manual_seed(i)) for i, sample in enumerate(samples)]


def collated(states: list):
    return collate([states[:1], states[1:3], states[3:]], PAD)


# ---------------------------------------------------------------------------------------------------------------------
# The pieces, by hand


def test_the_clipped_ratio_by_hand():
    """eps .2. Up: 1.1 counts as it is, 1.5 as 1.2 without gradient. Down: .9 as it is, .5 as .8; 1.5 has no limit."""
    ratio = torch.tensor([1.1, 1.5, 0.5, 0.9, 0.5, 1.5])
    advantage = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, -1.0])
    log_ratio = ratio.log().requires_grad_()
    loss, clipped = clipped_surrogate(log_ratio, advantage, EPSILON)
    assert loss.tolist() == pytest.approx([-2.2, -2.4, -1.0, 0.9, 0.8, 1.5])
    assert clipped.tolist() == [False, True, False, False, True, False]
    loss.sum().backward()
    assert log_ratio.grad.tolist() == pytest.approx([-2.2, 0.0, -1.0, 0.9, 0.0, 1.5])


def test_actions_that_became_far_likelier_do_not_overflow():
    """e^95 has no fp32. The clip holds for a rewarded action; the others have finite losses and gradients."""
    log_ratio = torch.tensor([95.0, 95.0, 95.0, -95.0], requires_grad=True)
    loss, clipped = clipped_surrogate(log_ratio, torch.tensor([1.0, -1.0, 0.0, 1.0]), EPSILON)
    (loss.sum() + k3(torch.zeros(1), log_ratio[:1]).sum()).backward()
    found = loss.detach()
    assert found[0] == pytest.approx(-1.2) and bool(clipped[0]) and found[1] > 1e8 and found[2] == 0
    assert found.isfinite().all() and log_ratio.grad.tolist() == [0.0] * 4


def test_k3_by_hand():
    """d = log 2: 2 - 1 - log 2. Its gradient is pi_theta / pi_ref's: 1 - e^d; nothing where both agree."""
    log_prob = torch.tensor([-1.0 - math.log(2), -1.0], requires_grad=True)
    value = k3(log_prob, torch.tensor([-1.0, -1.0]))
    assert value.tolist() == pytest.approx([1 - math.log(2), 0.0])
    value.sum().backward()
    assert log_prob.grad.tolist() == pytest.approx([-1.0, 0.0])


def test_the_policy_is_the_distribution_that_draws():
    """A tiny vocabulary by hand: temperature 2, one id forbidden."""
    hidden, weight = torch.eye(2), torch.tensor([[0.0, 2.0], [2.0, 0.0], [4.0, 9.0]])
    log_prob, entropy = policy_log_probs(hidden, weight, torch.tensor([1, 1]), 2.0, torch.tensor([2]), 1)
    p = math.e / (1 + math.e)
    assert log_prob.tolist() == pytest.approx([math.log(p), math.log(1 - p)])
    assert entropy.tolist() == pytest.approx([-(p * math.log(p) + (1 - p) * math.log(1 - p))] * 2)


@pytest.mark.parametrize("chunk", [3, 64])
def test_the_policys_gradients(chunk):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, requires_grad=True)
    targets, forbidden, pull = torch.arange(7), torch.tensor([8, 10]), torch.randn(7, generator=generator)
    log_prob, entropy = policy_log_probs(hidden, weight, targets, T, forbidden, chunk)
    keep = torch.ones(11).index_fill(0, forbidden, 0).log()
    whole = (hidden @ weight.T / T + keep).log_softmax(-1)
    expected = whole.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, torch.special.entr(whole.exp()).sum(-1), rtol=0, atol=1e-6)
    assert not entropy.requires_grad
    mine = torch.autograd.grad(log_prob @ pull, (hidden, weight))
    for a, b in zip(mine, torch.autograd.grad(expected @ pull, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# States


@pytest.mark.parametrize("shrink", [1, 2, 4])
@pytest.mark.parametrize("one", [False, True])
def test_the_states_are_the_trajectory_replayed(shrink, one):
    """Each action's state hides its tokens and all later ones; its targets are the tokens of its steps."""
    for sample in SAMPLES:
        prompt, x0 = len(sample["prompt_ids"]), sample["prompt_ids"] + sample["response_ids"]
        blocks, seen = replay(sample, BLOCK), {}
        end = min(len(x0), prompt + sample["length"] + POST)
        for seed in range(20 if one else 1):
            state = TraceStates(BLOCK, MASK, shrink, one, POST)(sample, torch.Generator().manual_seed(seed))
            width = len(state.noisy) // state.copies
            assert state.copies == (1 if one else max(-(-len(before) // shrink) for before in blocks.values()))
            for block, before in blocks.items():
                actions = before[::shrink]
                for copy in range(state.copies):
                    at = (state.block[state.position] == block) & (state.copy == copy)
                    shown = state.noisy[copy * width : (copy + 1) * width].tolist()
                    span = range(max(prompt, block * BLOCK), (block + 1) * BLOCK)
                    hidden = {p for p in span if shown[p - state.start] == MASK}
                    if not hidden:
                        assert not at.any()
                        continue
                    number = actions.index(hidden)
                    later = actions[number + 1] if number + 1 < len(actions) else set()
                    assert state.position[at].tolist() == sorted(p for p in hidden - later if p < end)
                    assert state.targets[at].tolist() == [x0[p] for p in state.position[at].tolist()]
                    expected = (len(actions) if one else 1) / len(blocks)
                    assert state.weight[at].tolist() == pytest.approx([expected] * int(at.sum()))
                    seen.setdefault(block, set()).add(number)
        assert all(seen[block] == set(range(len(before[::shrink]))) for block, before in blocks.items())


def test_a_question_whose_answers_do_not_vary_has_no_targets():
    rl = objective()
    dropped, kept = draw(rl, [sample | {"advantage": None} for sample in SAMPLES]), draw(rl, recorded())
    assert not any(len(state.position) for state in dropped)
    assert [set(state.advantage.tolist()) for state in kept] == [{1.5}, {-0.5}, {-1.0}, {0.25}]


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def slow_loss(student, frozen, sample: dict, state, rl: TraceRL) -> tuple[torch.Tensor, dict[str, float]]:
    """The module's formula, block by block and token by token, with plain forwards over [earlier blocks | x_t]."""
    keep = torch.ones(64).index_fill(0, FORBIDDEN, 0).log()
    width = len(state.noisy) // state.copies
    prompt, settings = len(sample["prompt_ids"]), rl.settings

    def tables(model) -> list[torch.Tensor]:
        parts = [state.noisy[k * width : (k + 1) * width] for k in range(state.copies)]
        logits = [plain_logits(model, replace(state, noisy=part, copies=1), BLOCK) for part in parts]
        return [(part / T + keep).log_softmax(-1) for part in logits]

    mine, theirs = tables(student), tables(frozen) if frozen else None
    actions: dict[tuple[int, int], list[int]] = {}
    for i, position in enumerate(state.position.tolist()):
        actions.setdefault((int(state.copy[i]), position // BLOCK), []).append(i)
    loss, kl, clipped, entropy = 0, 0, [], []
    for members in actions.values():
        new = old = ref = 0
        for i in members:
            place, token = int(state.position[i]) - state.start, int(state.targets[i])
            row = mine[int(state.copy[i])][place]
            new, old = new + row[token], old + sample["old_log_prob"][place + state.start - prompt]
            ref = ref + theirs[int(state.copy[i])][place][token].detach() if theirs else old
            entropy.append(-sum(float(x.exp() * x) for x in row.detach() if x > -torch.inf))
        ratio, advantage = torch.exp(new - old), sample["advantage"]
        bounded = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        gain = torch.minimum(ratio * advantage, bounded * advantage)
        estimate = torch.exp(ref - new) - 1 - (ref - new)
        weight = float(state.weight[members[0]])
        loss = loss + weight * (settings.kl_weight * estimate - gain)
        kl += weight * float(estimate.detach())
        clipped.append(float((gain < ratio * advantage).detach()))
    return loss, {"kl": kl, "clip_share": mean(clipped), "entropy": mean(entropy)}


@pytest.mark.parametrize("kl_to", ["old", "reference"])
@pytest.mark.parametrize("shrink, one", [(1, False), (2, False), (1, True)])
def test_equals_the_slow_loop(shrink, one, kl_to):
    student, frozen = tiny_model(0), nearby(3) if kl_to == "reference" else None
    rl = objective(shrink, one, kl_to=kl_to, kl_weight=0.3)
    assert (rl.reference is None) == (frozen is None)
    samples = recorded(shrink=shrink)
    states = draw(rl, samples)
    loss, metrics = rl(student, frozen, collated(states))
    slow, expected = zip(
        *(slow_loss(student, frozen, *pair, rl) for pair in zip(samples, states, strict=True)), strict=True
    )
    torch.testing.assert_close(loss, torch.stack(slow), rtol=1e-4, atol=1e-5)
    for name, values in metrics.items():
        assert values.tolist() == pytest.approx([row[name] for row in expected], rel=1e-4, abs=1e-5), name
    assert 0 < float(metrics["clip_share"].sum()) < len(states)
    assert_same_gradients(student, loss.sum(), sum(slow))


def test_one_drawn_step_has_the_expectation_of_all_steps():
    student, samples = tiny_model(), recorded(SAMPLES[:2])
    whole = objective(kl_weight=0.3)(student, None, collate([draw(objective(), samples)], PAD)).loss
    rl, found = objective(one=True, kl_weight=0.3), []
    for seed in range(300):
        states = [rl.noise(s, torch.Generator().manual_seed(10 * seed + i)) for i, s in enumerate(samples)]
        found.append(rl(student, None, collate([states], PAD)).loss.detach())
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - whole).abs() < 4 * error + 1e-5).all()


def test_no_advantage_and_no_kl_give_no_gradient():
    student, rl = tiny_model(), objective(kl_weight=0.0)
    states = draw(rl, [sample | {"advantage": 0.0} for sample in recorded()])
    loss = rl(student, None, collated(states)).loss
    loss.sum().backward()
    assert not loss.any() and not any(p.grad.any() for p in student.parameters())


def test_nothing_recorded_counts_as_drawn_just_now():
    """The ratio is 1, so the loss is -A for each action, and the gradient -A grad log pi."""
    student, rl = tiny_model(), objective(kl_weight=0.5)
    states = draw(rl, [sample | {"advantage": 2.0} for sample in SAMPLES])
    loss, metrics = rl(student, None, collated(states))
    assert not metrics["kl"].any() and not metrics["clip_share"].any()
    actions = [len(torch.stack([s.copy, s.block[s.position]]).unique(dim=1).T) for s in states]
    blocks = [1 / float(s.weight[0]) for s in states]
    assert loss.tolist() == pytest.approx([-2 * a / b for a, b in zip(actions, blocks, strict=True)])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_rewarded_answer_becomes_likelier(sign):
    student, rl = tiny_model(), objective()
    states = draw(rl, [sample | {"advantage": sign} for sample in SAMPLES])
    batch = collated(states)
    before = rl.policy(student, batch)[0].sum()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    rl(student, None, batch).loss.sum().backward()
    optimizer.step()
    assert sign * (rl.policy(student, batch)[0].sum() - before) > 0


def test_a_batch_with_nothing_to_learn_gives_a_zero_gradient():
    student, rl = tiny_model(), objective()
    state = draw(rl, recorded())[0]
    for name in ("position", *PER_TARGET):
        setattr(state, name, vars(state)[name][:0])
    loss = rl(student, None, collate([[state]], PAD)).loss
    loss.sum().backward()
    assert loss.tolist() == [0.0] and not any(p.grad.any() for p in student.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The decoder's own probabilities


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_policys_probability_is_the_decoders(steps, monkeypatch):
    """The confidence of a drawn token is its probability under the decoder: the old log-probability, to rounding."""
    from t3d.decode import local

    model, confidence = tiny_model(), {}
    unmask = local.Run._unmask

    def recording(run, turn, drawn):
        before = run.lanes.ids.clone()
        complete = unmask(run, turn, drawn)
        for lane, request in enumerate(run.requests):
            for column, position in enumerate(drawn.position[lane].tolist()):
                if request and before[lane, position] == MASK != run.lanes.ids[lane, position]:
                    confidence[request.id, position] = float(drawn.confidence[lane, column])
        return complete

    monkeypatch.setattr(local.Run, "_unmask", recording)
    settings = DecodeSettings(denoising_steps_per_block=steps, temperature=T, max_token=17)
    decoder = engine(model, max_active=5)
    decoder.forbidden_ids = FORBIDDEN.sort().values
    answers = list(decoder.generate(requests(), settings, seed=3))
    rl = objective()
    states = [rl.whole(vars(answer)) for answer in answers]
    log_prob, _ = rl.policy(model, collate([[state] for state in states], PAD))
    found, at = log_prob.split([len(state.position) for state in states]), 0
    for answer, state, values in zip(answers, states, found, strict=True):
        assert sorted(state.position.tolist()) == list(
            range(len(answer.prompt_ids), len(answer.prompt_ids) + len(answer.response_ids))
        )
        for position, value in zip(state.position.tolist(), values.tolist(), strict=True):
            assert value == pytest.approx(math.log(confidence[answer.id, position]), abs=2e-5)
            at += 1
    assert at == len(confidence) > 100


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    "line, key",
    [
        ([], "training.refresh_rollouts"),
        (["training.refresh_rollouts=2"], "training.refresh_at_start"),
        ([*ROUNDS, "training.refresh_temperature=0"], "training.refresh_temperature"),
        ([*ROUNDS, "training.refresh_data_share=0.5"], "training.refresh_data_share"),
        ([*ROUNDS, "training.refresh_random_init_ratio=0.5"], "training.refresh_random_init_ratio"),
        ([*ROUNDS, "training.max_stale_steps=0"], "training.max_stale_steps"),
        ([*ROUNDS, "training.kl_to=reference", "training.kl_weight=0"], "training.kl_to"),
    ],
)
def test_settings_that_do_not_go_together(line, key):
    with raises_key(key):
        load(TrainConfig, ["training.objective=trace_rl", *line])


def test_a_round_as_old_as_allowed():
    config = load(TrainConfig, ["training.objective=trace_rl", *ROUNDS, "training.max_stale_steps=1"])
    assert config.training.max_stale_steps == 1

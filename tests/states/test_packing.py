"""Grouping states into micro-batches: every state once, within the budget, and the same gradients however grouped."""

import random

import pytest
import torch
from packaging.version import Version

from t3d.models import SDARForCausalLM
from t3d.models import block_diffusion as sdar
from t3d.models.loading import training_attention
from t3d.objectives.t3d import T3D, T3DSettings
from t3d.states.base import collate, generator_for
from t3d.states.packing import micro_batches
from t3d.states.trajectory import TrajectoryNoise
from tests.conftest import MASK, PAD, ROOT, tiny_model

ORDINARY = torch.arange(60)


def trajectory(index: int, rng: random.Random) -> dict:
    prompt, blocks = rng.randint(1, 14), rng.randint(1, 6)
    response = (prompt + 4 * blocks) // 4 * 4 - prompt
    steps = [1 + i // 2 for i in range(response)]
    ids = [rng.randrange(60) for _ in range(prompt + response)]
    return {
        "id": f"s{index}",
        "prompt_ids": ids[:prompt],
        "response_ids": ids[prompt:],
        "unmask_step": steps,
        "length": response,
    }


@pytest.fixture
def objective() -> T3D:
    return T3D(TrajectoryNoise(4, MASK, ORDINARY), torch.tensor([MASK]), T3DSettings(beta=0.7))


@pytest.fixture
def states(objective) -> list:
    rng = random.Random(3)
    return [objective.noise(s, generator_for(0, 0, s["id"])) for s in (trajectory(i, rng) for i in range(17))]


def flat(batches) -> list:
    return [state for batch in batches for row in batch for state in row]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", [1, 40, 77, 200, 10_000])
def test_every_state_once_and_within_the_budget(states, budget, packed):
    batches = micro_batches(states, size=99, budget=budget, packed=packed)
    assert sorted(map(id, flat(batches))) == sorted(map(id, states))
    for batch in batches:
        tokens = len(batch) * max(sum(map(len, row)) for row in batch)  # padding counts
        assert tokens <= budget or len(flat([batch])) == 1
        assert len(batch) == 1 if packed else all(len(row) == 1 for row in batch)
    if budget == 10_000:
        assert len(batches) == 1
    if packed:  # no two rows that would fit into one
        lengths = sorted(sum(map(len, batch[0])) for batch in batches)
        assert len(lengths) < 2 or lengths[0] + lengths[1] > budget


def test_without_a_budget_batches_have_so_many_states_of_like_length(states):
    batches = micro_batches(states, size=4)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 1] and all(len(r) == 1 for b in batches for r in b)
    lengths = list(map(len, flat(batches)))
    assert lengths == sorted(lengths, reverse=True)
    assert micro_batches([], size=4) == micro_batches([], size=4, budget=9) == []


def gradients(objective, states, **grouping) -> tuple[dict, dict]:
    """One step's gradients and metrics of all states in the given micro-batches, on the CPU's dense masks."""
    student, reference = tiny_model(1).train(), tiny_model(2)
    sums: dict[str, float] = {}
    for rows in micro_batches(states, **grouping):
        loss, metrics = objective(student, reference, collate(rows, PAD))
        (loss.sum() / len(states)).backward()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value.sum())
    return {name: p.grad for name, p in student.named_parameters()}, sums


@pytest.mark.parametrize(
    "grouping",
    [
        {"size": 1},
        {"size": 5},
        {"size": 1, "budget": 90},
        {"size": 1, "budget": 10_000},
        {"size": 1, "budget": 90, "packed": True},
        {"size": 1, "budget": 10_000, "packed": True},
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_the_grouping(objective, states, grouping):
    expected, expected_sums = gradients(objective, states, size=17)
    got, sums = gradients(objective, states, **grouping)
    assert sums == pytest.approx(expected_sums, rel=1e-4, abs=1e-4)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_row_of_whole_tiles_for_flex_attention(states):
    """Its mask is the dense one's; what it is filled up with sees itself only, so its tiles are not computed."""
    from torch.nn.attention.flex_attention import create_mask

    row = states[:2]
    length = sum(map(len, row))
    batch = collate([row], PAD, flex=True)
    padded = batch.input_ids.shape[1]
    assert padded % 128 == 0 and padded - 128 < length <= padded and batch.tokens == length
    dense = create_mask(batch.attention_mask.mask_mod, 1, 1, padded, padded, device="cpu")[0, 0]
    assert torch.equal(dense[:length, :length], collate([row], PAD).attention_mask[0, 0])
    assert torch.equal(dense[length:], torch.eye(padded, dtype=torch.bool)[length:])
    assert not dense[:length, length:].any()


def test_what_trains_where_none_is_asked_for(story_teacher):
    embedded, cpu, gpu = str(ROOT / "models" / "embedded-teacher"), torch.device("cpu"), torch.device("cuda")
    recent = Version(torch.__version__) >= Version("2.7")  # 2.6 compiles FlexAttention again for every length
    assert training_attention(None, embedded, gpu) == ("flex_attention" if recent else "sdpa")
    assert training_attention(None, embedded, cpu) == training_attention("sdpa", embedded, gpu) == "sdpa"
    assert training_attention(None, str(story_teacher), gpu) == "sdpa"  # its heads are too narrow


def test_flex_attention_gets_one_dtype_under_autocast(monkeypatch):
    """With fp32 weights the norms leave queries and keys in fp32, and values are bf16."""
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append({query.dtype, key.dtype, value.dtype})
        return query.transpose(1, 2), None

    monkeypatch.setattr(sdar, "flex_attention_forward", attention)
    model = SDARForCausalLM._from_config(tiny_model().config, attn_implementation="flex_attention")
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(8)[None], use_cache=False)  # as in training
    assert seen == [{torch.bfloat16}] * 2


@pytest.mark.gpu
def test_packed_rows_on_a_gpu_equal_single_ones(objective, states):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    results = []
    config = tiny_model().config
    config.head_dim = 16  # the least that FlexAttention's kernel takes
    for attention, grouping in (("sdpa", {}), ("flex_attention", {"budget": 300, "packed": True})):
        models = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            models.append(SDARForCausalLM._from_config(config, attn_implementation=attention).cuda())
        student, reference = models[0].train(), models[1].eval()
        for rows in micro_batches(states, size=1, **grouping):
            batch = collate(rows, PAD, flex=attention == "flex_attention", device="cuda")
            objective(student, reference, batch).loss.sum().backward()
        results.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-3, atol=1e-3)

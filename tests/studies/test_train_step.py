"""The released recipe written as a baseline minimises our loss, and ours never holds a (tokens x vocabulary) table."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from studies.benchmarks import train_step
from studies.benchmarks.train_step import LADDER, NO_REFERENCE, OURS, RECIPE, RECIPE_CHECKPOINTING, Bench, Shape
from tests.conftest import reset_accelerator

# Fewer tokens than one sequence has masks, so that a table of all of them is told from a chunk.
SHAPE = Shape(layers=2, width=64, vocab=2_000, sequences=3)
CHUNK = 16


@pytest.fixture(scope="module", autouse=True)
def fresh_accelerator():
    """Once for all tests here, which share a trainer."""
    reset_accelerator()


@pytest.fixture(scope="module")
def bench(tmp_path_factory, fresh_accelerator):
    folder = tmp_path_factory.mktemp("bench")
    train_step.write_models(SHAPE, folder)
    bench = Bench(SHAPE, folder)
    bench.trainer.objective.chunk = CHUNK
    return bench


def test_every_variant_finds_the_same_loss_and_gradient(bench, monkeypatch):
    """So that the comparison of their costs is one: the gradients as they are when the optimizer sees them."""
    seen = {}

    def record(variant):
        seen[variant] = [parameter.grad.clone() for parameter in bench.trainer.student.parameters()]

    losses = {}
    for variant in (*LADDER, RECIPE_CHECKPOINTING):
        monkeypatch.setattr(bench.trainer.optimizer, "step", lambda v=variant: record(v))
        losses[variant] = bench.step(variant)
    train_step.assert_equal_losses(losses)
    assert losses[LADDER[0]] != pytest.approx(losses[NO_REFERENCE], abs=1e-4)  # the reference is another model
    for variant in seen:
        if variant != NO_REFERENCE:
            for mine, theirs in zip(seen[variant], seen[LADDER[0]], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_a_different_loss_is_noticed():
    same = dict.fromkeys(LADDER, 2.0)
    train_step.assert_equal_losses(same)
    with pytest.raises(AssertionError, match="masked rows"):
        train_step.assert_equal_losses(same | {"masked rows": 2.001})


class LargestTable(TorchDispatchMode):
    """The most rows of any tensor that any operation made, forward or backward, with the vocabulary as one side."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and SHAPE.vocab in tensor.shape:
                rows = tensor.numel() // SHAPE.vocab
                # the head's and the embedding's own gradients have the vocabulary as a side too
                self.rows = max(self.rows, rows if SHAPE.width not in tensor.shape else 0)
        return result


def test_the_time_of_some_padded_sequences_counts_for_all(bench, monkeypatch):
    """A step that takes one second per padded sequence, and two seconds for the optimizer."""
    clock = [0.0]

    def step(variant, first=None):
        clock[0] += 2 + (first or len(bench.samples))
        return 1.0

    monkeypatch.setattr(bench, "step", step)
    monkeypatch.setattr(bench, "ending", 2.0)
    monkeypatch.setattr(train_step, "seconds", lambda work: (clock.__setitem__(0, 0.0), work(), clock[0])[2])
    count = len(bench.samples)
    assert train_step.times(bench, (RECIPE, OURS), 1, first=1) == {RECIPE: count + 2, OURS: count + 2}


@pytest.mark.parametrize("variant", LADDER)
def test_no_table_of_tokens_by_vocabulary_beyond_one_chunk(bench, variant):
    with LargestTable() as seen:
        bench.step(variant)
    if variant.startswith("ours"):
        assert 0 < seen.rows <= CHUNK
    else:  # the plain versions do, so the watch sees such tables
        assert seen.rows > 4 * CHUNK


def test_lengths_are_those_of_the_data_and_shrink_to_its_quantiles():
    prompts, answers = zip(*train_step.lengths(1000), strict=True)
    assert sum(prompts) / 1000 == pytest.approx(97, rel=0.06)  # the mean of the real set
    assert max(prompts) <= 512 and sorted(prompts)[500] == pytest.approx(76, abs=1)
    assert sum(answers) / sum(prompts) == pytest.approx(train_step.ANSWER_FACTOR, rel=0.01)


def test_samples_are_trajectories(bench):
    for sample in bench.samples:
        steps, prompt = sample["unmask_step"], len(sample["prompt_ids"])
        assert sorted(steps) == list(range(1, len(steps) + 1)) and sample["length"] == len(sample["response_ids"])
        blocks = [(prompt + i) // train_step.BLOCK for i in sorted(range(len(steps)), key=steps.__getitem__)]
        assert blocks == sorted(blocks), "a block is decoded before the one to its left is done"


@pytest.mark.slow
def test_real_prompts_have_the_shipped_quantiles(shared):
    counts = train_step.prompt_lengths()
    kept = [count for count in counts if count <= 512]
    assert (len(kept), len(counts)) == (8451, 8523)
    assert tuple(train_step.quantiles(kept)) == train_step.PROMPT_QUANTILES

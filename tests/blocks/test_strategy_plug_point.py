"""A strategy from a file outside the package, by the command and by ``generate``."""

import json
import os
import subprocess
import sys

import pytest
import torch

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import Strategy, names, strategy_named
from t3d.common.options import load
from t3d.common.paths import ROOT
from t3d.evaluation.run import results_file
from t3d.evaluation.settings import EvalConfig
from t3d.models.loading import load_model
from t3d.rollout.settings import SampleConfig
from tests.conftest import raises_key

TEACHER = str(ROOT / "models" / "embedded-teacher")
TOY = '''
from t3d.blocks.strategy import Strategy, top


class RightToLeft(Strategy):
    """From right to left."""

    fixed_steps = True
    threshold = "dynamic_threshold"

    def choose(self, view, settings):
        return top(view.masked.long().cumsum(-1).float(), view.masked, view.share)


class Idle(Strategy):
    """Never anything: a block ends all the same."""

    may_choose_none = True

    def choose(self, view, settings):
        return view.masked & False


NO_STRATEGY = 3
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the toys' file."""
    (tmp_path / "toy_strategies.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("toy_strategies", None)
    strategy_named.cache_clear()


def blocks(unmask_step: list[int], prompt: int, size: int) -> list[list[int]]:
    first = -prompt % size
    starts = [0, *range(first, len(unmask_step), size)] if first else list(range(0, len(unmask_step), size))
    return [unmask_step[a:b] for a, b in zip(starts, [*starts[1:], len(unmask_step)], strict=True)]


def test_a_toy_decodes_by_the_command(folder):
    (folder / "Toy_set.json").write_text(json.dumps([{"question": "2 + 2?", "ground_truth_answer": "4"}] * 2))
    command = [sys.executable, str(ROOT / "sample" / "sdar_sample.py"), f"experiment.project={folder}/out"]
    command += [f"evaluation.checkpoint_path={TEACHER}", f"evaluation.eval_dataset={folder}/Toy_set.json"]
    command += ["rollout.max_token=12", "rollout.remasking_strategy=toy_strategies:RightToLeft"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (rows,) = (json.loads(path.read_text()) for path in folder.glob("out/temp_data/*.json"))
    for row in rows:
        prompt = len(row["prompt_ids"])
        for block in blocks(row["unmask_step"][0], prompt, 4):
            assert block == sorted(block, reverse=True)


def test_a_toy_decodes_by_generate(folder):
    model = load_model(TEACHER)
    prompt = torch.arange(8)[None]
    out = model.generate(
        prompt,
        remasking_strategy="toy_strategies:RightToLeft",
        max_new_tokens=8,
        eos_token_id=model.config.vocab_size - 1,
        suppress_tokens=[model.config.vocab_size - 1],
        return_dict_in_generate=True,
    )
    assert out.unmask_step.tolist() == [[4, 3, 2, 1, 8, 7, 6, 5]]


def test_a_strategy_that_chooses_nothing_ends_all_the_same(folder):
    """The last step of max(steps, positions) unmasks all; the numbers of the idle steps stay in the count."""
    model = load_model(TEACHER)
    stop = model.config.vocab_size - 1
    options = {"max_new_tokens": 8, "eos_token_id": stop, "suppress_tokens": [stop], "return_dict_in_generate": True}
    out = model.generate(
        torch.arange(8)[None], remasking_strategy="toy_strategies:Idle", denoising_steps_per_block=6, **options
    )
    assert out.unmask_step.tolist() == [[6] * 4 + [12] * 4] and out.steps.tolist() == [12]
    assert out.forwards.tolist() == [13]


def test_a_block_has_more_steps_than_positions_only_where_a_step_may_be_empty():
    steps = "rollout.denoising_steps_per_block=400"
    assert load(SampleConfig, [steps, "rollout.remasking_strategy=ancestral"]).rollout.denoising_steps_per_block == 400
    for name in set(names()) - {"ancestral"}:
        with raises_key("rollout.denoising_steps_per_block"):
            load(SampleConfig, [steps, f"rollout.remasking_strategy={name}"])


def test_names_of_results_carry_the_strategy_and_its_threshold(folder):
    name = "toy_strategies:RightToLeft"
    config = load(EvalConfig, [f"rollout.remasking_strategy={name}", "rollout.dynamic_threshold=0.25"])
    assert "-toy_strategies.RightToLeft0.25-b4-" in results_file(config).name


@pytest.mark.parametrize(
    "name", ["no_such_module:Toy", "toy_strategies:Nothing", "toy_strategies:NO_STRATEGY", "toy_strategies:", "unheard"]
)
def test_a_name_without_a_strategy_is_one_line(folder, name):
    with raises_key("rollout.remasking_strategy") as error:
        load(SampleConfig, [f"rollout.remasking_strategy={name}"])
    assert "\n" not in str(error.value)


def test_a_broken_module_is_one_line(folder):
    (folder / "broken_strategy.py").write_text("import nothing_of_that_name\n")
    with raises_key("rollout.remasking_strategy") as error:
        load(SampleConfig, ["rollout.remasking_strategy=broken_strategy:Toy"])
    assert "nothing_of_that_name" in str(error.value)


@pytest.mark.parametrize("name", names())
def test_every_file_holds_one_strategy_that_fits_the_settings(name):
    strategy = strategy_named(name)
    assert isinstance(strategy, Strategy) and strategy is strategy_named(name)
    assert strategy.threshold is None or hasattr(DecodeSettings, strategy.threshold)

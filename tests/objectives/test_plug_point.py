"""A user's own objective, in a file outside the package: the command trains it, and its keys are like all others."""

import subprocess
import sys

import pytest

from t3d.common.options import load
from t3d.objectives.base import registered
from t3d.training.settings import TrainConfig, training_section
from tests.conftest import ROOT, raises_key
from tests.training.conftest import log_of, overrides  # noqa: F401  (the fixture of a small training run)

TOY = '''
"""Cross-entropy of the masked tokens, to a power."""
from dataclasses import dataclass

from t3d.common.options import option
from t3d.objectives.base import Objective, Terms, score
from t3d.objectives.naive_td import trajectory_loss
from t3d.objectives.states import TrajectoryStates


@dataclass
class ToySettings(TrajectoryStates):
    toy_power: float = option(1.0, "toy: the power of the loss", gt=0, le=4)
    mask_ratio_exponent: float = option(0.0, "toy: all ratios alike", ge=0)


class Toy(Objective):
    Settings = ToySettings
    PRESETS = {"steep": {"toy_power": 3.0}}

    @classmethod
    def build(cls, settings, context):
        toy = cls()
        toy.noise, toy.power = settings.noise(context), settings.toy_power
        return toy

    def __call__(self, student, reference, batch):
        log_probs, _ = score(student, batch)
        loss = trajectory_loss(log_probs[:, 0], batch.sequence, batch.sequences) ** self.power
        return Terms(loss, {"toy": loss.detach()})


class Clash(Toy):
    @dataclass
    class Settings(ToySettings):
        seed: int = option(1, "a key of every training")


class Bare(Toy):
    @dataclass(kw_only=True)
    class Settings(ToySettings):
        toy_bare: int


class NoObjective:
    Settings = ToySettings
'''
OWN = "training.objective=toy_module:Toy"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, which holds the user's module."""
    (tmp_path / "toy_module.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_the_command_trains_it(folder, overrides):  # noqa: F811
    line = [item for item in overrides("toy", OWN, "training.toy_power=2") if "max_steps" not in item]
    command = [sys.executable, str(ROOT / "train" / "self_ddo_sdar_full.py"), *line, "training.max_steps=12"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / "tiny-teacher" / "math" / "p" / "toy"
    rows = log_of(run)
    assert [row["toy"] for row in rows] == [row["loss"] for row in rows]
    assert sum(row["loss"] for row in rows[-3:]) < 0.9 * sum(row["loss"] for row in rows[:3])
    saved = load(TrainConfig, [f"config={run / 'config.yaml'}"])  # which names the objective
    assert saved.training.objective == "toy_module:Toy" and saved.training.toy_power == 2.0


def test_its_keys_are_in_yaml_in_presets_and_in_help(folder, capsys):
    (folder / "toy.yaml").write_text("training: {objective: toy_module:Toy, preset: steep}\n")
    training = load(TrainConfig, ["config=toy.yaml"]).training
    assert (training.toy_power, training.mask_ratio_exponent) == (3.0, 0.0)  # its own default of a shared key
    assert load(TrainConfig, ["config=toy.yaml", "training.toy_power=2"]).training.toy_power == 2.0
    for line in (["--help-all", OWN], ["config=toy.yaml", "--help-all"]):
        with pytest.raises(SystemExit) as left:
            load(TrainConfig, line)
        text = capsys.readouterr().out
        assert left.value.code == 0 and "training.toy_power=1.0  (a number, above 0 and at most 4)" in text
        assert "steep: toy_power=3.0" in text


@pytest.mark.parametrize(
    "line, key",
    [
        ([OWN, "training.toy_power=-1"], "training.toy_power"),
        ([OWN, "training.toy_power=much"], "training.toy_power"),
        ([OWN, "training.toy_pwer=1"], "training.toy_pwer"),
        ([OWN, "training.likelihood_k=2"], "training.likelihood_k"),  # another objective's
        (["training.toy_power=2"], "training.toy_power"),  # without its objective
        ([OWN, "training.preset=stepe"], "training.preset"),
        (["training.objective=toy_module:Toi"], "training.objective"),
        (["training.objective=no_module:Toy"], "training.objective"),
        (["training.objective=:Toy"], "training.objective"),
        (["training.objective=toy_module:NoObjective"], "training.objective"),
        (["training.objective=toy_module:Clash"], "training.objective"),
        (["training.objective=toy_module:Bare"], "training.objective"),
        (["training.objective=toy"], "training.objective"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(folder, line, key):
    with raises_key(key):
        load(TrainConfig, line)


def test_registered_objectives_agree_on_the_keys_that_they_share():
    section = training_section(None)()
    assert section.objective in registered() and len(registered()) >= 6
    for objective in registered().values():
        for key, value in vars(objective.Settings()).items():
            assert getattr(section, key) == value, f"{objective.name}: {key}"
            ours, composed = objective.Settings.__dataclass_fields__[key], section.__dataclass_fields__[key]
            assert ours.metadata == composed.metadata

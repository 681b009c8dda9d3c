"""The JSONL log through kills and resumes; tensorboard and wandb (offline) for real."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from t3d.training import tracking
from t3d.training.settings import WandbConfig
from t3d.training.tracking import Tracker
from tests.conftest import raises_key

CONFIG = {"experiment": {"project": "a_project"}, "training": {"alpha": 0.5}}


@pytest.fixture(autouse=True)
def accelerate_state() -> None:
    """A training has one before its tracker."""
    PartialState(cpu=True)


def tracker(folder: Path, kind: str = "none", **options) -> Tracker:
    options = {"config": CONFIG, "wandb_config": WandbConfig(), "name": "run"} | options
    return Tracker(folder, kind=kind, **options)


def log(folder: Path) -> list[dict]:
    def no_constant(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=no_constant) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_one_line_a_step_at_once(tmp_path):
    log_to = tracker(tmp_path / "run")
    log_to.log({"loss": torch.tensor(0.5), "lr": 1e-5, "round": 2, "note": "é"}, 1)
    assert log(tmp_path / "run") == [{"step": 1, "loss": 0.5, "lr": 1e-5, "round": 2, "note": "é"}]  # flushed
    log_to.log({"loss": float("nan"), "margin": float("-inf"), "ratios": [1.0, float("inf")], "step": 2}, 2)
    log_to.close()
    assert log(tmp_path / "run")[1] == {"step": 2, "loss": None, "margin": None, "ratios": [1.0, None]}
    log_to.close()  # twice does no harm


def test_a_resumed_log_has_each_step_once(tmp_path):
    first = tracker(tmp_path)
    for step in range(1, 6):
        first.log({"loss": step}, step)
    first.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    again = tracker(tmp_path, resume_step=3)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3]
    again.log({"loss": 0.0}, 4)
    again.close()
    assert [(row["step"], row["loss"]) for row in log(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 0.0)]
    tracker(tmp_path).close()  # from the beginning
    assert log(tmp_path) == [] and sorted(os.listdir(tmp_path)) == ["log.jsonl"]


def test_other_processes_write_nothing(tmp_path):
    other = tracker(tmp_path / "run", kind="wandb", main=False)
    other.log({"loss": 1.0}, 1)
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_scalars(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_to = tracker(tmp_path, kind="tensorboard")
    log_to.log({"loss": 0.5, "skipped": 3, "note": "text"}, 7)
    log_to.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "skipped"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 0.5)]


@pytest.fixture
def logged_out(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


class FakeWandb:
    """Takes wandb's place: keeps what it is told."""

    def __init__(self, error: Exception | None = None):
        self.error, self.logged, self.id, self.asked = error, [], "id-1", {}

    def init(self, **options):
        if self.error:
            raise self.error
        self.asked, self.id = options, options["id"] or self.id
        return self

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.logged.append("finished")


def test_what_wandb_is_told(tmp_path, monkeypatch, logged_out):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = tmp_path / "run"
    log_to = tracker(run, kind="wandb")
    log_to.log({"loss": 0.5, "note": "text"}, 1)
    log_to.close()
    assert fake.logged == [(1, {"loss": 0.5}), "finished"]
    assert (fake.asked["project"], fake.asked["mode"], fake.asked["dir"]) == ("a_project", "offline", str(run))
    assert fake.asked["config"] == CONFIG and fake.asked["id"] is None and fake.asked["resume"] is None

    tracker(run, kind="wandb", resume_step=1).close()  # a resumed run goes on with its own
    assert (fake.asked["id"], fake.asked["resume"]) == ("id-1", "allow")
    mine = WandbConfig(entity="me", project="mine", resume=True, run_id="id-2")
    tracker(run, kind="wandb", wandb_config=mine).close()
    told = fake.asked
    assert (told["entity"], told["project"], told["id"], told["resume"]) == ("me", "mine", "id-2", "allow")

    logged_out.write_text("machine api.wandb.ai login user password " + "0" * 40)
    tracker(run, kind="wandb").close()
    assert fake.asked["mode"] == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker(run, kind="wandb").close()
    assert fake.asked["mode"] == "disabled"


def test_wandb_offline_for_real(tmp_path, monkeypatch, logged_out):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_to = tracker(tmp_path / "run", kind="wandb")
    log_to.log({"loss": 0.5}, 1)
    log_to.close()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert (tmp_path / "run" / tracking.WANDB_ID).read_text().strip()


def test_a_tracker_that_cannot_start_is_one_clear_line(tmp_path, monkeypatch, logged_out):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("no entity\nyou")))
    with raises_key("experiment.tracker", "(no entity you)", "WANDB_MODE"):
        tracker(tmp_path, kind="wandb")
    with raises_key("wandb.run_id"):
        tracker(tmp_path, kind="wandb", wandb_config=WandbConfig(resume=True))
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    for kind, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        with raises_key("experiment.tracker", f"pip install {kind}"):
            tracker(tmp_path, kind=kind)

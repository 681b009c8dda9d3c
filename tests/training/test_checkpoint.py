"""Checkpoints: a resumed run equals an uninterrupted one bit for bit, and a killed save costs nothing but itself."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from t3d.common.paths import ROOT
from t3d.training import checkpoint
from tests.conftest import largest_file, raises_key, reset_accelerator, tiny_model


class Run:
    """A small training run whose every step uses all random generators, and the optimizer's and schedule's state."""

    def __init__(self, seed: int):
        reset_accelerator()
        self.accelerator = Accelerator(cpu=True)
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        model = tiny_model(seed).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    def steps(self, count: int) -> None:
        for _ in range(count):
            ids = torch.randint(60, (2, 8)) + random.randrange(2) + int(np.random.randint(2))
            loss = self.model(ids).logits.logsumexp(-1).mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.clone() for name, weight in self.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    run = Run(seed=1)
    run.steps(2)
    state = {"epoch": 3, "position": [1, 2], "best": 0.1 + 0.2}
    path = checkpoint.save(run.accelerator, tmp_path, 2, state, None)
    assert path == tmp_path / "checkpoint-00000002" == checkpoint.latest(tmp_path)
    saved = run.weights()
    run.steps(3)
    assert not same(saved, run.weights())

    again = Run(seed=7)  # other weights, other random states
    assert checkpoint.load(again.accelerator, path) == state
    assert same(saved, again.weights())
    again.steps(3)
    assert same(run.weights(), again.weights())
    assert run.schedule.get_last_lr() == again.schedule.get_last_lr()


def test_the_newest_stay(tmp_path):
    run = Run(seed=1)
    for step in (1, 2, 3, 10):
        checkpoint.save(run.accelerator, tmp_path, step, {}, 2)
    assert names(tmp_path) == ["checkpoint-00000003", "checkpoint-00000010"]
    checkpoint.save(run.accelerator, tmp_path, 2, {}, 1)  # never the one just written
    assert names(tmp_path) == ["checkpoint-00000002"]
    checkpoint.save(run.accelerator, tmp_path, 5, {}, None)
    assert names(tmp_path) == ["checkpoint-00000002", "checkpoint-00000005"]


def test_a_step_can_be_saved_again(tmp_path):
    run = Run(seed=1)
    checkpoint.save(run.accelerator, tmp_path, 4, {"try": 1}, 1)
    path = checkpoint.save(run.accelerator, tmp_path, 4, {"try": 2}, 1)
    assert names(tmp_path) == ["checkpoint-00000004"]
    assert checkpoint.load(run.accelerator, path) == {"try": 2}


def test_a_file_that_torch_left_without_its_end_is_one_line(tmp_path):
    """As torch up to 2.9 does on a full disk, without an error."""
    run = Run(seed=1)
    first = checkpoint.save(run.accelerator, tmp_path, 1, {}, 1)

    def leave(models, weights, folder):
        whole = (first / "optimizer.bin").read_bytes()
        Path(folder, "torn.bin").write_bytes(whole[:-1])

    run.accelerator.register_save_state_pre_hook(leave)
    with raises_key(tmp_path / "checkpoint-00000002", "torn.bin", "experiment.resume=auto"):
        checkpoint.save(run.accelerator, tmp_path, 2, {}, 1)
    assert names(tmp_path) == [first.name]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin"])
def test_a_disk_that_takes_no_more_is_one_line_and_costs_that_save_only(tmp_path, file):
    run = Run(seed=1)
    first = checkpoint.save(run.accelerator, tmp_path, 1, {"try": 1}, 1)
    saved = run.weights()
    run.steps(1)
    with (
        largest_file((first / file).stat().st_size - 1),
        raises_key(tmp_path / "checkpoint-00000002", "experiment.resume=auto"),
    ):
        checkpoint.save(run.accelerator, tmp_path, 2, {}, 1)
    assert names(tmp_path) == [first.name], "the room is given back"
    again = Run(seed=7)
    assert checkpoint.load(again.accelerator, checkpoint.latest(tmp_path)) == {"try": 1} and same(
        saved, again.weights()
    )
    checkpoint.save(run.accelerator, tmp_path, 3, {}, 2)
    assert names(tmp_path) == ["checkpoint-00000001", "checkpoint-00000003"]


def test_other_errors_of_a_save_are_not_the_disks(tmp_path, monkeypatch):
    run = Run(seed=1)
    first = checkpoint.save(run.accelerator, tmp_path, 1, {}, 1)
    monkeypatch.setattr(checkpoint, "_seal", lambda *_: (_ for _ in ()).throw(RuntimeError("NCCL")))
    with pytest.raises(RuntimeError, match="NCCL"):
        checkpoint.save(run.accelerator, tmp_path, 2, {}, 1)
    assert checkpoint.latest(tmp_path) == first and ".tmp-checkpoint-00000002" in names(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from accelerate import Accelerator
import torch
from t3d.training import checkpoint

root, step, moment = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(3, 3))
checkpoint.save(accelerator, root, 1, {"step": 1}, 1)

rename, calls = os.rename, 0
def killed_rename(a, b):
    global calls
    calls += 1
    if calls == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
checkpoint.os.rename = killed_rename
checkpoint.save(accelerator, root, step, {"step": "new"}, 1)
"""


@pytest.mark.parametrize(
    ("step", "rename", "left"),
    [
        (2, 1, "checkpoint-00000001"),  # before the new one gets its name
        (2, 2, "checkpoint-00000002"),  # before the old one is pruned
        (1, 2, "checkpoint-00000001.replaced"),  # the same step again: the old one aside, the new one without its name
        (1, 3, "checkpoint-00000001"),  # before the replaced one is pruned
    ],
)
def test_kill_9_during_a_save(tmp_path, step, rename, left):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(step), str(rename)]
    result = subprocess.run(command, env=environment, capture_output=True)
    assert result.returncode == -9, result.stderr.decode()
    newest = checkpoint.latest(tmp_path)
    assert newest.name == left and checkpoint.fault(newest) is None


def test_kill_9_between_the_two_renames_of_a_replaced_step(tmp_path):
    run = Run(seed=1)
    path = checkpoint.save(run.accelerator, tmp_path, 4, {"try": 1}, 1)
    path.rename(tmp_path / "checkpoint-00000004.replaced")
    (tmp_path / ".tmp-checkpoint-00000004").mkdir()
    newest = checkpoint.latest(tmp_path)
    assert checkpoint.load(run.accelerator, newest) == {"try": 1}
    checkpoint.save(run.accelerator, tmp_path, 5, {}, 3)
    assert names(tmp_path) == ["checkpoint-00000005"]


def flip(path: Path) -> None:
    """Change one byte in the middle; size and time stay."""
    data, times = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_damaged_checkpoints_do_not_count_and_are_set_aside(tmp_path, caplog):
    run = Run(seed=1)
    assert checkpoint.latest(tmp_path / "none") is None and checkpoint.latest(tmp_path) is None
    first = checkpoint.save(run.accelerator, tmp_path, 1, {}, None)
    damage = {
        "no complete.json": lambda folder: (folder / "complete.json").unlink(),
        "optimizer.bin is missing": lambda folder: (folder / "optimizer.bin").unlink(),
        "model.safetensors has 7 bytes": lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"),
    }
    for step, (told, harm) in enumerate(damage.items(), start=2):
        path = checkpoint.save(run.accelerator, tmp_path, step, {}, None)
        harm(path)
        with raises_key(path, told):
            checkpoint.load(run.accelerator, path)
    flip(checkpoint.save(run.accelerator, tmp_path, 5, {}, None) / "optimizer.bin")
    caplog.clear()
    assert checkpoint.latest(tmp_path) == first
    lines = [record.getMessage() for record in caplog.records]
    reasons = ["optimizer.bin has changed since it was written", *reversed(damage)]
    assert len(lines) == 4 and all(reason in line for reason, line in zip(reasons, lines, strict=True))
    assert [name for name in names(tmp_path) if "damaged" not in name] == [first.name]
    assert checkpoint.latest(tmp_path) == first and len(caplog.records) == 4, "told once"
    # the same step again, damaged again, and a save that must not count them
    (checkpoint.save(run.accelerator, tmp_path, 5, {}, None) / "optimizer.bin").unlink()
    assert checkpoint.latest(tmp_path) == first and "checkpoint-00000005.damaged1" in names(tmp_path)
    checkpoint.save(run.accelerator, tmp_path, 6, {}, 2)
    assert [name for name in names(tmp_path) if "damaged" not in name] == [first.name, "checkpoint-00000006"]
    with raises_key(tmp_path / "nowhere"):
        checkpoint.load(run.accelerator, tmp_path / "nowhere")


def of_processes(path: Path, count: int) -> Path:
    """A checkpoint that seems to have been saved by so many processes."""
    record = json.loads((path / "trainer_state.json").read_text()) | {"num_processes": count}
    (path / "trainer_state.json").write_text(json.dumps(record, indent=1))
    return path


def test_a_checkpoint_of_another_kind_of_launch_is_refused(tmp_path, monkeypatch):
    run = Run(seed=1)
    path = of_processes(checkpoint.save(run.accelerator, tmp_path, 1, {}, None), 3)
    checkpoint.prepare(run.accelerator, path)
    checkpoint.load(run.accelerator, path)  # whole states go into any number of processes
    monkeypatch.setattr(checkpoint, "kind", lambda _: "DeepSpeed ZeRO-2")
    for look in (checkpoint.prepare, checkpoint.load):
        with raises_key(path, "saved with whole states", "loaded with DeepSpeed ZeRO-2"):
            look(run.accelerator, path)
    path = checkpoint.save(run.accelerator, tmp_path, 2, {}, None)
    checkpoint.prepare(run.accelerator, path)
    checkpoint.load(run.accelerator, path)


class Regrouping:
    """In place of DeepSpeed's: makes a folder of one file, if it is not hindered, and looks at what is loaded."""

    def __init__(self, hindrance: BaseException | None = None):
        self.hindrance, self.told, self.loaded = hindrance, False, []

    def read_universal(self, _) -> None:
        self.told = True

    def regroup(self, path: Path, target: Path) -> None:
        target.mkdir()
        (target / "states").write_text("half" if self.hindrance else "whole")
        if self.hindrance:
            raise self.hindrance

    def load(self, accelerator: Accelerator, folder: Path) -> None:
        assert self.told, "DeepSpeed was not told in time"
        self.loaded.append((folder / "states").read_text())
        accelerator.load_state(str(folder.parent / "checkpoint-00000001"))


def test_states_split_over_another_number_of_processes_are_regrouped(tmp_path, monkeypatch, caplog):
    run = Run(seed=1)
    monkeypatch.setattr(checkpoint, "kind", lambda _: "DeepSpeed ZeRO-2")
    path = of_processes(checkpoint.save(run.accelerator, tmp_path, 1, {"step": 1}, None), 3)

    def resume(hindrance: BaseException | None = None) -> list[str]:
        regrouping = Regrouping(hindrance)
        monkeypatch.setattr(checkpoint, "regrouping", regrouping)
        checkpoint.prepare(run.accelerator, path)
        assert regrouping.told and names(tmp_path) == before, "before the run's settings have been looked at"
        assert checkpoint.load(run.accelerator, path) == {"step": 1}
        return regrouping.loaded

    before = names(tmp_path)
    assert resume() == ["whole"] and names(tmp_path) == before == [path.name]
    (line,) = (record.getMessage() for record in caplog.records)
    assert "checkpoint-00000001: its states are split over 3 processes; regrouping them for 1" in line

    for full in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("unexpected pos 64 vs 0")):
        with raises_key(tmp_path / ".tmp-regrouped-checkpoint-00000001", "experiment.resume=auto"):
            resume(full)
        assert names(tmp_path) == before
    with pytest.raises(ValueError, match="DeepSpeed does not like it"):  # not the disk: in full, and nothing loaded
        resume(ValueError("DeepSpeed does not like it"))
    with pytest.raises(KeyboardInterrupt):
        before = names(tmp_path)
        resume(KeyboardInterrupt())
    before = names(tmp_path)
    assert before == [".tmp-regrouped-checkpoint-00000001", path.name]
    assert resume() == ["whole"], "what a kill left was taken for whole"
    assert names(tmp_path) == [path.name]

    with pytest.raises(KeyboardInterrupt):
        before = names(tmp_path)
        resume(KeyboardInterrupt())
    checkpoint.save(run.accelerator, tmp_path, 2, {}, None)
    assert names(tmp_path) == [path.name, "checkpoint-00000002"]


def test_random_states_that_were_not_restored_are_an_error(tmp_path, monkeypatch):
    run = Run(seed=1)
    path = checkpoint.save(run.accelerator, tmp_path, 1, {}, None)
    torch.rand(3)
    monkeypatch.setattr("accelerate.checkpointing.random.setstate", lambda *_: (_ for _ in ()).throw(TypeError))
    with pytest.raises(RuntimeError, match="did not restore the random states"):
        checkpoint.load(run.accelerator, path)

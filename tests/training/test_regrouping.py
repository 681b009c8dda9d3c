"""ZeRO checkpoints joined over processes: from files as DeepSpeed writes them, without its engine or a compiler.

That a run really goes on with another number of processes: tests/training/test_loop.py.
"""

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from t3d.training import checkpoint, regrouping
from tests.conftest import raises_key
from tests.training.test_checkpoint import largest_file

SHAPES = OrderedDict({"a.weight": torch.Size([3, 5]), "b.weight": torch.Size([4])})
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def whole_states() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {state: {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()} for state in STATES}


def optimizer(rows: dict[str, torch.Tensor]) -> dict:
    return {
        "state": {0: {"step": torch.tensor(7.0), "exp_avg": rows["exp_avg"], "exp_avg_sq": rows["exp_avg_sq"]}},
        "param_groups": [{"lr": 0.5, "params": [0]}],
    }


def zero_1_or_2(folder: Path, processes: int) -> dict[str, dict[str, torch.Tensor]]:
    """All weights end to end, filled up to a multiple of the processes and cut into one part for each."""
    from deepspeed.utils.tensor_fragment import fragment_address

    states, flat = whole_states(), {}
    for state, tensors in states.items():
        row = torch.cat([tensor.flatten() for tensor in tensors.values()])
        flat[state] = torch.cat([row, torch.full((-len(row) % processes,), 9.0)])
    size = len(flat["fp32"]) // processes
    for rank in range(processes):
        begin, end, start, mappings = rank * size, (rank + 1) * size, 0, OrderedDict()
        for name, shape in SHAPES.items():
            first, last = max(start, begin), min(start + shape.numel(), end)
            if first < last:
                mappings[name] = fragment_address(start=first - begin, numel=last - first)
            start += shape.numel()
        rows = {state: flat[state][begin:end].clone() for state in STATES}
        part = {
            "base_optimizer_state": optimizer(rows),
            "single_partition_of_fp32_groups": [rows["fp32"]],
            "param_slice_mappings": [mappings],
            "zero_stage": 2,
        }
        torch.save({"optimizer_state_dict": part}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    module = {**states["fp32"], "frozen": torch.ones(2)}
    model = {"module": module, "param_shapes": [SHAPES], "dp_world_size": processes, "iteration": 7, "ds_config": {}}
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    return states


def zero_3(folder: Path, processes: int) -> dict[str, dict[str, torch.Tensor]]:
    """Each weight filled up and cut on its own."""
    states = whole_states()
    for rank in range(processes):
        rows = {}
        for state, tensors in states.items():
            pieces = []
            for tensor in tensors.values():
                size = -(-tensor.numel() // processes)
                filled = torch.full((size * processes,), 9.0)
                filled[: tensor.numel()] = tensor.flatten()
                pieces.append(filled[rank * size : (rank + 1) * size])
            rows[state] = torch.cat(pieces)
        part = {"zero_stage": 3, "optimizer_state_dict": optimizer(rows), "fp32_flat_groups": [rows["fp32"]]}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": part}, folder / f"{name}_optim_states.pt")
        torch.save({"param_shapes": [SHAPES], "dp_world_size": processes}, folder / f"{name}_model_states.pt")
    return states


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("write", [zero_1_or_2, zero_3])
def test_the_parts_of_all_processes_become_whole_states(tmp_path, write, processes):
    root = tmp_path / "rate=1e-5+ema (2)"  # a run's name is free text, and DeepSpeed takes paths for patterns
    saved, target = root / "checkpoint", root / "target"
    (saved / "pytorch_model").mkdir(parents=True)
    (saved / "random_states_0.pkl").write_text("anything else")
    expected = write(saved / "pytorch_model", processes)
    regrouping.regroup(saved, target)
    assert (target / "random_states_0.pkl").read_text() == "anything else"
    folder = target / "pytorch_model" / "zero"
    for state, tensors in expected.items():
        for name, tensor in tensors.items():
            loaded = torch.load(folder / name / f"{state}.pt")
            loaded = loaded["param"] if write is zero_1_or_2 else loaded
            assert torch.equal(loaded.flatten(), tensor.flatten()), (state, name)
    # What every process reads whole must not grow with the model.
    common = torch.load(folder / "optimizer_state.pt", weights_only=False)
    assert common["param_groups"][0]["lr"] == 0.5 and "fp32_flat_groups" not in common
    if write is zero_3:
        assert common["optimizer_state_dict"]["state"] == {0: {"step": torch.tensor(7.0)}}
    else:
        assert "base_optimizer_state" not in common
        assert torch.load(folder / "a.weight" / "step.pt", weights_only=False) == 7


def test_deepspeed_is_told_before_it_prepares_the_models():
    settings = {"zero_optimization": {"stage": 1}, "checkpoint": {"tag_validation": "Fail"}}
    plugin = SimpleNamespace(deepspeed_config=settings)
    regrouping.read_universal(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    assert settings["checkpoint"] == {"tag_validation": "Fail", "load_universal": True}


@pytest.mark.parametrize("part", ["every file", "the end of one"])
def test_a_full_disk_is_one_line(tmp_path, part):
    (folder := tmp_path / "checkpoint" / "pytorch_model").mkdir(parents=True)
    zero_1_or_2(folder, 2)
    regrouping.regroup(tmp_path / "checkpoint", roomy := tmp_path / "roomy")
    largest = max(path.stat().st_size for path in roomy.rglob("*.pt"))
    target = tmp_path / "target"
    with raises_key(target, "experiment.resume=auto"), largest_file(600 if part == "every file" else largest - 1):
        with checkpoint.writing(target, target):
            regrouping.regroup(tmp_path / "checkpoint", target)
    assert not target.exists()

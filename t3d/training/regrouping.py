"""ZeRO checkpoints for another number of processes, by way of DeepSpeed's universal checkpoints.

A ZeRO checkpoint holds one part of the optimizer's state for each process that saved it. DeepSpeed's converter
(deepspeed/checkpoint/ds_to_universal.py) joins them into one file for every weight and state, and with
``checkpoint.load_universal`` each process reads its own part out of those, however many there are.
"""

import contextlib
import io
import os
from argparse import Namespace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import MODEL_NAME

from t3d.training.distribution import zero_stage


def read_universal(accelerator: Accelerator) -> None:
    """Tell DeepSpeed, before accelerate prepares the models, that a universal checkpoint will be loaded."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}


def regroup(path: Path, target: Path) -> None:
    """Make ``target``, a folder that does not depend on the number of processes, of a ZeRO checkpoint.

    Weights and states are converted, one saved part in memory at a time; everything else is linked. On the disk it
    takes 24 bytes a trained weight while it is made and 12 when it is there.
    """
    from deepspeed.checkpoint import ds_to_universal

    path, target = path.resolve(), target.resolve()
    target.mkdir()
    for entry in path.iterdir():
        if entry.name != MODEL_NAME:
            (target / entry.name).symlink_to(entry.resolve())
    settings = Namespace(
        # The converter takes these for patterns; the folders' own names, seen from beside them, hold nothing special.
        input_folder=os.path.relpath(path / MODEL_NAME, path.parent),
        output_folder=os.path.relpath(target / MODEL_NAME, path.parent),
        num_extract_workers=1,  # in this process: what is killed with it writes on nowhere
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # names and layouts of tensor parallelism: there is none
    )
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with contextlib.chdir(path.parent), silent[0], silent[1]:
        ds_to_universal.main(settings)
    _thin_out(target / MODEL_NAME / "zero" / "optimizer_state.pt")


def _thin_out(file: Path) -> None:
    """Of ZeRO-3 the converter leaves the first part's states in what is common, and every process would read them."""
    common = torch.load(file, map_location="cpu", weights_only=False)
    if common.pop("fp32_flat_groups", None):
        for states in common["optimizer_state_dict"]["state"].values():
            del states["exp_avg"], states["exp_avg_sq"]
        torch.save(common, file)


def load(accelerator: Accelerator, folder: Path) -> None:
    """Load what ``regroup`` has made into what accelerate has prepared; all processes call it."""
    accelerator.load_state(str(folder))
    if zero_stage(accelerator) < 3:
        # DeepSpeed reads only what is trained from a universal checkpoint: a LoRA reference is not. ZeRO-3 trains all.
        file = folder / MODEL_NAME / "mp_rank_00_model_states.pt"
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        accelerator.deepspeed_engine_wrapped.engine.module.load_state_dict(saved["module"])

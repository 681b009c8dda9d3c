"""The documentation's commands in small: `docs_shims.py NAME ARGUMENT ...` runs a command with a few more arguments.

tests/test_docs_commands.py puts these names first on the PATH of a page's shell. A command is the one that the page
prints. Its steps, questions and tokens are limited by settings after its own, so that they win. `accelerate launch`
gets two CPU processes in place of its GPUs, and Slurm's commands act as two machines at 127.0.0.1.
"""

import os
import signal
import subprocess
import sys

DECODE = ["evaluation.limit=8", "rollout.max_token=64", "rollout.num_processes=1"]
SMALL = {
    "rollout": DECODE,
    "eval": DECODE,
    "train": [
        "training.max_steps=2",
        "training.batch_size_lm=16",
        "training.gradient_accumulation_steps=1",
        "training.mixed_precision=no",
        "training.max_gen_length=100",
        "lr_scheduler.params.warmup_steps=1",
    ],
    "play": ["--port", "0"],
}
STAGES = {"sample/sdar_sample.py": "rollout", "train/self_ddo_sdar_full.py": "train", "eval.py": "eval"}
CPUS = "accelerate_configs/2_cpu_processes.yaml"


def t3d(command: str, *arguments: str) -> int:
    line = [sys.executable, "-m", "t3d", command, *arguments, *SMALL.get(command, [])]
    return until_it_listens(line) if command == "play" else subprocess.call(line)


def until_it_listens(line: list[str]) -> int:
    """Start a server, wait for the address that it prints, and press Ctrl-C."""
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        said = server.stdout.readline()
        server.send_signal(signal.SIGINT)
    return server.returncode or int("http://127.0.0.1:" not in said)


def python(*arguments: str) -> int:
    return subprocess.call([sys.executable, *arguments, *SMALL.get(STAGES.get(arguments[0], ""), [])])


def accelerate(launch: str, *arguments: str) -> int:
    at = next(i for i, argument in enumerate(arguments) if argument.endswith(".py"))
    cpus = ["--config_file", CPUS, "--num_processes", "2", "--main_process_port", os.environ["FREE_PORT"]]
    line = [*arguments[:at], *cpus, *arguments[at:], *SMALL[STAGES[arguments[at]]]]
    return subprocess.call([sys.executable, "-m", f"accelerate.commands.{launch}", *line])


def scontrol(*arguments: str) -> int:
    assert arguments[:2] == ("show", "hostnames")
    return print("127.0.0.1\n127.0.0.1") or 0


def srun(*arguments: str) -> int:
    """The command on two machines at once."""
    nodes = [subprocess.Popen(arguments, env={**os.environ, "SLURM_NODEID": str(node)}) for node in (0, 1)]
    return max(node.wait() for node in nodes)


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    sys.exit({"t3d": t3d, "python": python, "accelerate": accelerate, "scontrol": scontrol, "srun": srun}[name](*rest))

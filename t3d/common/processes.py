"""The processes of a launch, read from the environment that ``accelerate launch`` sets."""

import os


def is_main_process() -> bool:
    """Whether this process writes files and prints. It is the first process of the launch, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0

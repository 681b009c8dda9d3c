"""The processes of a launch, as the environment of ``accelerate launch`` names them."""

import os


def is_main_process() -> bool:
    """Whether this process writes files and prints: the first of the launch, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0

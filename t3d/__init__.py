"""T3D: few-step diffusion language models by trajectory self-distillation (arXiv 2602.12262)."""

import sys
from itertools import pairwise
from pathlib import Path

__version__ = "0.2.0"


def _refuse_a_module_without_command(name: str) -> None:
    """End ``python -m t3d.X`` where module X has no command. Python would run it in silence and end with 0."""
    file = Path(__file__).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    if name.startswith("t3d.") and file.is_file() and 'if __name__ == "__main__":' not in file.read_text("utf-8"):
        sys.exit(f"error: {name}: a part of the library without a command; t3d --help lists the commands")


if sys.argv[:1] == ["-m"]:  # Python says so while it looks for the module of `python -m`
    for flag, module in pairwise(sys.orig_argv):
        if flag == "-m":
            _refuse_a_module_without_command(module)

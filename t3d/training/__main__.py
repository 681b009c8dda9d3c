"""Stage 3, training: `t3d train`, `python -m t3d.training` or `python train/self_ddo_sdar_full.py`, with the same keys.

Several processes: `t3d train --launch FILE ...`, FILE an accelerate configuration. With --dry-run: print the plan, its
memory and the time of three steps, write nothing but the data cache, and stop.
"""

import sys
from collections.abc import Sequence

from t3d.common.errors import run_main
from t3d.common.options import load
from t3d.training.settings import TrainConfig

DRY_RUN = "--dry-run"


def main(argv: Sequence[str] | None = None) -> None:
    """Train as ``argv`` (None: the process's own arguments) says."""
    argv = sys.argv[1:] if argv is None else argv
    keys = [argument for argument in argv if argument != DRY_RUN]
    config = load(TrainConfig, keys, default="configs/ddo_sdar_full_self.yaml")
    from t3d.common.paths import setup_cache
    from t3d.training.loop import train

    setup_cache()
    train(config, dry_run=DRY_RUN in argv)


if __name__ == "__main__":
    run_main(main)

"""Stage 3, training: `t3d train`, `python -m t3d.training` or `python train/self_ddo_sdar_full.py`, with the same keys.

For several processes: `t3d train --launch FILE ...` with an accelerate configuration. --dry-run prints the plan, its
memory and the time of three steps, and stops. It writes only the data cache.
"""

import sys
from collections.abc import Sequence

from t3d.common.errors import run_main
from t3d.common.options import load

DRY_RUN = "--dry-run"


def main(argv: Sequence[str] | None = None) -> None:
    """Train. ``argv``: None = the process's own arguments."""
    from t3d.training.settings import TrainConfig  # loads torch, after run_main has set its threads' manners

    argv = sys.argv[1:] if argv is None else argv
    keys = [argument for argument in argv if argument != DRY_RUN]
    config = load(TrainConfig, keys, default="configs/ddo_sdar_full_self.yaml")
    from t3d.common.paths import setup_cache
    from t3d.training.loop import train

    setup_cache()
    train(config, dry_run=DRY_RUN in argv)


if __name__ == "__main__":
    run_main(main)

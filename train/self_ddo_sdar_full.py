"""Stage 3, T3D training: accelerate launch train/self_ddo_sdar_full.py config=configs/ddo_sdar_full_self.yaml ...

With --dry-run: print the plan, its memory and the time of three steps, write nothing but the data cache, and stop.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t3d.common.errors import run_main
from t3d.common.options import load
from t3d.training.settings import TrainConfig

DRY_RUN = "--dry-run"


def main() -> None:
    argv = [argument for argument in sys.argv[1:] if argument != DRY_RUN]
    config = load(TrainConfig, argv, default="configs/ddo_sdar_full_self.yaml")
    from t3d.common.paths import setup_cache
    from t3d.training.loop import train

    setup_cache()
    train(config, dry_run=DRY_RUN in sys.argv)


if __name__ == "__main__":
    run_main(main)

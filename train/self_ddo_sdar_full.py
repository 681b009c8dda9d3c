"""Stage 3, T3D training: accelerate launch train/self_ddo_sdar_full.py config=configs/ddo_sdar_full_self.yaml ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t3d.config import TrainConfig
from t3d.errors import run_main
from t3d.options import load


def main() -> None:
    config = load(TrainConfig, default="configs/ddo_sdar_full_self.yaml")
    from t3d.paths import setup_cache
    from t3d.training import train

    setup_cache()
    train(config)


if __name__ == "__main__":
    run_main(main)

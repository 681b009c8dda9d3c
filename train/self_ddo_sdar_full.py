"""Stage 3, T3D training: accelerate launch train/self_ddo_sdar_full.py config=configs/ddo_sdar_full_self.yaml ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from t3d.common.errors import run_main
from t3d.training.__main__ import main

if __name__ == "__main__":
    run_main(main)

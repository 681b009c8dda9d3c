"""Stage 1, rollouts: python sample/sdar_sample.py config=configs/sdar_sample.yaml evaluation.eval_dataset=..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from t3d.common.errors import run_main
from t3d.rollout.__main__ import main

if __name__ == "__main__":
    run_main(main)

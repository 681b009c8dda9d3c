"""Stage 4, score a checkpoint: python eval.py config=configs/eval.yaml evaluation.checkpoint_path=... rollout...."""

from t3d.common.errors import run_main
from t3d.evaluation.__main__ import main

if __name__ == "__main__":
    run_main(main)

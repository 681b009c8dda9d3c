"""Stage 1, rollouts: python sample/sdar_sample.py config=configs/sdar_sample.yaml evaluation.eval_dataset=..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t3d.common.errors import run_main
from t3d.common.options import load
from t3d.rollout.settings import SampleConfig


def main() -> None:
    config = load(SampleConfig, default="configs/sdar_sample.yaml")
    from t3d.common.paths import setup_cache
    from t3d.rollout.run import roll_out

    setup_cache()
    roll_out(config)


if __name__ == "__main__":
    run_main(main)

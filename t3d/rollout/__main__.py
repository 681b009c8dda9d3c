"""Stage 1, rollouts: `t3d rollout`, `python -m t3d.rollout` or `python sample/sdar_sample.py`, with the same keys."""

from collections.abc import Sequence

from t3d.common.errors import run_main
from t3d.common.options import load
from t3d.rollout.settings import SampleConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Roll out. ``argv``: None = the process's own arguments."""
    config = load(SampleConfig, argv, default="configs/sdar_sample.yaml")
    from t3d.common.paths import setup_cache
    from t3d.rollout.run import roll_out

    setup_cache()
    roll_out(config)


if __name__ == "__main__":
    run_main(main)

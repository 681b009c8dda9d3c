"""Stage 4, evaluation: `t3d eval`, `python -m t3d.evaluation` or `python eval.py`, with the same keys."""

from collections.abc import Sequence

from t3d.common.errors import run_main
from t3d.common.options import load
from t3d.evaluation.settings import EvalConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate. ``argv``: None = the process's own arguments."""
    config = load(EvalConfig, argv, default="configs/eval.yaml")
    from t3d.common.paths import setup_cache
    from t3d.evaluation.run import evaluate

    setup_cache()
    evaluate(config)


if __name__ == "__main__":
    run_main(main)

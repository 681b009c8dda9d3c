"""Score a checkpoint: python eval.py config=configs/eval.yaml evaluation.checkpoint_path=... rollout...."""

from t3d.common.errors import run_main
from t3d.common.options import load
from t3d.evaluation.settings import EvalConfig


def main() -> None:
    config = load(EvalConfig, default="configs/eval.yaml")
    from t3d.common.paths import setup_cache
    from t3d.evaluation.run import evaluate

    setup_cache()
    evaluate(config)


if __name__ == "__main__":
    run_main(main)

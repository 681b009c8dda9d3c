"""Score a checkpoint: python eval.py config=configs/eval.yaml evaluation.checkpoint_path=... rollout...."""

from t3d.config import EvalConfig
from t3d.errors import run_main
from t3d.options import load


def main() -> None:
    config = load(EvalConfig, default="configs/eval.yaml")
    from t3d.evaluation import evaluate
    from t3d.paths import setup_cache

    setup_cache()
    evaluate(config)


if __name__ == "__main__":
    run_main(main)

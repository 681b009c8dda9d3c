"""Figures of runs made by hand, for the tests of the page and of what it is made from."""

from collections.abc import Sequence

SPLITS = ("StoryMath_test", "StoryMath_long")
RANDOM = "rollout.random_init_ratio=0.1"
METHODS = {
    "original": "the teacher",
    "redi": "rectified",
    "redi, x_T all masks": "not rectified",
    "t3d": "DDO and path",
}
ABLATIONS = {"t3d, DDO alone": ""}
CONVERSION = {"autoregressive": "token by token", "opdlm": "soft targets"}
MADE_OF = {  # training config and overrides; rollouts and decoding where they differ
    "original": {"config": None},
    "redi": {"config": "redi.yaml", "rollouts": [RANDOM], "decoding": [RANDOM]},
    "t3d": {"config": "train.yaml"},
    "t3d, DDO alone": {"config": "train.yaml", "training": ["training.lambda_path=0"]},
}


def run(method: str, seed: int, accuracies: Sequence[float], block: int = 4, fast: float = 2.0, **more) -> dict:
    """accuracies at 1, 2, 4, ... tokens per step; on the harder split half of them; +- .02 as every row's interval."""

    def row(split: str, strategy: str, speed: float, accuracy: float) -> dict:
        ends = {"ci_low": accuracy - 0.02, "ci_high": accuracy + 0.02}
        speeds = {"measured_tokens_per_step": fast, "tokens_per_forward": fast / 2, "mean_length": 40.0}
        where = {"dataset": split, "strategy": f"low_confidence_{strategy}", "tokens_per_step": speed, "n": 100}
        return where | {"accuracy": accuracy} | ends | speeds

    rows = [
        row(split, "static", 2.0**k, factor * accuracy)
        for split, factor in zip(SPLITS, (1.0, 0.5), strict=True)
        for k, accuracy in enumerate(accuracies)
    ]
    rows.append(row(SPLITS[0], "dynamic", 1.0, accuracies[0]))
    told = {"method": method, "block_size": block, "seed": seed, "training": [], "rollouts": [], "decoding": []}
    told |= MADE_OF.get(method, {"config": f"{method}.yaml"})
    budget = {"steps": 600, "questions": 4000, "learning_rate": 0.0005} if told["config"] else {}
    return told | budget | {"problems": None, "rows": rows} | more


# Three seeds of everything at block 4 but one of T3D's; one seed at block 8.
RUNS = [
    run("original", 1, (0.90, 0.60, 0.20), fast=1.5),
    run("original", 2, (0.90, 0.70, 0.30), fast=1.5),
    run("original", 3, (0.90, 0.65, 0.25), fast=1.5),
    run("redi", 1, (0.10, 0.10, 0.10)),
    run("redi", 2, (0.10, 0.10, 0.10)),
    run("redi", 3, (0.10, 0.10, 0.10)),
    run("t3d", 1, (0.90, 0.80, 0.60), fast=3.0, tokens=1_000_000),
    run("t3d", 3, (0.80, 0.90, 0.70), fast=2.0, tokens=1_500_000),
    run("t3d, DDO alone", 1, (0.50, 0.40, 0.30)),
    run("t3d, DDO alone", 3, (0.50, 0.60, 0.50)),
    run("original", 1, (0.90, 0.60, 0.30, 0.10), block=8),
    run("t3d", 1, (0.88, 0.80, 0.60, 0.40), block=8),
]

"""Write the study's instructions: data sets of the kind `text`, without answers.

    python -m studies.smollm.instructions --data DIR

It fills every form with every topic of instructions.yaml. The frozen seed gives the order, so that the first N rows are
a fair sample.
"""

import argparse
import json
import random
from pathlib import Path

import yaml

from t3d.common.errors import run_main
from t3d.common.jsonfiles import atomic_write

SEED = 14


def build() -> dict[str, list[dict[str, str]]]:
    """The rows of both sets: `instructions_train` and `instructions_held_out`."""
    lists = yaml.safe_load(Path(__file__).with_name("instructions.yaml").read_text())
    sets = {}
    for name, parts in lists.items():
        rows = [{"question": form.format(topic=topic)} for topic in parts["topics"] for form in parts["forms"]]
        random.Random(SEED).shuffle(rows)
        sets[f"instructions_{name}"] = rows
    return sets


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two files")
    args = parser.parse_args()
    for name, rows in build().items():
        with atomic_write(args.data / f"{name}.json") as file:
            file.write(json.dumps(rows, indent=0))
        print(f"{args.data / name}.json: {len(rows)} instructions")


if __name__ == "__main__":
    run_main(main)

"""The frame of a part: ``python -m studies.gpu.<part> --device cuda --rows FILE`` appends its rows to the file."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def run(rows: Callable[[str], Iterator[Row]]) -> None:
    """Write every row of ``rows(device)`` as soon as it is there, so that a part that is stopped keeps the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=Path, required=True)
    args = parser.parse_args()
    with args.rows.open("a") as file:
        for row in rows(args.device):
            file.write(json.dumps(row) + "\n")
            file.flush()


def attempt(case: str, work: Callable[[], list[Row]]) -> list[Row]:
    """The rows of one case; of one that fails, a row with the error. The next case runs all the same."""
    try:
        return work()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [{"case": case, "metric": "failed", "value": reason[:200], "baseline": None, "ratio": None}]

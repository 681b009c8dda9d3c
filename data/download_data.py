#!/usr/bin/env python3
"""Bring a question set to data/<name>.json, from the Hugging Face hub (Gen-Verse/<name>) or from a local file."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without installation

from t3d.common.errors import run_main  # noqa: E402
from t3d.common.paths import data_file, resolve  # noqa: E402
from t3d.tasks.download import SETS, check_questions, fetch_questions  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, choices=list(SETS), help="which set")
    parser.add_argument("--from", dest="source", metavar="FILE", help="copy a local JSON of this layout instead")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (default: data/<dataset>.json)")
    parser.add_argument("--sha256", metavar="SUM", help="accept the file with this checksum only")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    args = parser.parse_args()

    output, known = args.output or data_file(args.dataset), SETS[args.dataset]
    if output.exists() and not args.force:
        print(f"{output} is there already (--force replaces it)")
        found = check_questions(output, known.data_type)
    else:
        found = fetch_questions(args.dataset, output, args.source and resolve(args.source), args.sha256)
        print(f"{output} written")
    print(f"rows: {found.rows}\nfields: {', '.join(found.fields)}\nsha256: {found.sha256}")
    if known.sha256:
        same = "the copy" if found.sha256 == known.sha256 else "another copy than the one"
        print(f"{same} that this version was tested with")


if __name__ == "__main__":
    run_main(main)

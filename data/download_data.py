#!/usr/bin/env python3
"""Bring a question set to data/<name>.json, from the Hugging Face hub (Gen-Verse/<name>) or from a local file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from t3d.common.errors import run_main
from t3d.tasks.download import main

if __name__ == "__main__":
    run_main(main)

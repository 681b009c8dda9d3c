#!/usr/bin/env python3
"""Stage 2: check a model's rollouts and write data/<model>-<dataset>_renamed.json."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from t3d.common.errors import run_main
from t3d.rollout.prepare import main

if __name__ == "__main__":
    run_main(main)

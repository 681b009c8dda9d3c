"""Sphinx's configuration: `make docs` builds the site from the Markdown in docs/ and from the pages of pages.py."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import pages  # noqa: E402

from t3d import __version__  # noqa: E402

project, release = "T3D", __version__
extensions = ["myst_parser"]
root_doc = "contents"
exclude_patterns = ["site", "results"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page of results begins with its own levels
html_theme = "furo"
html_title = f"T3D {release}"


def setup(app) -> None:
    """Write the pages that come from the code."""
    for name, text in pages.pages().items():
        path = HERE.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")

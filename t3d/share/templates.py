"""The cards' templates: the ``*.md.j2`` files of this folder."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """A card from a template. A value that is missing is an error."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values).rstrip() + "\n"


def plain(value: Any) -> str:
    """A setting's value as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value)

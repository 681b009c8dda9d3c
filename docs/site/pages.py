"""The site's contents, and its pages that come from the code itself, so that they cannot be out of date."""

import contextlib
import inspect
import io
import textwrap
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from t3d.cli import COMMANDS
from t3d.common.options import keys_of

CONTENTS = {  # section of the site -> its pages below docs/, without .md
    "Start": ("index", "HOW_IT_WORKS"),
    "Tutorials": (
        "GUIDE",
        "QUESTIONS",
        "TUTORIAL",
        "OBJECTIVE",
        "REINFORCEMENT",
        "MACHINES",
        "EVALUATION",
        "ENGINES",
        "SHARING",
    ),
    "Guides": ("PLAYGROUND", "DECODING", "MODELS", "GPU", "SCALING", "PERFORMANCE", "HARNESS"),
    "Reference": ("reference/commands", "reference/settings", "reference/api"),
    "Outcomes": ("RESULTS", "STORYCODE", "SMOLLM", "FAQ", "LOG"),
}
# The commands with settings, their schemas, and the file whose values they take without config=FILE.
SCHEMAS = {
    "convert": ("t3d.models.convert:ConvertConfig", None),
    "rollout": ("t3d.rollout.settings:SampleConfig", "configs/sdar_sample.yaml"),
    "train": ("t3d.training.settings:TrainConfig", "configs/ddo_sdar_full_self.yaml"),
    "eval": ("t3d.evaluation.settings:EvalConfig", "configs/eval.yaml"),
    "analyse": ("t3d.evaluation.settings:AnalysisConfig", None),
}
MODULES = {  # the Python API: module -> its use
    "t3d.models.decoder": "Load a model for decoding",
    "t3d.tasks": "Word a question",
    "t3d.models.generation": "Generate",
    "t3d.decode.protocol": "Engines: requests in, trajectories out",
    "t3d.blocks.settings": "Decode settings",
    "t3d.data.trajectory": "The trajectory",
    "t3d.data.shards": "Read and write trajectories",
    "t3d.objectives.base": "Objectives",
    "t3d.blocks.strategy": "Unmasking strategies",
    "t3d.tasks.base": "Kinds of task",
    "t3d.evaluation.report": "Reports",
}


def pages() -> dict[str, str]:
    """Path below docs/ -> Markdown of every generated page."""
    return {
        "contents.md": contents_page(),
        "reference/settings.md": settings_page(),
        "reference/commands.md": commands_page(),
        "reference/api.md": api_page(),
    }


def contents_page() -> str:
    """The table of contents, which Sphinx starts from."""
    parts = ["# Contents", ""]
    for section, names in CONTENTS.items():
        parts += ["```{toctree}", f":caption: {section}", ":maxdepth: 1", "", *names, "```", ""]
    return "\n".join(parts)


def settings_page() -> str:
    """Every key of every command with settings."""
    parts = ["# Settings", ""]
    parts += ["A key is set in YAML, or on the command line by `section.key=value`.", ""]
    for command, (place, file) in SCHEMAS.items():
        parts += [f"## t3d {command}", ""]
        parts += [f"Without `config=FILE` the values of `{file}` replace these defaults.", ""] if file else []
        section = None
        for key in keys_of(named(place)):
            if (found := key.name.rpartition(".")[0]) != section:
                section = found
                parts += ["", f"### {command}: {section or 'top'}", ""]
                parts += ["| key | default | values | meaning |", "|---|---|---|---|"]
            default = f"`{cell(key.default)}`" if key.default else "must be given"
            parts.append(f"| `{key.name}` | {default} | {cell(key.values)} | {cell(key.help)} |")
        parts.append("")
    return "\n".join(parts) + "\n"


def commands_page() -> str:
    """The help of every command without settings, which has options instead."""
    parts = ["# Commands", ""]
    for command, (line, place) in COMMANDS.items():
        parts += [f"## t3d {command}", "", line, ""]
        if command in SCHEMAS:
            parts += [f"Its keys are on the page of [settings](settings.md#t3d-{command}).", ""]
        else:
            parts += ["```text", help_of(place).strip(), "```", ""]
    return "\n".join(parts)


def help_of(place: str) -> str:
    """What a command prints for --help."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        named(place)(["--help"])
    return out.getvalue()


def api_page() -> str:
    """The public names of the modules that a user's own code imports, with their docstrings as they are written."""
    parts = ["# Python API", ""]
    for module, use in MODULES.items():
        found = import_module(module)
        parts += [f"## {use}: `{module}`", "", *fenced(inspect.getdoc(found) or "")]
        for name, item in public(found):
            parts += [f"### `{name}`", "", *fenced(f"{name}{signature(item)}\n\n{inspect.getdoc(item) or ''}")]
            methods = [(n, m) for n, m in vars(item).items() if not n.startswith("_") and inspect.isfunction(m)]
            for method, function in methods if inspect.isclass(item) else []:
                text = f"{name}.{method}{signature(function)}\n\n{inspect.getdoc(function) or ''}"
                parts += fenced(text)
    return "\n".join(parts)


def public(module: Any) -> Iterator[tuple[str, Any]]:
    """The classes and functions that a module itself defines, without the private ones."""
    for name, item in vars(module).items():
        own = getattr(item, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isclass(item) or inspect.isfunction(item)):
            yield name, item


def signature(item: Any) -> str:
    """A callable's arguments; of a class those of its constructor."""
    try:
        text = str(inspect.signature(item))
    except ValueError:
        return ""
    return "\n".join(textwrap.wrap(text, 96, subsequent_indent="    ", break_long_words=False))


def fenced(text: str) -> list[str]:
    """A text as a block that is shown as it is."""
    return ["````text", text.strip(), "````", ""] if text.strip() else []


def named(place: str) -> Any:
    """The object module:name."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

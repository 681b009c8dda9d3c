"""MkDocs hooks: pages that come from the code itself, so that they cannot be out of date. `make docs` runs them."""

import contextlib
import io
from importlib import import_module
from typing import Any

from t3d.cli import COMMANDS
from t3d.common.options import keys_of

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


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' hook: add the generated pages."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> dict[str, str]:
    """Path below docs/ -> Markdown of every generated page."""
    return {
        "reference/settings.md": settings_page(),
        "reference/commands.md": commands_page(),
        "reference/api.md": api_page(),
    }


def settings_page() -> str:
    """Every key of every command with settings."""
    parts = ["# Settings", ""]
    parts += ["A key is set in YAML, or on the command line by `section.key=value`. The defaults are the code's own.", ""]
    for command, (place, file) in SCHEMAS.items():
        parts += [f"## t3d {command}", ""]
        parts += [f"Without `config=FILE` the values of `{file}` replace these defaults.", ""] if file else []
        section = None
        for key in keys_of(named(place)):
            if (found := key.name.rpartition(".")[0]) != section:
                section = found
                parts += ["", f"### {command}: {section or 'top'}", ""]
                parts += ["| key | default | values | meaning |", "|---|---|---|---|"]
            parts.append(f"| `{key.name}` | `{cell(key.default)}` | {cell(key.values)} | {cell(key.help)} |")
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
    """The modules that a user's own code imports; mkdocstrings fills in their docstrings."""
    return "# Python API\n\n" + "\n".join(f"## {use}\n\n::: {module}\n" for module, use in MODULES.items())


def named(place: str) -> Any:
    """The object module:name."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

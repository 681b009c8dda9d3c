"""The command `t3d`: one sub-command per stage. A stage is imported only when it is chosen, so that help is fast."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from t3d.common.errors import UserError, run_main

# name -> one line of help, module:function. The function takes the arguments after the name.
COMMANDS = {
    "download": ("Bring a question set to data/.", "t3d.tasks.download:main"),
    "convert": ("Make a block-diffusion model of an autoregressive one.", "t3d.models.convert:main"),
    "rollout": ("Stage 1: record how a model decodes a question set.", "t3d.rollout.__main__:main"),
    "prepare": ("Stage 2: check the rollouts and write the training file.", "t3d.rollout.prepare:main"),
    "train": ("Stage 3: train a student on the trajectories.", "t3d.training.__main__:main"),
    "eval": ("Stage 4: score a checkpoint on question sets.", "t3d.evaluation.__main__:main"),
    "report": ("Show results as tables, CSV or a page with plots; compare two.", "t3d.evaluation.report:main"),
    "analyse": ("Measure how dependent the tokens of one step are.", "t3d.evaluation.analysis:main"),
    "grade": ("Grade answers from a file.", "t3d.evaluation.grade:main"),
    "card": ("Write the card of a student or of a set of trajectories.", "t3d.share.card:main"),
    "push": ("Upload a student or a set of trajectories to the hub.", "t3d.share.push:main"),
    "export": ("Write a student's folder that loads without t3d.", "t3d.share.remote:main"),
    "play": ("Open a page that shows models answering side by side.", "t3d.cli.play:main"),
    "chat": ("Ask a model questions and watch it unmask its answers.", "t3d.cli.chat:main"),
}
LAUNCH, LAUNCHED = "--launch", ("rollout", "train", "eval")  # the commands that several processes can share


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the sub-command of ``argv`` and end with its exit code. None = the process's own arguments."""
    run_main(lambda: dispatch(sys.argv[1:] if argv is None else argv))


def dispatch(argv: Sequence[str]) -> int | None:
    """Print the help, or run a sub-command and return its exit code. Raises UserError for an unknown sub-command."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return None if argv else 2
    if argv[0] == "--version":
        from t3d import __version__

        print(f"t3d {__version__}")
        return None
    name, *arguments = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"t3d {name}: unknown sub-command; {remedy}", key=name)
    if LAUNCH in arguments:
        at = arguments.index(LAUNCH)
        if len(arguments) < at + 2 or name not in LAUNCHED:
            raise UserError(f"{LAUNCH}: write t3d {'|'.join(LAUNCHED)} {LAUNCH} FILE, an accelerate config", LAUNCH)
        from t3d.cli.launch import launch

        return launch(arguments[at + 1], name, arguments[:at] + arguments[at + 2 :])
    module, _, function = COMMANDS[name][1].partition(":")
    sys.argv = [f"t3d {name}", *arguments]  # the name of the program in the stage's own help
    return getattr(import_module(module), function)(arguments)


def help_text() -> str:
    """The usage, and one line per sub-command."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: t3d COMMAND [ARGUMENT ...]",
            "",
            "Few-step diffusion language models by trajectory self-distillation.",
            "",
            *(f"  {name:{width}}  {line}" for name, (line, _) in COMMANDS.items()),
            "",
            "t3d COMMAND --help explains a command's keys. Relative paths belong to the current folder.",
            "With several processes: t3d train --launch accelerate_configs/2_cpu_processes.yaml ...",
        ]
    )

"""Kinds of tasks, one file each (`math`, `option`, `code`, `text`), and how a kind is found by its name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from t3d.blocks.plugins import load_object
from t3d.common.errors import UserError
from t3d.data.prompts import render
from t3d.tasks.base import Answer, Grading, Row, Task
from t3d.tasks.code import Code
from t3d.tasks.math import Math
from t3d.tasks.option import Option
from t3d.tasks.text import Text

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TASKS", "Answer", "Grading", "Row", "Task", "find_task", "prompt", "prompt_ids", "recognise"]

TASKS: dict[str, Task] = {"math": Math(), "code": Code(), "option": Option(), "text": Text()}
HELP = f"kind of task: {', '.join(TASKS)}, or one of your own as my_module:MyTask"


def find_task(name: str, key: str = "evaluation.data_type") -> Task:
    """A kind of task by its name, or a user's own by ``my_package.my_module:MyTask``.

    Raises:
        UserError: there is none; ``key`` is the setting at fault.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" in name:
        try:
            found = load_object(name)
        except ValueError as error:
            raise UserError(f"{key}={name}: {error}", key) from error
        if not (isinstance(found, type) and issubclass(found, Task)):
            raise UserError(f"{key}={name}: not a class that inherits from t3d.tasks.Task; give one", key)
        return found()
    close = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"{key}={name}: must be one of {', '.join(TASKS)}, or my_module:MyTask{hint}", key)


def recognise(row: Row, where: str) -> str:
    """The name of a row's kind. Raises UserError if no kind recognises the row."""
    for name in ("code", *TASKS):  # code first: its rows may also have an answer
        if TASKS[name].recognises(row):
            return name
    needs = "; ".join(f"{name}: {', '.join(task.fields)}" for name, task in TASKS.items())
    raise UserError(
        f"evaluation.data_type=auto: {where} is of no known kind; set a kind ({needs})", "evaluation.data_type"
    )


def prompt_ids(
    task: Task, row: Row, tokenizer: Any, think: bool = False, earlier: Sequence[dict[str, str]] = ()
) -> list[int]:
    """The ids of a row's prompt, up to and including the opening of the assistant's turn.

    ``earlier``: the turns of a conversation before this one, {"role": ..., "content": ...}.
    """
    return render(task.turn(row, think), tokenizer, task.opening(row, think), earlier)


def prompt(question: str, tokenizer: Any, task: str = "math") -> Tensor:
    """A question as input of a model's ``generate``, worded as for rollouts and evaluation.

    Args:
        task: math, code, option, text or my_module:MyTask.

    Returns:
        (1, length) int64 token ids.

    Raises:
        UserError: an unknown task, or a tokenizer without a chat template.
    """
    import torch

    kind = find_task(task, "task")
    return torch.tensor([prompt_ids(kind, kind.row(question), tokenizer)])

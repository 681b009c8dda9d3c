"""Rewards of the answers of on-policy rounds.

- ``task``: 1 for a right answer, 0 for any other, by the grader of the kind of task. Programs run in the sandbox.
- ``agreement``: the same, with the answer of the data as the ground truth. The data are a teacher's own trajectories at
  full steps, so this needs no labels.
- ``module:function``: the user's own function of an Answer (t3d.tasks): its text and the question's row.

Grading happens in a thread of its own, while the decoder goes on.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from t3d.blocks.plugins import load_object
from t3d.common.errors import UserError, fault
from t3d.data.trajectory import Trajectory, split_id
from t3d.objectives.rewarded import RewardedRounds
from t3d.tasks import Answer, Grading, Row, Task, prompt_ids
from t3d.tasks.problems import load_problems

AT_ONCE = 128  # answers graded together, while the decoder goes on

Grade = Callable[[Sequence[Answer]], Sequence[float]]


@dataclass(frozen=True)
class Rewards:
    """Rewards answers.

    Attributes:
        grade: answers -> a reward each.
        row: the prompt's id and ids -> the question's row; None = the question has none, and its answers get 0.
        text: token ids -> text.
        cut_is_wrong: an answer without an end gets 0.
    """

    grade: Grade
    row: Callable[[str, Sequence[int]], Row | None]
    text: Callable[[Sequence[int]], str]
    cut_is_wrong: bool = True

    def __call__(self, answers: Sequence[Trajectory]) -> list[float]:
        """The rewards of the answers, in their order."""
        found = [0.0] * len(answers)
        asked = {index: row for index, answer in enumerate(answers) if (row := self._row(answer)) is not None}
        texts = [Answer(self.text(answers[i].response_ids[: answers[i].length]), row) for i, row in asked.items()]
        for index, reward in zip(asked, self.grade(texts) if texts else (), strict=True):
            found[index] = float(reward)
        return found

    def _row(self, answer: Trajectory) -> Row | None:
        if self.cut_is_wrong and answer.finish_reason == "length":
            return None
        return self.row(answer.id.rpartition("/")[0], answer.prompt_ids)

    def while_decoding(self, answers: Iterable[Trajectory]) -> Iterator[Trajectory]:
        """The answers with their rewards, in their order. Grading happens while ``answers`` decodes the next ones."""
        waiting: list[Trajectory] = []
        graded: list[tuple[list[Trajectory], Future[list[float]]]] = []
        with ThreadPoolExecutor(1) as thread:
            for answer in answers:
                waiting.append(answer)
                if len(waiting) == AT_ONCE:
                    graded.append((waiting, thread.submit(self, waiting)))
                    waiting = []
            graded.append((waiting, thread.submit(self, waiting)))
            for group, rewards in graded:
                for answer, reward in zip(group, rewards.result(), strict=True):
                    yield replace(answer, reward=reward)


def rewards_of(
    settings: RewardedRounds, task: Task, data_type: str, samples: Any, tokenizer: Any, share: int
) -> Rewards:
    """The rewards that a training's settings ask for.

    Args:
        samples: the training set, the first trajectory of each question: id, prompt_ids, response_ids, length.
        share: processes that grade on this machine at the same time.

    Raises:
        UserError: no such function, no ground truth, another question in its place, or programs without a sandbox.
    """

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    if settings.reward == "agreement":
        row = _agreeing(task, samples, text)
    else:
        row = _given(settings, task, data_type, samples, tokenizer)
    if ":" in settings.reward:
        grade = _own(settings.reward)
    else:
        grade = graded_by(task, settings.reward_unsandboxed, share)
    return Rewards(grade, row, text, settings.cut_is_wrong)


def graded_by(task: Task, unsandboxed: bool, share: int) -> Grade:
    """1 for a right answer, 0 for any other. ``share``: processes that grade on this machine at the same time.

    Raises:
        UserError: the kind of task has no grader, or grading would run programs without a sandbox.
    """
    if not task.graded:
        raise fault("training.reward", "task", "this kind of task has no grader; give a function of your own")
    how = Grading(workers=max(1, (os.cpu_count() or 1) // share), allow_unsandboxed=unsandboxed, progress=False)
    task.isolation(how)
    return lambda answers: [float(bool(verdict.correct)) for verdict in task.grade(answers, how)]


def _own(name: str) -> Grade:
    try:
        function = load_object(name)
    except ValueError as error:
        raise fault("training.reward", name, str(error)) from error
    if not callable(function):
        raise fault("training.reward", name, "is no function; write one, Answer -> float")

    def grade(answers: Sequence[Answer]) -> list[float]:
        found = [function(answer) for answer in answers]
        if wrong := [value for value in found if not isinstance(value, int | float) or not math.isfinite(value)]:
            raise fault("training.reward", name, f"gave {wrong[0]!r}; a reward is a finite number")
        return [float(value) for value in found]

    return grade


def _agreeing(task: Task, samples: Any, text: Callable[[Sequence[int]], str]) -> Callable[..., Row | None]:
    """Rows whose ground truth is the result of the data's answer to the question; None where it has no result."""
    if "ground_truth_answer" not in task.fields:
        raise fault("training.reward", "agreement", "answers of this kind of task have no result to agree on; use task")
    place = {name.rpartition("/")[0]: index for index, name in enumerate(samples["id"])}

    def row(prompt: str, _: Sequence[int]) -> Row | None:
        sample = samples[place[prompt]]
        result = task.extract(text(sample["response_ids"][: sample["length"]]), {})
        return None if result is None else {"question": "", "ground_truth_answer": result}

    return row


def _given(
    settings: RewardedRounds, task: Task, data_type: str, samples: Any, tokenizer: Any
) -> Callable[[str, Sequence[int]], Row | None]:
    """Rows of the question set. The first use of a row checks that it is the prompt's question."""
    name = settings.reward_data or split_id(samples[0]["id"])[0]
    try:
        problems: Mapping[int, Row] = {split_id(f"{p.id}/0")[1]: p.raw for p in load_problems(name, data_type)}
    except UserError as error:
        raise UserError(f"training.reward_data={settings.reward_data}: {error}", "training.reward_data") from error
    checked: set[str] = set()

    def row(prompt: str, ids: Sequence[int]) -> Row:
        found = problems.get(split_id(f"{prompt}/0")[1])
        if prompt not in checked:
            turns = [] if found is None else [prompt_ids(task, found, tokenizer, think) for think in (False, True)]
            if list(ids) not in turns:
                raise fault("training.reward_data", name, f"its row is not question {prompt}; give its question set")
            checked.add(prompt)
        assert found is not None
        return found

    return row

"""The data of the local tasks: word problems from the embedded generator, none of which its teacher was selected on."""

import random

from datasets import Dataset, DatasetDict

from studies.storymath.problems import generate
from t3d.tasks import TASKS

PROBLEMS = 12


def load(**_) -> DatasetDict:
    """Questions with their solutions, right and with another result at the end."""
    rng, rows = random.Random(2026), []
    for row in range(PROBLEMS):
        problem = generate(rng, 1 + row % 2)
        right = f"\\boxed{{{problem.answer}}}"
        wrong = problem.solution.replace(right, f"\\boxed{{{(int(problem.answer) + 7) % 90 + 1}}}")
        choices = [problem.solution, wrong] if row % 3 else [wrong, problem.solution]
        rows.append(
            {
                "prompt": TASKS["math"].turn({"question": problem.question}),
                "answer": problem.answer,
                "choices": choices,
                "label": choices.index(problem.solution),
                "text": f"{problem.question} {problem.solution}",
            }
        )
    return DatasetDict({"test": Dataset.from_list(rows)})

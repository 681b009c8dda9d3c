"""StoryMath: small word problems with worked solutions in freely varied wording.

Few-step decoding of language is hard, because many wordings are right and the tokens of one step are drawn
independently. A solution here is one chain of sums in phrases of different lengths. The question does not determine the
phrases. So a decoder that writes a block in one step mixes phrases, and its arithmetic goes wrong.

The generator and its splits are frozen: seeds and sizes below are part of the benchmark's definition.
"""

import random
from dataclasses import dataclass

# name -> (numbers of operations, largest operand, problems, seed). The harder split has three operations with larger
# operands than any training problem. Later splits avoid the questions of earlier ones, so the earlier splits do not
# depend on the later ones.
SPLITS = {
    "StoryMath_test": ((1, 2, 3), 30, 1000, 101),
    "StoryMath_val": ((1, 2, 3), 30, 500, 102),
    "StoryMath_long": ((3,), 40, 500, 106),
    "StoryMath_train": ((1, 2, 3), 30, 20000, 104),  # questions for rollouts
    "StoryMath_sft": ((1, 2, 3), 30, 200000, 105),  # the teacher's training set
}

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Ella")
THINGS = ("apples", "books", "coins", "cards", "shells", "stamps")

GAIN = ("{n} buys {k} more.", "{n} finds {k} more.", "Then {n} gets {k} more.", "A friend gives {n} {k} more.")
LOSS = ("{n} gives away {k}.", "{n} loses {k}.", "Then {n} sells {k}.", "A friend takes {k} from {n}.")
TIMES = ("Then {n} has {k} times as many.", "The number grows {k} times.")
START = ("{n} has {k} {t}.", "At first {n} has {k} {t}.", "There are {k} {t} in the box of {n}.")
ASK = ("How many {t} does {n} have now?", "How many {t} are there in the end?")

FIRST = ("First,", "To begin,", "To start with,", "We start:", "In the first step,", "At first")
NEXT = ("Then", "Next,", "After that,", "Now", "In the next step,", "And then we get")
SUM = {
    "+": ("{a} + {b} = {c}.", "{a} plus {b} is {c}.", "add {b} to {a} to get {c}.", "{a} and {b} make {c}."),
    "-": ("{a} - {b} = {c}.", "{a} minus {b} is {c}.", "take {b} from {a} to get {c}.", "{a} less {b} makes {c}."),
    "*": ("{a} * {b} = {c}.", "{a} times {b} is {c}.", "take {b} times {a} to get {c}.", "{b} times {a} makes {c}."),
}
LAST = ("The answer is", "So the answer is", "Therefore we have", "In the end there are", "The result:")


@dataclass(frozen=True)
class StoryProblem:
    """question, worked solution, final answer (an integer in 1..99 as text)."""

    question: str
    solution: str
    answer: str


def generate(rng: random.Random, operations: int, largest: int = 30) -> StoryProblem:
    """One problem with the given number of operations. Intermediate values lie in 1..99, operands in 2..largest."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    value = rng.randint(5, 60)
    told = [rng.choice(START).format(n=name, k=value, t=thing)]
    worked = []
    for step in range(operations):
        operator, operand, result = _operation(rng, value, largest)
        told.append(rng.choice({"+": GAIN, "-": LOSS, "*": TIMES}[operator]).format(n=name, k=operand))
        opening = rng.choice(FIRST if step == 0 else NEXT)
        worked.append(f"{opening} {rng.choice(SUM[operator]).format(a=value, b=operand, c=result)}")
        value = result
    told.append(rng.choice(ASK).format(n=name, t=thing))
    worked.append(f"{rng.choice(LAST)} \\boxed{{{value}}}.")
    return StoryProblem(" ".join(told), " ".join(worked), str(value))


def _operation(rng: random.Random, value: int, largest: int) -> tuple[str, int, int]:
    while True:
        operator = rng.choices("+-*", weights=(4, 4, 1))[0]
        operand = rng.randint(2, 3) if operator == "*" else rng.randint(2, largest)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
        if 1 <= result <= 99:
            return operator, operand, result


def build_splits(with_sft: bool = False) -> dict[str, list[dict]]:
    """The splits in the Gen-Verse row layout, with ``solution``. No question occurs twice, in one split or in two.

    Args:
        with_sft: add the teacher's large training set.
    """
    seen: set[str] = set()
    splits = {}
    for name, (operations, largest, size, seed) in SPLITS.items():
        if name == "StoryMath_sft" and not with_sft:
            continue
        rng = random.Random(seed)
        rows: list[dict] = []
        while len(rows) < size:
            problem = generate(rng, rng.choice(operations), largest)
            if problem.question not in seen:
                seen.add(problem.question)
                rows.append(
                    {
                        "question": problem.question,
                        "ground_truth_answer": problem.answer,
                        "solution": problem.solution,
                    }
                )
        splits[name] = rows
    return splits

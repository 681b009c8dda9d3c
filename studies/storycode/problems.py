"""StoryCode: short Python functions from worded requirements, graded by running them.

A requirement has many equivalent programs. They differ in names, in forms of an expression, in the order of operands,
in loops against comprehensions, in early returns against conditional expressions. The question does not determine the
form. So a decoder that writes a block in one step mixes forms, and the program goes wrong.

The generator and its splits are frozen: seeds and sizes below are part of the benchmark's definition.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from studies.storycode.programs import Branch, Chosen, Filter, function, pipeline, reduced
from studies.storycode.steps import CONDITIONS, COUNT, NUMBERS, REDUCTIONS, STARTS, TEXTS, Start, Step

# name -> (numbers of pieces, problems, seed). Later splits avoid the questions of earlier ones, so the earlier splits
# do not depend on the later ones.
SPLITS = {
    "StoryCode_test": ((1, 2, 3), 1000, 201),
    "StoryCode_val": ((1, 2, 3), 500, 202),
    "StoryCode_long": ((4,), 500, 203),
    "StoryCode_train": ((1, 2, 3), 20000, 204),  # questions for rollouts
    "StoryCode_sft": ((1, 2, 3), 64000, 205),  # the teacher's training set
}

ASK = (
    "Write a function f that takes {input}.",
    "Define a function f of {input}.",
    "Given {input}, write a function f.",
)
FIRST = ("First, {step}.", "{Step}.", "To start, {step}.")
NEXT = ("Then {step}.", "After that {step}.", "Next {step}.", "Now {step}.")
RETURN = ("Return the result.", "Return it.", "Give the result back.")
LENGTH = ("Return its length.", "Return how long it is.")
KEEP = ("keep those that are {condition}", "take only those that are {condition}")

OPENING = ("", "Here is the function:\n", "The code:\n", "This is one way to write it:\n")
NUMBER_NAMES = ("x", "n", "number", "value", "my_number", "the_value")
LIST_NAMES = ("xs", "numbers", "items", "my_list", "all_numbers")
TEXT_NAMES = ("s", "t", "text", "word", "my_text", "the_word")
RESULT_NAMES = ("r", "out", "result", "answer", "new_value", "my_result")
WORDS = ("Cherry Pie", "A", "", "Hello World", "xyZ", "stampCARDS", "tomato Soup", "Level", "abcdefGHIJKL")


@dataclass(frozen=True)
class CodeProblem:
    """question, one of the right answers, and the tests: assertions on f."""

    question: str
    solution: str
    tests: str


@dataclass(frozen=True)
class Requirement:
    """A function in words.

    given: its inputs in words. told: its pieces. end: the sentence that asks for the result. program: one of its
    programs. run: the function itself. inputs: of the tests.
    """

    given: str
    told: list[str]
    end: str
    program: str
    run: Callable[..., Any]
    inputs: list[tuple]


def generate(rng: random.Random, pieces: int) -> CodeProblem:
    """One problem with the given number of pieces."""
    kind = rng.choices((_number, _list, _text), weights=(5, 4, 2))[0]
    asked = kind(rng, pieces)
    steps = [rng.choice(NEXT if place else FIRST) for place in range(len(asked.told))]
    sentences = [
        sentence.format(step=told, Step=told[0].upper() + told[1:])
        for sentence, told in zip(steps, asked.told, strict=True)
    ]
    question = " ".join([rng.choice(ASK).format(input=asked.given), *sentences, asked.end])
    tests = [f"assert f({', '.join(map(repr, given))}) == {asked.run(*given)!r}" for given in asked.inputs]
    return CodeProblem(question, f"{rng.choice(OPENING)}```python\n{asked.program}\n```", "\n".join(tests))


def build_splits(with_sft: bool = False) -> dict[str, list[dict]]:
    """The splits in the row layout of MBPP, with ``solution``. No question occurs twice, in one split or in two.

    Args:
        with_sft: add the teacher's large training set.
    """
    seen: set[str] = set()
    splits = {}
    for name, (pieces, size, seed) in SPLITS.items():
        if name == "StoryCode_sft" and not with_sft:
            continue
        rng = random.Random(seed)
        rows: list[dict] = []
        while len(rows) < size:
            problem = generate(rng, rng.choice(pieces))
            if problem.question not in seen:
                seen.add(problem.question)
                row = {"question": problem.question, "test_method": "function", "test_list": [problem.tests]}
                rows.append(row | {"solution": problem.solution})
        splits[name] = rows
    return splits


def _number(rng: random.Random, pieces: int) -> Requirement:
    """One step after another from a number, or from the number that the first piece makes of two."""
    start: Start | None = rng.choice(STARTS) if pieces > 1 and rng.random() < 0.3 else None
    steps: list[Chosen | Branch] = list(_steps(rng, NUMBERS, pieces - bool(start)))
    if rng.random() < 0.3:
        steps[rng.randrange(len(steps))] = Branch(_filter(rng), *_steps(rng, NUMBERS, 2))
    told = [step.told(rng, "it") for step in steps]
    a, b, r = _names(rng, NUMBER_NAMES, NUMBER_NAMES, RESULT_NAMES)

    def run(*given: int) -> int:
        return _through(steps, start.run(*given) if start else given[0])

    if start is None:
        program = function([a], pipeline(rng, steps, a, r))
        inputs: list[tuple] = [(value,) for value in rng.sample(range(-15, 40), 10)]
        return Requirement("a number", told, rng.choice(RETURN), program, run, inputs)
    first = f"{r} = {rng.choice(start.forms).format(a=a, b=b)}"
    program = function([a, b], [first, *pipeline(rng, steps, r, a)])
    inputs = [(rng.randint(-9, 20), rng.randint(-9, 20)) for _ in range(8)]
    return Requirement("two numbers", [rng.choice(start.told), *told], rng.choice(RETURN), program, run, inputs)


def _text(rng: random.Random, pieces: int) -> Requirement:
    """One step after another from a text; then perhaps its length."""
    length = pieces > 1 and rng.random() < 0.2
    steps = _steps(rng, TEXTS, pieces - length, largest=5)
    told = [step.told(rng, "it") for step in steps]
    s, r = _names(rng, TEXT_NAMES, RESULT_NAMES)
    program = function([s], pipeline(rng, steps, s, r, "len" if length else ""))

    def run(given: str) -> str | int:
        made = _through(steps, given)
        return len(made) if length else made

    inputs = [(word,) for word in rng.sample(WORDS, 7)]
    return Requirement("a text", told, rng.choice(LENGTH if length else RETURN), program, run, inputs)


def _list(rng: random.Random, pieces: int) -> Requirement:
    """Some numbers of a list are kept, each is changed, the rest is reduced."""
    end = rng.choice(REDUCTIONS if pieces > 1 else (*REDUCTIONS, COUNT))
    keep = _filter(rng) if end is COUNT or rng.random() < 0.6 else None
    steps = _steps(rng, NUMBERS, pieces - (keep is not None))
    told = [rng.choice(KEEP).format(condition=keep.told(rng))] if keep else []
    told += [step.told(rng, "each") for step in steps]
    names = _names(rng, LIST_NAMES, NUMBER_NAMES, RESULT_NAMES)
    program = function(names[:1], reduced(rng, keep, steps, end, names))

    def run(given: Sequence[int]) -> Any:
        return end.run([_through(steps, v) for v in given if keep is None or keep.holds(v)])

    inputs = [([rng.randint(-9, 20) for _ in range(size)],) for size in (0, 3, 5, 5, 6, 6)]
    return Requirement("a list of numbers", told, rng.choice(end.told), program, run, inputs)


def _filter(rng: random.Random) -> Filter:
    return Filter(rng.choice(CONDITIONS), rng.randint(2, 9))


def _steps(rng: random.Random, among: Sequence[Step], number: int, largest: int = 9) -> list[Chosen]:
    """Steps of which no two neighbours are the same piece."""
    found: list[Chosen] = []
    while len(found) < number:
        piece = rng.choice(among)
        if not found or found[-1].piece is not piece:
            found.append(Chosen(piece, rng.randint(2, largest)))
    return found


def _through(steps: Sequence[Chosen | Branch], value: Any) -> Any:
    for step in steps:
        value = step.value(value)
    return value


def _names(rng: random.Random, *among: Sequence[str]) -> list[str]:
    """A name from each, all different."""
    found: list[str] = []
    for names in among:
        found.append(rng.choice([name for name in names if name not in found]))
    return found

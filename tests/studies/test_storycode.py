"""StoryCode: its questions, programs, tests and tokenizer."""

import json
import random
import re
from itertools import product

import pytest

from studies.domains import DOMAINS
from studies.storycode.problems import SPLITS, generate
from studies.storycode.programs import Branch, Chosen, Filter, function, pipeline
from studies.storycode.steps import CONDITIONS, COUNT, NUMBERS, REDUCTIONS, STARTS, TEXTS
from studies.storycode.tokenizer import build_tokenizer
from t3d.common.options import load
from t3d.evaluation.run import evaluate
from t3d.evaluation.settings import EvalConfig
from t3d.tasks import Grading, find_task
from t3d.tasks.base import Answer

VALUES = [-7, -6, -1, 0, 1, 2, 5, 9, 12]
CODE = re.compile(r"```python\n(.*?)\n```", re.DOTALL)


def problems(number, seed=5):
    rng = random.Random(seed)
    return [generate(rng, rng.choice((1, 2, 3, 4))) for _ in range(number)]


def run(code):
    names: dict = {}
    exec(code, names)
    return names["f"]


@pytest.mark.parametrize(
    "step, inputs", [(s, VALUES) for s in NUMBERS] + [(s, ["", "Ab", "lEvel", "x y"]) for s in TEXTS]
)
def test_every_form_of_a_step_has_its_value(step, inputs):
    for v, k in product(inputs, (2, 5, 9)):
        expected = step.run(v, k)
        assert [eval(form.format(v="v", k=k), {"v": v}) for form in step.forms] == [expected] * len(step.forms)
        for change in step.changes:
            assert (
                run(
                    "def f(v):\n"
                    + "\n".join("    " + line for line in change.format(v="v", k=k).split("\n"))
                    + "\n    return v"
                )(v)
                == expected
            )


def test_every_form_of_a_condition_a_start_and_a_reduction_has_its_value():
    for (v, k), condition in product(product(VALUES, (2, 5, 9)), CONDITIONS):
        for forms, expected in ((condition.yes, True), (condition.no, False)):
            for form in forms:
                assert bool(eval(form.format(v="v", k=k), {"v": v})) == (condition.run(v, k) == expected), form
    for (a, b), start in product(product(VALUES, VALUES), STARTS):
        assert {eval(form.format(a="a", b="b"), {"a": a, "b": b}) for form in start.forms} == {start.run(a, b)}
    for end in (*REDUCTIONS, COUNT):
        given = [3, -2, 8, 1]
        for form in (*end.whole, *end.named):
            assert eval(form.format(g="x for x in r", r="r"), {"r": given}) == end.run(given)
        for grow, done in product(end.grow, end.done):
            lines = [
                f"r = {end.first}",
                "for x in xs:",
                "    " + grow.format(r="r", e="x"),
                f"return {done.format(r='r')}",
            ]
            assert run(function(["xs"], lines))(given) == end.run(given)


def test_every_program_is_right():
    """The tests run here on the reference programs, and below in the sandbox."""
    for problem in problems(3000):
        exec(CODE.search(problem.solution)[1] + "\n" + problem.tests, {})


def test_a_branch_is_one_piece_for_the_steps_around_it():
    """Conditional expressions do not swallow each other, and a value on the way is bound before a branch reads it."""
    cap, above = next(step for step in NUMBERS if step.run(99, 3) == 3), CONDITIONS[4]
    branch = Branch(Filter(above, 5), Chosen(cap, 7), Chosen(NUMBERS[0], 2))
    rng = random.Random(0)
    for _ in range(300):
        f = run(function(["x"], pipeline(rng, [Chosen(NUMBERS[0], 3), branch, Chosen(cap, 6)], "x", "r")))
        assert [f(v) for v in VALUES] == [min(branch.value(v + 3), 6) for v in VALUES]


def test_the_sandbox_grades_it():
    """Reference programs pass; the same programs for another requirement fail."""
    rows = [{"question": p.question, "test_method": "function", "test_list": [p.tests]} for p in problems(12)]
    texts, task = [p.solution for p in problems(12)], find_task("code")
    for row in rows:
        task.check_row(row, "row")
    right = task.grade([Answer(text, row) for text, row in zip(texts, rows, strict=True)], Grading(workers=2))
    assert [verdict.reason for verdict in right] == ["correct"] * 12
    others = [Answer(text, row) for text, row in zip(texts[1:], rows, strict=False)]
    assert not any(verdict.correct for verdict in task.grade(others, Grading(workers=2)))


POOLS = (VALUES, list(product(VALUES, VALUES)), [VALUES, VALUES[::-1], [4, 4]], ["abCdefg", "Xy", "hello You There"])


def values(f):
    """The values of a function on inputs of every kind; None where it takes another kind."""
    found = []
    for inputs in POOLS:
        try:
            found.append([f(*given) if inputs is POOLS[1] else f(given) for given in inputs])
        except (TypeError, AttributeError):
            found.append(None)
    return found


def test_the_tests_tell_requirements_apart():
    """A program that passes the tests of another requirement has the same values as its program."""
    some = problems(150)
    functions = [run(CODE.search(problem.solution)[1]) for problem in some]
    every, passed = [values(f) for f in functions], 0
    for (one, f), (other, problem) in product(enumerate(functions), enumerate(some)):
        try:
            exec(problem.tests, {"f": f})
        except Exception:  # noqa: S112, BLE001 - any failure is a failed test
            continue
        passed += 1
        assert any(mine is not None and mine == its for mine, its in zip(every[one], every[other], strict=True))
    assert passed >= len(some)


def test_a_requirement_has_many_programs():
    rng = random.Random(1)
    steps = [Chosen(NUMBERS[3], 2), Chosen(NUMBERS[0], 3)]
    assert len({"\n".join(pipeline(rng, steps, "x", "r")) for _ in range(500)}) > 30


def test_wordings():
    """Sentences begin with a capital, end with a full stop, and have no gaps; an article fits its word."""
    for problem in problems(2000):
        question = problem.question
        assert re.fullmatch(r"([A-Z][A-Za-z0-9, -]*\.)( [A-Z][A-Za-z0-9, -]*\.)*", question), question
        assert not re.search(r" ,|,,|  |\ba [aeiou]|\ban [^aeiou]|, ,", question), question
        assert len(question.split()) < 60


@pytest.fixture(scope="module")
def splits():
    return DOMAINS["StoryCode"].build_splits()


def test_splits_are_disjoint_and_deterministic(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {
        name: size for name, (_, size, _) in SPLITS.items() if name != "StoryCode_sft"
    }
    questions = [row["question"] for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)
    assert DOMAINS["StoryCode"].build_splits()["StoryCode_test"] == splits["StoryCode_test"]


def test_the_tokenizer_keeps_every_text():
    tokenizer = build_tokenizer()
    task = find_task("code")
    for problem in problems(1000, seed=8):
        turn = task.turn({"question": problem.question, "test_method": "function"})
        for text in (turn, problem.solution):
            ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
        assert len(tokenizer.encode(problem.solution)) <= 96


def test_the_shipped_teacher_writes_programs(splits, tmp_path):
    """At one token per step most of its programs pass, at four tokens hardly any (the LOG has the exact figures)."""
    (tmp_path / "StoryCode_val.json").write_text(json.dumps(splits["StoryCode_val"][:40]))
    line = ["config=configs/demo/eval.yaml", "evaluation.data_type=code", f"experiment.project={tmp_path}"]
    line += ["evaluation.checkpoint_path=models/storycode-teacher"]
    line += [f"evaluation.eval_dataset={tmp_path / 'StoryCode_val.json'}"]
    slow, fast = (
        json.loads(evaluate(load(EvalConfig, [*line, f"rollout.denoising_steps_per_block={steps}"])).read_text())[0]
        for steps in (4, 1)
    )
    assert slow["accuracy"] > 0.7 and fast["accuracy"] < 0.2 and slow["method"] == "original"

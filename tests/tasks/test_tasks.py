"""Each kind of task: its wording to the letter, its opening, its extraction and its grading."""

import random
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import t3d.models  # noqa: F401 - registers the architecture
from studies.storymath.problems import generate
from t3d.common.paths import ROOT
from t3d.data.prompts import render
from t3d.grading.math import extract_answer
from t3d.tasks import TASKS, Answer, Grading, find_task, prompt, prompt_ids
from t3d.tasks.problems import load_problems
from tests.conftest import raises_key


def turn(kind: str, think: bool = False, **row) -> str:
    return TASKS[kind].turn({"question": "What is {x}?", **row}, think)


def test_wordings():
    assert turn("math") == "What is {x}?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert turn("math", think=True) == (
        "You need to put your final answer in \\boxed{}. This is the problem:\nWhat is {x}?"
    )
    assert turn("code", test_method="stdio") == (
        "This is the problem:\nWhat is {x}?\nYou should put your code in ```python ```. "
        "Use input() to read input and print() to produce output in your script. "
    )
    assert turn("code", test_method="function") == (
        "This is the problem:\nWhat is {x}?\nPlace your code within a single Python code block ```python ```. "
        "Do not include more than one code block. "
    )
    assert turn("option") == (
        "This is the problem:\nWhat is {x}?\nYou need to think step by step and put the final option "
        "(A, B, C, or D only—no other character) in \\boxed{}. "
    )
    assert turn("text") == "What is {x}?"
    with raises_key("test_method"):
        turn("code")


def test_how_an_answer_opens():
    function = {"test_method": "function", "prefix": "def f"}
    assert TASKS["code"].opening(function) == "def f"
    assert TASKS["code"].opening(function, think=True) == "def f", "the answer has begun: no thoughts before it"
    assert TASKS["code"].opening({"test_method": "stdio", "prefix": "not for scripts"}) == ""
    for kind in TASKS:
        assert (TASKS[kind].opening({}), TASKS[kind].opening({}, think=True)) == ("", "<think>\n")


FUNCTION = {"test_method": "function", "prefix": "```python\ndef f():\n", "test_list": ["f()"]}


@pytest.mark.parametrize(
    ("kind", "text", "row", "answer"),
    [
        ("math", "so \\boxed{1}, no: \\boxed{12}", {}, "12"),
        ("math", "12", {}, None),
        ("option", "\\boxed{(b)}", {}, "B"),
        ("option", "\\boxed{Paris}", {}, None),
        ("code", "    return 1\n```", FUNCTION, "def f():\n    return 1\n"),
        ("code", "```python\nx\n```", {"test_method": "stdio"}, "x\n"),
        ("text", "Any words.", {}, "Any words."),
    ],
)
def test_extraction(kind, text, row, answer):
    assert TASKS[kind].extract(text, row) == answer


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("math", "\\boxed{C.}", "wrong"),
        ("option", "\\boxed{C}", "correct"),
        ("option", "\\boxed{c}", "correct"),
        ("option", "\\boxed{C. Paris}", "correct"),
        ("option", "\\boxed{\\text{(C)}}", "correct"),
        ("option", "\\boxed{D}", "wrong"),
        ("option", "C", "no_answer"),
        ("text", "\\boxed{C}", "ungraded"),
    ],
)
def test_grading(kind, text, reason):
    truth = "C_8" if kind == "math" else "C"
    (verdict,) = TASKS[kind].grade([Answer(text, {"ground_truth_answer": truth})], Grading())
    assert verdict.reason == reason
    assert verdict.correct == {"correct": True, "ungraded": None}.get(reason, False)


def test_a_kind_is_found_by_its_name_or_named_as_missing():
    assert find_task("math") is TASKS["math"]
    for name in ("maths", "no_such_module:Toy", "t3d.tasks.math:NoSuch", "t3d.tasks.math:_TURN"):
        with raises_key("dataset.data_type", f"dataset.data_type={name}"):
            find_task(name, "dataset.data_type")


def test_a_kind_whose_module_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "broken_kind.py").write_text("raise RuntimeError('first line\\nsecond line')\n")
    with raises_key("evaluation.data_type") as error:
        find_task("broken_kind:Kind")
    assert "first line" in str(error.value) and "\n" not in str(error.value)


def test_the_real_tokenizers_prompts(sdar):
    ids = prompt("1+1?", sdar)
    instruction = "Please reason step by step, and put your final answer within \\boxed{}."
    assert sdar.decode(ids[0]) == f"<|im_start|>user\n1+1?\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
    row = {"question": "q"}
    assert sdar.decode(prompt_ids(TASKS["math"], row, sdar, think=True)).endswith("assistant\n<think>\n")
    assert prompt("q", sdar, "text")[0].tolist() == render("q", sdar)


@pytest.mark.parametrize("name", ["HumanEval", "MBPP"])
def test_every_real_code_row_renders(sdar, shared, name):
    for problem in load_problems(shared / "data" / f"{name}.json", "code"):
        asked = (
            f"<|im_start|>user\nThis is the problem:\n{problem.question}\nPlace your code within a single Python code "
            "block ```python ```. Do not include more than one code block. <|im_end|>\n<|im_start|>assistant\n"
        )
        assert sdar.decode(prompt_ids(TASKS["code"], problem.raw, sdar)) == asked + problem.raw["prefix"]


def test_the_example_of_the_readme():
    """From a question to an answer by `prompt` and `generate`, as printed there.

    With all denoising steps the teacher is right; without the instruction of `prompt` it would be on 2 of 40.
    """
    folder, rng = str(ROOT / "models" / "embedded-teacher"), random.Random(5)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for problem in (generate(rng, 1 + i % 2) for i in range(40)):
        input_ids = prompt(problem.question, tokenizer)
        output = model.generate(input_ids, max_new_tokens=96)
        answer = tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
        right += extract_answer(answer) == problem.answer
    assert right >= 36

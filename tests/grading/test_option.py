import pytest

from t3d.grading import Verdict
from t3d.grading.option import REASONS, extract_answer, grade_all, letter

NAMES_C = [
    "C",
    "c",
    "(C)",
    "C.",
    "C)",
    "C:",
    "[C]",
    " C ",
    "$C$",
    "**C**",
    "C. Paris",
    "C) Paris",
    "(C) Paris",
    "C: Paris",
    "C - Paris",
    r"\text{C}",
    r"\text{(C)}",
    r"\textbf{(C)}",
    r"\mathrm{C}",
    r"\text{C. Paris}",
    r"\text{(C) }\frac{1}{2}",
    r"\textbf{(C)}\ 5",
    r"\left(C\right)",
    "Option C",
    "The answer is C.",
    "Answer: (C)",
    "C. Vitamin D",
    "C. A cat and a dog",
    "C) It is C",
]
NAMES_NONE = [
    "C and D",
    "C or D",
    "C, D",
    "C/D",
    "C & D",
    "CD",
    "A, B, C",
    "(C), (D)",
    "(C) or (D)",
    "C. Paris, D. Rome",
    "C. Paris (D) Rome",
    "C) Paris D) Rome",
    "C. Paris or D",
    "C. Paris, not B",
    r"\text{C and D}",
    "Paris",
    "A dog",
    "C Paris",
    "42",
    "",
    "None of the above",
]


@pytest.mark.parametrize("answer", NAMES_C)
def test_an_answer_that_names_one_option(answer):
    assert letter(answer) == "C"
    assert grade_all([(rf"So \boxed{{{answer}}}.", "C")]) == [Verdict(True, "C", "correct")]
    assert grade_all([(rf"So \boxed{{{answer}}}.", r"\text{(D)}")]) == [Verdict(False, "C", "wrong")]


@pytest.mark.parametrize("answer", NAMES_NONE)
def test_an_answer_that_names_none_or_several(answer):
    assert letter(answer) is None
    assert grade_all([(rf"So \boxed{{{answer}}}.", "C")]) == [Verdict(False, None, "no_answer")]


def test_only_the_last_box_counts():
    assert extract_answer(r"\boxed{A} at first, then \boxed{B}") == "B"
    assert extract_answer("The answer is B.") is None
    assert extract_answer(r"\boxed{A}, or rather \boxed{Paris}") is None


def test_verdicts_keep_the_order_of_the_pairs():
    verdicts = grade_all([(r"\boxed{A}", "A"), ("no box", "A"), (r"\boxed{B}", "(A)"), (r"\boxed{(b)}", "B")])
    assert [verdict.reason for verdict in verdicts] == ["correct", "no_answer", "wrong", "correct"]
    assert {verdict.reason for verdict in verdicts} <= set(REASONS)


def test_long_and_odd_answers_take_no_time_and_raise_nothing():
    odd = [
        "(" * 100_000,
        "answer is " * 20_000,
        "C. " + "a, " * 50_000,
        "C" * 100_000,
        "\ud800",
        "{" * 1000,
        " " * 100_000,
    ]
    assert not any(verdict.correct for verdict in grade_all([(rf"\boxed{{{text}}}", "D") for text in odd]))

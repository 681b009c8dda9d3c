import itertools
import random
import re
import threading
import time
from fractions import Fraction

import pytest

from t3d.grading import workers
from t3d.grading.math import Verdict, extract_answer, grade_all, parse_number
from tests.grading.gold import REWRITINGS, alike, gold_answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"first \boxed{5}, then \boxed{6}", "6"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed{\boxed{9}}", "{9}"),
        (r"\boxed{x = \fbox{9}}", "x = {9}"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \\\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \\\end{pmatrix}"),
        (r"\boxed{3} and cut off: \boxed{4", "3"),
        (r"\boxed{3} put it in \boxed{}", "3"),
        (r"cut off: \boxed{\boxed{4}", "4"),
        (r"\\boxed{5}", "5"),
        (r"\\\boxed{5}", "5"),
        (r"\{ \boxed{5} } \boxed{6", "5"),
        (r"\boxed{1}\boxed{a\boxed{2}b} {", "a{2}b"),
        (r"\boxed{", None),
        (r"\boxed{ }", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text, answer):
    assert extract_answer(text) == answer


def test_extraction_takes_linear_time():
    start = time.monotonic()
    assert extract_answer(r"\boxed{" * 100_000) is None
    assert extract_answer(r"\boxed{7}" + "\\" * 100_001 + r"\boxed" * 20_000 + "{" * 100_000) == "7"
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,080", 1080),
        ("1{,}080", 1080),
        (r"11,\! 111,\! 111", 11111111),
        (r"\$18.00", 18),
        ("$18.00$", 18),
        ("-$0.50", Fraction(-1, 2)),
        ("−3", -3),
        ("5.", 5),
        (".25", Fraction(1, 4)),
        (r"5.4 \text{ cents}", Fraction(27, 5)),
        (r"\text{13}", 13),
        (r"90^\circ", 90),
        (r"864 \mbox{ inches}^2", 864),
        ("18 dollars", 18),
        ("3/4", Fraction(3, 4)),
        (r"1\frac{3}{4}", Fraction(7, 4)),
        ("1 3/4", Fraction(7, 4)),
        ("2 million", 2_000_000),
        ("3 halves", Fraction(3, 2)),
        (r"5\text{ hundredths}", Fraction(1, 20)),
        ("2 dozen", 24),
        ("16 units squared", 16),
        ("16 squared meters", 16),
        (r"10\,080", 10080),
        (r"2\ 016\ 532", 2016532),
        ("10\u202f080", 10080),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"2.1\bar{6}", Fraction(13, 6)),
        (r"0.\overline{1213}", Fraction(1213, 9999)),
        ("0.(36)", Fraction(4, 11)),
        (r"0.333\ldots", Fraction(1, 3)),
        (r"-15\tfrac35", Fraction(-78, 5)),
        (r"\frac{270}7\text{ degrees}", Fraction(270, 7)),
        (r"\frac{1}{29,\!322,\!216}", Fraction(1, 29322216)),
        (r"15\mbox{ cm}^2", 15),
        (r"\mathbf{2340}", 2340),
    ],
)
def test_plain_numbers(text, value):
    assert parse_number(text).value == value


@pytest.mark.parametrize(
    "text",
    [
        "1,2",
        "1,08",
        "1, 080",
        "(1,080)",
        "1 2",
        "10^2",
        "2x",
        "2 pi",
        "2 sin x",
        "1/0",
        ".",
        "-",
        "",
        "1e3",
        "--1",
        "7 squared",
        "9 p.m.",
        r"9\text{ a.m.}",
        "0.12...",
        r"5\text{ or }",
    ],
)
def test_not_plain_numbers(text):
    assert parse_number(text) is None


RIGHT = [
    ("15:15", r"3:15\text{ p.m.}"),
    (r"\pounds 5.50", "5.5"),
    ("no solution", r"\text{no solutions}"),
    (r"\text{noon}", r"12\text{ p.m.}"),
    (r"12:00\text{ a.m.}", r"\text{midnight}"),
    ("3{:}30", "3:30"),
    ("90º", r"90^\circ"),
    (r"0.\dot{1}2\dot{3}", r"0.\overline{123}"),
    (r"1\text{,}000", "1,000"),
    (r"\text{The answer is Tuesday}", r"\text{Tuesday}"),
    (r"\text{March 1st}", r"\text{March 1}"),
    (r"\text{March 1 2003}", r"\text{March 1, 2003}"),
    (r"\text{either } 1 \text{ or } 2", "1, 2"),
    (r"\text{the two numbers are } 1 \text{ and } 2", "1, 2"),
    (r"x = \{1,2\}", "1, 2"),
    ("(1,2)", "(x, y) = (1, 2)"),
    ("(x,y) = (1,2), (x,y) = (3,4)", "(1,2), (3,4)"),
    ("1080", "1,080"),
    (r"\$18.00", "18"),
    (r"18\%", "18"),
    (r"18\%", "0.18"),
    ("0.18", r"18\%"),
    ("percent of nothing", "percent of nothing"),
    ("C", r"\text{(C)}"),
    ("Evelyn", r"\text{Evelyn}"),
    ("0.5", r"\frac{1}{2}"),
    ("0.333333", r"\frac{1}{3}"),
    (r"\frac{2}{4}", r"\frac12"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("5", "x=5"),
    (r"\left(3, \pi/2\right)", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    ("52_{8}", "52_8"),
    ("16 units squared", "16"),
    ("2 thirds", r"\frac{2}{3}"),
    ("0.666667", "2 thirds"),
    ("5 factorial", "5 factorial"),
    ("f(2)=5", "5"),
    ("a+b=5", "5"),
    ("x_1=5", "5"),
    (r"\sqrt{16}=4", "4"),
    (r"18\$", "18"),
    ("9 a.m.", r"9\text{ a.m.}"),
    ("9:00 AM", r"9\text{ a.m.}"),
    (r"4:30\text{ pm}", r"\text{4:30 p.m.}"),
    ("9 p.m.", "9"),
    ("4:51:06 p.m.", r"4\!:\!51\!:\!06 \text{ p.m.}"),
    ("5.", "5"),
    (r"\frac{3}{4}.", r"\frac34"),
    ("(1,2);", "(1,2)"),
    (r"\text{even}.", r"\text{even}"),
    ("2, 3 and 4", r"2, 3, \text{ and } 4"),
    ("2,3,4", r"2, 3, \text{ and } 4"),
    (r"-12\text{ or }-2", r"-2 \text{ or } -12"),
    ("6,8,10", r"6, 8\text{, and }10"),
    (r"x=2\text{ or }x=3", "2,3"),
    (r"\text{The solutions are }2\text{ and }3", "2,3"),
    (r"\mbox{even}", r"\text{even}"),
    (r"864\text{ in}^2", r"864 \mbox{ inches}^2"),
    (r"2400\,\text{cm}^2", r"2400 \mbox{ cm}^2"),
    ("90\xb0", r"90^\circ"),
    ("90", r"90^{\circ}"),
    (r"90 \text{ degrees}", r"90^\circ"),
    ("(6,235)", r"(6,235^\circ)"),
    ("4\xb0, 20\xb0", r"4^\circ, 20^\circ"),
    (r"1 \frac{4}{5}", r"1\frac{4}{5}"),
    (r"\frac95", r"1\frac{4}{5}"),
    ("1.8", r"1\frac{4}{5}"),
    (r"-15\tfrac35", r"-15\frac{3}{5}"),
    ("137.5", r"137 \frac{1}{2}"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.1\overline{6}", r"\frac16"),
    (r"\frac{1213}{9999}", r"0.\overline{1213}"),
    (r"0.\bar{3}", r"\frac{1}{3}"),
    ("0.333...", r"\frac13"),
    (r"2.\overline{3}", r"\frac73"),
    (r"1\,080", "1080"),
    ("10\u2009080", r"10,\!080"),
    (r"10\;080", "10{,}080"),
    ("10\u202f080", "10,080"),
    (r"2\,016\,532", "2{,}016{,}532"),
    ("2^{-99}", r"\frac{1}{2^{99}}"),
    (r"\frac{2}{2^{100}}", r"\frac{1}{2^{99}}"),
    (r"\frac{3^{50}-1}{3^{50}}", r"1-\frac{1}{3^{50}}"),
    (r"x=\frac{1}{2^{99}}", r"\frac{1}{2^{99}}"),
    (r"\cos(13^\circ)", r"\cos 13^\circ"),
    (r"\sin 77^\circ", r"\cos 13^\circ"),
    (r"20\text{ square units}", r"20 \text{ sq units}"),
    (r"\$18", "18 dollars"),
    ("0.56", r"0.56 = 56\%"),
    (r"\frac23", r"\$\dfrac23 \approx \$0.67"),
    ("8.24", r"\approx 8.24 \text{ mph}"),
    ("C", r"\text{(C)}"),
    ("C.", r"\text{(C)}"),
    ("C)", "C"),
    ("C. Paris", "C"),
    ("A, C, F", r"\text{A,C,F}"),
    ("F, A, C", r"\text{A,C,F}"),
    ("E, D", "D, E"),
    (r"\sin^2(t)", r"\sin^2 t"),
    ("(5)", "5"),
    (r"\{5\}", "5"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"x\in[-2,7]", "[-2,7]"),
    ("(1+i)(1-i)", "2"),
    (r"\frac{5x^2}{2}", r"\dfrac{5x^2}{2}"),
    (r"10\sqrt{21x^3}", r"10x \sqrt{21x}"),
    ("-2x+y-2z+18=0", "2x - y + 2z - 18 = 0"),
    ("y-3=2x", "y = 2x + 3"),
    ("2x+3", "y = 2x + 3"),
    (r"-80 \le g(x) \le 82", r"-80\leq g(x)\leq 82"),
    (r"\begin{bmatrix}1/5\\-18/5\end{bmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
    (r"\left(\begin{array}{c}0.2\\-3.6\end{array}\right)", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
    (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
    ("1:4", "1 : 4"),
    (r"\text{A5}_{11}", "A5_{11}"),
    ("24", "24_{10}"),
    (r"1.5\times 10^3", "1500"),
    (r"3.14159265\cdot 2", r"2\pi"),
    ("333333333.333", r"\frac{1000000000}{3}"),
    ("1.4142136", r"\sqrt2"),
    ("(0.333333, 2)", r"(\frac13,2)"),
    (r"\frac{990}{7}", r"\frac{990}{7}^\circ"),
    (r"480+480\sqrt3", r"480 + 480\sqrt{3}\text{ feet}"),
    (r"\sqrt{2} \approx 1.41", r"\sqrt2"),
    ("2+3=5", "5"),
    (r"\mathbf{5}", "5"),
    ("**5**", "5"),
    (r"$$\frac{1}{2}$$", r"\frac12"),
    (r"\[x+1\]", "1+x"),
    ("f(1) > f(2)", "f(2) < f(1)"),
    ("29x^5(2-7x^6)", "-29x^5(7x^6-2)"),
    (r"\frac{1}{4m}", r"\frac{1}{4 m}"),
    (r"33\frac{1}{3}\%", r"\frac{100}{3}\%"),
    ("x^{2}+1", "x^2+1"),
    ("2,016,532", "2{,}016{,}532"),
    (r"\text{October 30}", "October 30"),
    ("October 30.", r"\text{October 30}"),
    (r"12^{\frac17}", "12^{1/7}"),
    (r"\log 2007 - \log 2006", r"\log\left(\frac{2007}{2006}\right)"),
    ("even", r"\text{even}"),
    (r"5\text{ feet}", r"5\text{ ft}"),
]
WRONG = [
    ("3:15", r"15:15\text{ p.m.}"),
    ("3:15", "15:15"),
    ("21:00", r"9\text{ a.m.}"),
    (r"\text{noon}", r"12\text{ a.m.}"),
    (r"20^\circ\text{C}", r"20^\circ\text{F}"),
    (r"10\text{ cm}^3", r"10\text{ cm}^2"),
    ("70 cubic inches", r"70\text{ square inches}"),
    (r"\text{March 11}", r"\text{March 1}"),
    ("(y, x) = (2, 1)", "(x, y) = (1, 2)"),
    ("12", "1,2"),
    ("1,2", "12"),
    ("1 1/2", "1"),
    ("0.18", "18"),
    (r"18\%", "1800"),
    ("0.000067", ".0000672"),
    ("0.333", r"\frac{1}{3}"),
    ("seat", r"\text{east}"),
    ("seat", "east"),
    ("52_9", "52_8"),
    ("10 million", "10"),
    ("(2,1)", "(1,2)"),
    (r"(-\infty,0)", r"(-\infty,0]"),
    (r"5\text{ or }6", "5"),
    ("5x", "5"),
    ("7 squared", "7"),
    (r"7\text{ cubed}.", "7"),
    ("5 factorial", "5"),
    ("5 hundredths", "5"),
    ("3 halves", "3"),
    ("3 quarters", "3"),
    ("10 million", "x=10"),
    ("7 squared", "x=7"),
    (r"10,\!000", "(10, 0)"),
    (r"\frac{x^2}{16} - \frac{y^2}{9} = 1", "1"),
    ("2x - y + 2z - 18 = 0", "0"),
    (r"9\text{ p.m.}", r"9\text{ a.m.}"),
    ("9 PM", r"9\text{ a.m.}"),
    ("9", r"9\text{ a.m.}"),
    ("8:34 a.m.", r"8\!:\!34 \text{ p.m.}"),
    ("8:35 p.m.", r"8\!:\!34 \text{ p.m.}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    (r"-\frac{1}{2^{99}}", r"\frac{1}{2^{99}}"),
    (r"1-\frac{1}{3^{50}}", r"1-\frac{1}{3^{49}}"),
    ("1", r"1-\frac{1}{3^{49}}"),
    ("0", r"\frac{1}{2^{99}}"),
    ("10^{-20}", "10^{-21}"),
    (r"\sqrt2+10^{-60}", r"\sqrt2"),
    (r"x=\frac{1}{2^{99}}", r"x=\frac{1}{2^{98}}"),
    (r"(\frac{1}{2^{99}},1)", r"(\frac{1}{2^{98}},1)"),
    (r"x<\frac{1}{2^{99}}", r"x<\frac{1}{2^{98}}"),
    (r"\frac{x}{2^{99}}", r"\frac{x}{2^{98}}"),
    (r"y=\frac{x}{2^{99}}", r"y=\frac{x}{2^{98}}"),
    ("[0,2^{-99}]", "[0,2^{-98}]"),
    (r"\begin{pmatrix}2^{-99}\\1\end{pmatrix}", r"\begin{pmatrix}2^{-98}\\1\end{pmatrix}"),
    (r"\{2^{-99},1\}", r"\{2^{-98},1\}"),
    ("0.0000001", "0.0000002"),
    (r"\frac{1}{3000000}", "0.00000034"),
    ("1000000", r"\frac{1000001}{1000000}"),
    ("0.00000034", r"\sqrt{10^{-13}}"),
    (r"40\text{ feet}", r"40\text{ min}"),
    (r"5\text{ cm}", r"5\text{ inches}"),
    (r"\$5", r"5\text{ cents}"),
    ("2 hours", r"2\text{ minutes}"),
    (r"12\sqrt{13}\text{ inches}", r"12\sqrt{13}\text{ feet}"),
    ("C and D", r"\text{(C)}"),
    ("C or D", "C"),
    ("C. Paris, D. Rome", "C"),
    ("D", "C"),
    ("A,C", r"\text{A,C,F}"),
    ("42", "52_8"),
    ("1:1", "1_7"),
    ("b", r"\text{B}"),
    ("52", "52_8"),
    ("52_8", "52"),
    (r"\sin^2 y", r"\sin^2 t"),
    (r"\cos 13", r"\cos 13^\circ"),
    ("3r^2", "3R^2"),
    ("2b", "2B"),
    ("1,2", "1,2,3"),
    ("1,1,2", "1,2,2"),
    ("(1,2]", "[1,2)"),
    ("(1,2)", "[1,2]"),
    ("5", "5x"),
    ("x^2", "x"),
    ("|x|", "x"),
    (r"(-\infty,2) \cup (4,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
    ("y=2x-3", "y=2x+3"),
    ("k=5", "x=5"),
    ("f(1)<f(2)<f(4)", "f(2) < f(1) < f(4)"),
    (r"0.\overline{3}", "0.3"),
    ("0.333", r"\frac13"),
    (r"1\frac{4}{5}", r"\frac45"),
    ("10 080", "1080"),
    ("October 31", r"\text{October 30}"),
    ("x>2", "x<2"),
    (r"x\geq 2", "x>2"),
    (r"\text{Kickball, Softball, Picnic}", r"\text{Softball, Kickball, Picnic}"),
    ("3.15", r"\pi"),
    ("", "5"),
    ("5", ""),
    (".", ""),
    ("1/2:3", r"\frac16x"),
    ("2i", "2"),
    ("6-5i", "6+5i"),
    ("-x", "x"),
    ("a", "b"),
    ("9999999999999999999998", "9999999999999999999999"),
    ("1e400", "1e401"),
]


def test_right_and_wrong_answers():
    verdicts = grade_all([(rf"So \boxed{{{a}}}.", b) for a, b in RIGHT + WRONG], progress=False)
    graded = [(pair, verdict.correct) for pair, verdict in zip(RIGHT + WRONG, verdicts, strict=True)]
    assert graded == [(pair, True) for pair in RIGHT] + [(pair, False) for pair in WRONG]


def test_no_answer_is_wrong_and_said():
    assert grade_all([("I do not know", "5")]) == [Verdict(False, None, "no_answer")]


def test_endless_answers_are_wrong_counted_and_block_nothing():
    endless = [r"\boxed{9^{9^{9^9}}}", r"\boxed{100000000!}"]
    pairs = [(endless[0], "12"), (r"\boxed{\sqrt{4}}", "2"), (endless[1], "12"), (r"\boxed{x+1}", "1+x")]
    start = time.monotonic()
    verdicts = grade_all(pairs, workers=1, time_limit=1.0, progress=False)
    assert [verdict.reason for verdict in verdicts] == ["timeout", "correct", "timeout", "correct"]
    assert time.monotonic() - start < 60


def test_workers_are_started_once():
    pair = [(r"\boxed{\sqrt{4}}", "2")]
    assert grade_all(pair, workers=1, progress=False)[0].correct
    first = [worker.process.pid for worker in workers._idle]
    assert grade_all(pair, workers=1, progress=False)[0].correct
    assert first and [worker.process.pid for worker in workers._idle] == first


def test_grading_works_off_the_main_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend(grade_all([(r"\boxed{\sqrt{4}}", "2")])))
    thread.start()
    thread.join(60)
    assert verdicts[0].correct


@pytest.mark.parametrize("answer", ["9" * 5000, "0." + "9" * 5000, r"\frac{1}{" + "9" * 5000 + "}", r"x+\frac{" * 400])
def test_one_answer_never_ends_the_grading_of_the_others(answer):
    """Python's int() refuses more than 4,300 digits, and parsers nest too deep."""
    pairs = [(rf"\boxed{{{answer}}}", "12"), (r"\boxed{12}", "12"), (r"\boxed{\sqrt{144}}", "12")]
    assert [verdict.correct for verdict in grade_all(pairs, progress=False)] == [False, True, True]


def test_numbers_of_any_length_are_compared():
    long = "9" * 5000
    pairs = [(rf"\boxed{{{long}.}}", long), (rf"\boxed{{{long[:-1]}8}}", long), (rf"\boxed{{{long}}}", "12")]
    assert [verdict.reason for verdict in grade_all(pairs, progress=False)] == ["correct", "wrong", "wrong"]


def test_an_answer_that_nests_too_deep_for_the_parser_is_an_error():
    answers = ["(" * 2_000 + "1" + ")" * 2_000, r"\sqrt{4}"]
    verdicts = grade_all([(rf"\boxed{{{answer}}}", "2") for answer in answers], 1, time_limit=2, progress=False)
    assert verdicts[0].reason in ("error", "timeout") and verdicts[1].reason == "correct"


# --- every gold answer of the real sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("rewriting", REWRITINGS)
def test_a_harmless_rewriting_of_a_gold_answer_passes(shared, rewriting):
    rewritten = [(REWRITINGS[rewriting](gold), gold) for gold in gold_answers(shared)]
    pairs = [(answer, gold) for answer, gold in rewritten if answer is not None]
    assert pairs
    verdicts = grade_all([(rf"The answer is \boxed{{{answer}}}.", gold) for answer, gold in pairs], progress=False)
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if not verdict.correct] == []


def _alike(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs that pass."""
    verdicts = grade_all([(rf"\boxed{{{answer}}}", gold) for answer, gold in pairs], progress=False)
    assert {verdict.reason for verdict in verdicts} <= {"correct", "wrong"}
    return [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.correct]


def test_different_gold_answers_are_wrong_for_each_other(shared):
    """Neighbours in the order of their letters and digits, where the near ones are, and a random sample."""
    gold = sorted(gold_answers(shared, "MATH500"), key=lambda answer: re.sub(r"[^0-9a-zA-Z]", "", answer))
    near = [pair for i, answer in enumerate(gold) for pair in itertools.product([answer], gold[i + 1 : i + 4])]
    rng = random.Random(0)
    pairs = near + [tuple(rng.sample(gold, 2)) for _ in range(500)]
    assert [pair for pair in _alike(pairs) if not alike(*pair)] == []


@pytest.mark.slow
def test_all_pairs_of_different_gold_answers(shared):
    """Each pair in one order, 3.5 million of them; of the whole numbers, which need no algebra, one in twenty."""
    from t3d.grading.algebra import equal

    gold = [answer for answer in gold_answers(shared) if not answer.isdigit() or int(answer) % 20 == 0]
    pairs = itertools.combinations(gold, 2)
    assert [(a, b) for a, b in pairs if equal(a, b) and not alike(a, b)] == []

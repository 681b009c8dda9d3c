import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t3d.common.errors import UserError
from t3d.grading import code, sandbox
from t3d.grading.code import CodeItem, check_row, extract_program, grade_all
from t3d.grading.plan import plan_tests
from tests.conftest import raises_key
from tests.grading.crossings import CROSSING, UNSUPPORTED, WRONG

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ROOT = Path(code.__file__).resolve().parents[2]

PREFIX = 'Here is the completed code:\n```python\ndef double(x):\n    """ Twice x. """\n\n'
ROW = {
    "question": "Double it.",
    "prefix": PREFIX,
    "test_method": "function",
    "test_list": [
        "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('a') == 'aa'\n\ncheck(double)"
    ],
    "test_time_limit": 1,
}
SUM = {
    "question": "Add the two numbers of a line.",
    "test_method": "stdio",
    "test_input": ["1 2\n", "30 12\n"],
    "test_output": ["3\n", "42\n"],
    "test_time_limit": 1,
}


@pytest.fixture
def boxed():
    try:
        sandbox.walls()
    except UserError as error:
        pytest.skip(str(error))


def reasons(*items: tuple[str, dict], **options) -> list[str]:
    return [v.reason for v in grade_all([CodeItem(text, row) for text, row in items], progress=False, **options)]


def function(test: str, **more) -> dict:
    return {"test_method": "function", "test_list": [test], **more}


def block(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nThat is all."


# --- the program in the answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prefix", "program"),
    [
        ("so\n```python\nx = 1\n```\nok", None, "x = 1\n"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", None, "x = 2\n"),  # the last one, as the release
        ("```python\r\nif x:\r\n    y = 1\r\n```", None, "if x:\n    y = 1\n"),
        ("```python\n    if x:\n        y = 1\n    ```", None, "if x:\n    y = 1\n"),
        ("```python\nx = 1", None, None),
        ("```\nx = 1\n```", None, "x = 1\n"),
        ("```bash\npip install x\n```", None, None),
        ("x = 1", None, None),
        ("", PREFIX, None),
        ("    return 2 * x\n```", PREFIX, 'def double(x):\n    """ Twice x. """\n\n    return 2 * x\n'),
        ("    return 2 * x", PREFIX, None),  # cut off
        (
            "```python\ndef double(x): return 2 * x\n```",
            PREFIX,
            '\ndef double(x):\n    """ Twice x. """\n\n\ndef double(x): return 2 * x\n',
        ),
    ],
)
def test_the_program_of_an_answer(text, prefix, program):
    assert extract_program(text, prefix) == program


SOLVED = "```python\ndef f(x):\n    return 2 * x\n```"
EXAMPLE = "```python\nprint(f(3))\n```"


@pytest.mark.parametrize(
    "fence", ["python", "Python", "PYTHON", "py", "python3", "Python3.11", "py3", "", " python", "python  "]
)
def test_fences_that_count(fence):
    assert extract_program(f"So:\n```{fence}\nx = 1\n```\nDone.") == "x = 1\n"


@pytest.mark.parametrize("fence", ["bash", "text", "output", "pycon", "cpp", "json", "pythonic"])
def test_fences_that_do_not_count(fence):
    assert extract_program(f"So:\n```{fence}\nx = 1\n```\nDone.") is None
    assert extract_program(f"```python\nx = 2\n```\n```{fence}\nx = 1\n```\n") == "x = 2\n"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (f"{SOLVED}\nFor example:\n{EXAMPLE}\n", "def f(x):\n    return 2 * x\n"),
        (f"{SOLVED}\nTests:\n```py\nassert f(1) == 2\n```\n```\n6\n```", "def f(x):\n    return 2 * x\n"),
        (f"```python\ndef f(x): pass\n```\nBetter:\n{SOLVED}\n{EXAMPLE}", "def f(x):\n    return 2 * x\n"),
        (f"{SOLVED}\n```\nf = abs\n```", "f = abs\n"),
        (f"{SOLVED}\n```python\ndef f(x):\n    return", "def f(x):\n    return 2 * x\n"),  # cut off
        ("```python\nfrom operator import neg as f\n```\n" + EXAMPLE, "from operator import neg as f\n"),
        (f"{SOLVED}\n```python\nfrom solution import f\nprint(f(3))\n```", "def f(x):\n    return 2 * x\n"),
        ("```python\nclass f:\n    x = 1\n```\n" + EXAMPLE, "class f:\n    x = 1\n"),
        ("```python\nasync def f(): pass\n```\n" + EXAMPLE, "async def f(): pass\n"),
        ("```python\ng = 1\n```\n" + EXAMPLE, "print(f(3))\n"),  # none defines it: the last
        ("```python\ndef f(x):\n    return x```\nand so on\n" + EXAMPLE, "def f(x):\n    return x\n"),
        (
            '```python\ndef f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n```\n',
            'def f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n',
        ),
        ("~~~python\ndef f(): pass\n~~~\n" + EXAMPLE, "def f(): pass\n"),
        ("````python\ndef f(): pass\n````\n", "def f(): pass\n"),
        ("1. First\n\n   ```python\n   def f(): pass\n   ```\n", "def f(): pass\n"),
    ],
)  # fmt: skip
def test_the_block_that_defines_what_the_tests_call(text, program):
    assert extract_program(text, None, ("f",)) == program
    assert extract_program(text.replace("\n", "\r\n"), None, ("f",)) == program


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nprint(1)\n```\nIt prints:\n```\n1\n```\n", "print(1)\n"),
        ("```python\nprint(1)\n```\nAt last:\n```\nprint(2)\n```\n", "print(2)\n"),
        ("```python\nprint(1)\n```\n```python\nprint(2)\n```\n```python\nprint(3)", "print(2)\n"),
        ("```\nprint(1)\n```\n", "print(1)\n"),
        ("Inline: ```python print(1)```", "print(1)\n"),
    ],
)
def test_the_last_complete_block_of_a_whole_program(text, program):
    assert extract_program(text).strip() == program.strip()


def test_an_answer_goes_on_with_its_prefix_or_not():
    given = 'def double(x):\n    """ Twice x. """\n\n'
    ask = ("double",)
    after = "    return 2 * x\n```\nExample:\n```python\nprint(double(3))\n```"
    assert extract_program(after, PREFIX, ask) == given + "    return 2 * x\n"
    again = "    return x\n```\nNo:\n```python\ndef double(x): return 2 * x\n```"
    assert extract_program(again, PREFIX, ask) == f"\n{given}\ndef double(x): return 2 * x\n"
    body = "Here:\n```python\n    return 2 * x\n```"
    assert extract_program(body, PREFIX, ask) == given + "\n    return 2 * x\n"
    own = "Sure.\n```\ndef double(x): return 2 * x\n```\n```python\nprint(double(1))\n```"
    assert extract_program(own, PREFIX, ask) == f"\n{given}\ndef double(x): return 2 * x\n"


def test_the_rule_of_the_release():
    text = f"{SOLVED}\n{EXAMPLE}\n"
    assert extract_program(text, None, ("f",), "last") == "print(f(3))\n"
    assert extract_program("```\nx = 1\n```", extraction="last") is None
    assert extract_program("```Python\nx = 1\n```", extraction="last") is None
    with raises_key("evaluation.extraction", "=first"):
        extract_program(text, extraction="first")


@pytest.mark.parametrize(
    "text",
    [
        "```python\n" * 20_000,
        "```\n" * 20_001,
        "```x\n" * 20_000,
        "        ```\n" * 20_000,
        "```python\n" + "`` `" * 50_000,
    ],
)
def test_choosing_takes_no_time(text):
    start = time.process_time()
    extract_program(text, PREFIX, ("f",))
    assert time.process_time() - start < 5


def test_the_example_is_not_run(boxed):
    text = f"{SOLVED}\nFor example:\n```python\nprint(f(input()))\n```\n"
    row = function("assert f(2) == 4")
    assert reasons((text, row)) == ["correct"]
    assert reasons((text, row), extraction="last") == ["error"]
    printed = "```python\nprint(3)\n```\nIt prints\n```\n3\n```\n"
    assert reasons((printed, SUM | {"test_input": [""], "test_output": ["3"]})) == ["correct"]


# --- what the tests take from it -------------------------------------------------------------------------------------


def test_the_tests_ask_for_the_names_they_do_not_define():
    plan = plan_tests(
        ("import math\nlimit = 3\ndef check(c):\n    n = abs(c(limit))\n    assert g(n) == math.pi\ncheck(f)",)
    )
    assert plan.names == ("f", "g")


def test_a_builtin_is_the_programs_only_where_it_is_asked_for():
    assert plan_tests(("assert abs(f(1) - len('x')) < 1",)).names == ("f",)
    assert plan_tests(("def check(c):\n    assert sum(1, 2) == 3\ncheck(sum)",)).names == ("sum",)
    assert plan_tests(("assert max(1) == abs(f())",), "```python\ndef max(x):\n").names == ("f",)  # no whole code
    assert plan_tests(("assert max(1) == abs(f())",), "```python\ndef max(x):\n  'doc'\n").names == ("f", "max")
    assert plan_tests(("assert sum(1, 2) == 3",)).names == ("sum",)


def test_modules_are_pythons():
    plan = plan_tests(("assert math.isclose(f(1), 1, abs_tol=sum([0]))",))
    assert (plan.names, plan.helpers) == (("f",), "import math")
    assert plan_tests(("assert math.isclose(sum([1]), 1)",)).names == ("sum",)
    assert plan_tests(("assert copy([1]) == [1]",)).names == ("copy",)  # a module cannot be called
    assert plan_tests(("assert queue.Queue(1)",), "```python\nclass queue:\n    x = 1\n").names == ("queue",)
    plan = plan_tests(("assert f(1) == m.pi",), "```python\nimport math as m\nimport os\ndef f(x):\n    'doc'\n")
    assert (plan.names, plan.helpers) == (("f",), "import math as m")


def test_functions_that_the_prefix_gives_in_full_stay_with_the_tests():
    prefix = "```python\nimport math\ndef encode(x):\n    return math.floor(x) + 1\n\ndef decode(x):\n    ' doc '\n"
    plan = plan_tests(("def check(c):\n    assert c(encode(3)) == 3\ncheck(decode)",), prefix)
    assert plan.names == ("decode",)
    assert plan_tests(("assert f(1) == 1",), "```python\ndef f(x):\n    'doc'\n    y = 1\n").names == ("f",)
    assert "def encode" in plan.helpers and "import math" in plan.helpers and "def decode" not in plan.helpers


# --- right programs --------------------------------------------------------------------------------------------------

RIGHT = {
    "plain": ("    return 2 * x\n```", ROW),
    "windows": ("    return 2 * x\r\n```\r\n", ROW),
    "own block": (block("def double(x):\n    return 2 * x"), ROW),
    "indented": (block("    def double(x):\n        return 2 * x"), ROW | {"prefix": None}),
    "talkative": ("    print('passed' * 200_000)\n    return 2 * x\n```", ROW),
    "talkative on stderr": ("    import sys\n    sys.stderr.write('x' * 2_000_000)\n    return 2 * x\n```", ROW),
    "closes its output": ("    import sys\n    sys.stdout.close()\n    return 2 * x\n```", ROW),
    "main guard": (block("def double(x):\n    return 2 * x\nif __name__ == '__main__':\n    print(input())"), ROW),
    "thread": (
        "    from concurrent.futures import ThreadPoolExecutor\n"
        "    with ThreadPoolExecutor(4) as pool:\n        return list(pool.map(lambda y: 2 * y, [x]))[0]\n```",
        ROW,
    ),
    "process": (
        "    import subprocess, sys\n    subprocess.run([sys.executable, '-c', 'import json'], check=True)\n"
        "    return 2 * x\n```",
        ROW,
    ),
    "file": (
        "    import tempfile\n    with tempfile.TemporaryFile('w') as f: f.write('x')\n    return 2 * x\n```",
        ROW,
    ),
    "dataclass": (
        block("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: object\ndef double(x): return 2 * A(x).x"),
        ROW,
    ),
    "recursion limit": ("    import sys\n    sys.setrecursionlimit(10**6)\n    return 2 * x\n```", ROW),
    "changes in place": (block("def f(x):\n    x.sort()"), function("x = [3, 1, 2]\nf(x)\nassert x == [1, 2, 3]")),
    "changes and returns": (
        block("def f(a):\n    a.append(1)\n    return a\ndef g(a, c): return f(a), c.update(x=1)"),
        function(
            "import collections\na = []\nb = f(a)\nassert a == b == [1]\nif f(a): assert a == [1, 1]\n"
            "assert len(f(a)) == 3 and len(f(a)) == 4\nc = collections.Counter()\nassert g(a, c)\nassert c['x'] == 1"
        ),
    ),
    "keeps its objects": (
        block("class A: pass\nroot = A()\ndef f(nodes): return 1"),
        function("a = [root]\nassert f(a) == 1\nassert a[0] is root"),
    ),
    "exits": (block("import sys\ndef f(x): return x\nif __name__:\n    sys.exit(f(0))"), function("assert f(1) == 1")),
    "future": (block("def f(x): return x"), function("from __future__ import annotations\nassert f(1) == 1")),
    "module": (block("import math\ndef f(x): return x"), function("assert math.isclose(f(1), 1)")),
    "ignores children": (
        "    import multiprocessing, signal\n"
        "    with multiprocessing.get_context('fork').Pool(2) as pool:\n        y, = pool.map(str, [1])\n"
        "    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n    return 2 * x\n```",
        ROW,
    ),
    "class": (
        block("class Stack:\n    x = []\n    def push(s, v): s.x += [v]\n    def __len__(s): return len(s.x)"),
        function("s = Stack()\ns.push(1)\nassert len(s) == 1 and s.x == [1]"),
    ),
    "raises": (
        block("def f(x):\n    raise ValueError('no')"),
        function("try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'"),
    ),
    "raises its own": (
        block("class E(ValueError): pass\nclass F(E): pass\ndef f(x):\n    raise F('no')"),
        function("try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'"),
    ),
    "named like a builtin": (block("def sum(a, b): return a + b"), function("assert sum(1, 2) == 3")),
    "named check": (block("def check(s): return s"), function("def check(c):\n    assert check(1) == 1\ncheck(check)")),
    "constant": (block("LIMIT = 7"), function("assert LIMIT == 7")),
    "sum": (block("a, b = map(int, input().split())\nprint(a + b)"), SUM),
    "sum with a prompt": (block("a, b = input('two numbers: ').split()\nprint(int(a) + int(b))"), SUM),
    "sum from stdin": (block("import sys\nprint(' ', sum(map(int, sys.stdin.read().split())), '\\n\\n')"), SUM),
    "sum and exit": (block("print(sum(map(int, input().split())))\nexit(3)"), SUM),
    "sum as main": (
        block("def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()"),
        SUM,
    ),
    "nothing": (block("pass"), SUM | {"test_output": ["", "\n"]}),
    "a megabyte": (block("print('word ' * 200_000)"), SUM | {"test_output": ["word " * 200_000] * 2}),
}
VALUES = [
    "None", "True", "10**400", "-(2**80)", "0.1", "float('inf')", "1 + 2j", "'\\u00e4\\ud800'", "b'x'",
    "[1, [2, (3,)]]",
    "{1: {'a': [2]}, (1, 2): {3}}", "frozenset([1])", "range(3)", "__import__('collections').deque([1])",
    "__import__('collections').Counter('aab')", "__import__('fractions').Fraction(1, 3)",
    "__import__('datetime').datetime(2026, 1, 2, 3, 4, 5, 6, __import__('datetime').timezone.utc)",
    "__import__('datetime').date(2026, 1, 2)", "__import__('datetime').time(3, 4)",
    "__import__('datetime').timedelta(-3, 4, 5)",
    "__import__('decimal').Decimal('0.1')", "{1: 2}.keys()", "bytearray(b'y')",
]  # fmt: skip


def test_right_programs_pass(boxed):
    graded = dict(zip(RIGHT, reasons(*RIGHT.values()), strict=True))
    assert graded == dict.fromkeys(RIGHT, "correct")


def test_values_arrive_as_they_are(boxed):
    program = block("def f(x): return x\n" + "\n".join(f"def v{i}(): return {v}" for i, v in enumerate(VALUES)))
    tests = "\n".join(f"assert v{i}() == {v} and type(f({v})) is type({v})" for i, v in enumerate(VALUES))
    tests = tests.replace("type(f({1: 2}.keys())) is", "type({1: 2}.keys()) is")  # an argument must be plain
    tests = tests.replace("type(f(__import__('collections').Counter('aab'))) is type", "issubclass(dict, dict) or type")
    iterators = "\nassert list(g()) == [0, 1] and g() != [0, 1]"
    more = block("def g(): return (i for i in range(2))").replace("Here it is:\n```python\n", "")
    assert reasons((program.replace("\n```\nThat is all.", "\n" + more), function(tests + iterators))) == ["correct"]


def crossing(pairs: dict[str, tuple[str, str]]) -> dict[str, str]:
    items = [(block(program), function(tests)) for program, tests in pairs.values()]
    return dict(zip(pairs, reasons(*items), strict=True))


def test_values_keep_their_behaviour(boxed):
    pytest.importorskip("numpy")
    assert crossing(CROSSING) == dict.fromkeys(CROSSING, "correct")


def test_what_cannot_cross_is_not_wrong(boxed):
    assert crossing(UNSUPPORTED) == dict.fromkeys(UNSUPPORTED, "unsupported_value")
    assert crossing(WRONG) == dict.fromkeys(WRONG, "wrong")


def test_no_program_skips_its_tests(boxed):
    tests = (
        "import io, unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 1)\n"
        "tests = unittest.defaultTestLoader.loadTestsFromTestCase(T)\n"
        "assert unittest.TextTestRunner(stream=io.StringIO()).run(tests).wasSuccessful()"
    )
    programs = ["def f(x): return x", "import unittest\ndef f(x): raise unittest.SkipTest"]
    assert reasons(*((block(program), function(tests)) for program in programs)) == ["correct", "wrong"]


def test_no_future_of_the_graders_is_inherited(boxed):
    missing = block("def f(x: Undefined): return x")
    reads = block("def f(x: int): return f.__annotations__ == {'x': int}")
    row = function("def check(c: Nothing): assert c(1)\ncheck(f)")
    fine = function("assert f(1)")
    assert reasons((missing, fine), (reads, fine), (reads, row)) == ["error", "correct", "error"]


def test_a_program_that_prompts_is_right_with_its_prompts_and_without(boxed):
    program = block("name = input('name? ')\nprint(name)")
    row = SUM | {"test_input": ["a\n", "b\n"]}
    outputs = (["a", "b"], ["name? a", "name? b"], ["a", "c"])
    assert reasons(*((program, row | {"test_output": list(each)}) for each in outputs)) == [
        "correct",
        "correct",
        "wrong",
    ]


def test_a_number_for_exit_is_an_orderly_end_and_a_crash_is_none(boxed):
    row = SUM | {"test_input": [""], "test_output": ["3"]}
    ends = ["exit(1)", "raise SystemExit('words')", "import sys; sys.exit(2)", "1 / 0", "raise KeyError", "x ="]
    expected = ["correct"] * 3 + ["error"] * 3
    assert reasons(*((block(f"print(3)\n{end}"), row) for end in ends)) == expected


def test_numpys_numbers_are_numbers(boxed):
    pytest.importorskip("numpy")
    program = block("import numpy as np\ndef f(n): return np.arange(n).sum()\ndef g(n): return np.bool_(n > 1)")
    assert reasons((program, function("assert f(4) == 6\nassert g(2) is True\nassert f(3) == 3.0"))) == ["correct"]


FAILING = {
    "wrong": [("    return x\n```", ROW), ("    return 2 * x if x == 2 else 'a'\n```", ROW), (block("print(3)"), SUM)],
    "error": [
        ("    return y\n```", ROW),
        ("    return 2 *\n```", ROW),
        (block("def other(x): return 2 * x"), ROW | {"prefix": ""}),
        (block("print(1 / 0)"), SUM),
        (block("print(3)\nraise SystemError"), SUM),
    ],
    "timeout": [("    while True: pass\n```", ROW), (block("input()\nwhile True: pass"), SUM)],
    "memory": [("    return [0] * 10**9\n```", ROW), (block("x = [0] * 10**9"), SUM)],
    "no_code": [("twice x", ROW), ("", ROW), ("```python\nprint(3)", SUM)],
    "output_limit": [(block("while True: print('x' * 10**6)"), SUM)],
}


def test_wrong_programs_fail_for_their_reason(boxed):
    items = [(reason, item) for reason, several in FAILING.items() for item in several]
    graded = reasons(*(item for _, item in items), time_limit=0.5)
    assert graded == [reason for reason, _ in items]


def test_no_program_changes_what_the_tests_call(boxed):
    prefix = "```python\ndef encode(x):\n    return x + 1\n\ndef decode(x):\n    ' doc '\n"
    row = function("def check(c):\n    assert abs(c(encode(3)) - 3) < 1\ncheck(decode)", prefix=prefix)
    cheat = "abs = lambda x: 0\ndef encode(x): return x\ndef decode(x): return x + 5"
    assert reasons((f"    return x - 1\n\n{cheat}\n```", row), ("    return x - 1\n```", row)) == ["wrong", "correct"]


def test_no_program_brings_its_own_modules(boxed):
    cheat = "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0"
    assert reasons((block(cheat), function("assert math.isclose(f(1), 1)"))) == ["wrong"]


def test_arguments_do_not_change_behind_the_tests_back(boxed):
    cheats = [block(f"def f(x):\n    x.clear()\n    return {value}") for value in ("[]", "x")]
    row = function("x = [3, 1]\nassert f(x) == sorted(x)")
    assert reasons(*((cheat, row) for cheat in cheats)) == ["wrong"] * 2


def test_every_program_starts_anew(boxed):
    leave = block("open('left', 'w').close()\nprint(3)")
    find = block("import os\nprint(os.listdir())")
    row = SUM | {"test_input": [""], "test_output": ["3"]}
    assert reasons((leave, row), (find, row | {"test_output": ["['answer.py']"]}), workers=1) == ["correct"] * 2


def test_the_limit_counts_work_and_not_waiting(boxed):
    """Sleeping costs nothing up to the wall limit; the work of threads and children counts."""
    children = "    import os\n    for _ in range(3):\n        if os.fork() == 0:\n            while True: pass\n"
    children += "    import time\n    time.sleep(60)\n```"
    texts = ("    import time\n    time.sleep(1)\n    return 2 * x\n```", children)
    assert reasons(*((text, ROW) for text in texts), time_limit=0.6) == ["correct", "timeout"]


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"test_method": "magic"}, "test_method"),
        (ROW | {"test_list": []}, "test_list"),
        (ROW | {"test_list": "assert True"}, "test_list"),
        (ROW | {"test_list": [1]}, "test_list"),
        (ROW | {"test_list": ["assert"]}, "test_list"),
        (ROW | {"prefix": 1}, "prefix"),
        (ROW | {"test_time_limit": 0}, "test_time_limit"),
        (ROW | {"test_time_limit": "1"}, "test_time_limit"),
        (SUM | {"test_output": ["3"]}, "test_output"),
        (SUM | {"test_input": None}, "test_input"),
    ],
)
def test_rows_that_cannot_be_graded(row, field):
    with raises_key(field, "row 3"):
        check_row(row, "row 3")


# --- real data -------------------------------------------------------------------------------------------------------


def rows_of(name: str) -> list[dict]:
    path = DATA / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"needs the real benchmark data at {DATA}")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "count"), [("HumanEval", 164), ("MBPP", 498)])
def test_every_real_problem_is_fit_for_grading(name, count):
    rows = rows_of(name)
    assert len(rows) == count
    for number, row in enumerate(rows):
        check_row(row, f"{name} row {number}")
        plan = plan_tests(tuple(row["test_list"]), row["prefix"])
        assert plan.names, number
        # What is asked for is what the prefix starts, or what it says or the tests call; never Python's own.
        assert all(f"{asked}(" in row["prefix"] + row["test_list"][0] for asked in plan.names), number


HUMAN_EVAL = {
    0: ("    s = sorted(numbers)\n    return any(b - a < threshold for a, b in zip(s, s[1:]))", "    return True"),
    2: ("    return number % 1.0", "    return number"),
    13: ("    while b:\n        a, b = b, a % b\n    return a", "    return min(a, b)"),
    32: (
        "    a, b = -1.0, 1.0\n    while poly(xs, a) * poly(xs, b) > 0:\n        a, b = 2 * a, 2 * b\n"
        "    while b - a > 1e-10:\n        m = (a + b) / 2\n"
        "        if poly(xs, a) * poly(xs, m) > 0:\n            a = m\n        else:\n            b = m\n    return a",
        "    return 0.0\n\ndef poly(xs, x):\n    return 0.0",
    ),
    38: (
        "    return encode_cyclic(encode_cyclic(s))",
        "    return s\n\ndef encode_cyclic(s):\n    return s",
    ),
    50: (
        "    return ''.join([chr((ord(c) - 5 - ord('a')) % 26 + ord('a')) for c in s])",
        "    return s\n\ndef encode_shift(s):\n    return s",
    ),
    53: ("    return x + y", "    return x ^ y"),
}
MBPP = {
    337: ("    return 'Yes' if set(string) <= {'0', '1'} else 'No'", "    return 'Yes'"),
    7: (
        "    return list(string)\n\ndef remove_dirty_chars(a, b):\n    return ''.join(c for c in a if c not in b)",
        "    return list(string)\n\ndef remove_dirty_chars(a, b):\n    return a",
    ),
    1: ("    return sorted(M, key=sum)", "    return sorted(M)"),
    0: (
        "    i, j = s.find(ch), s.rfind(ch)\n    return s if i < 0 else s[:i] + s[i + 1 : j] + s[j + 1 :]"
        " if i < j else s[:i] + s[i + 1 :]",
        "    return s.replace(ch, '')",
    ),
}


@pytest.mark.parametrize(("name", "solutions"), [("HumanEval", HUMAN_EVAL), ("MBPP", MBPP)])
def test_solutions_of_real_problems(boxed, name, solutions):
    rows = rows_of(name)
    items = [(f"{text}\n```\n", rows[number]) for number, both in solutions.items() for text in both]
    graded = [reason == "correct" for reason in reasons(*items)]
    assert graded == [True, False] * len(solutions)


# --- under load ------------------------------------------------------------------------------------------------------


def load_items(count: int) -> list[CodeItem]:
    """Answers of all kinds; those that take time take far less, or far more, than their limit."""
    bodies = [
        "    return 2 * x",
        "    return x",
        "    return sum(range(10**6)) * 0 or 2 * x",
        "    raise KeyError(x)",
        "    import time\n    time.sleep(0.2)\n    return 2 * x",
        "    import os\n    os._exit(0)",
        "    while True: pass",
    ]
    kinds = [0, 1, 2, 3, 4, 0, 1, 5, 0, 2] * 9 + [6] * 2
    row = ROW | {"test_time_limit": 0.5}
    return [CodeItem(f"{bodies[kinds[i % len(kinds)]]}\n```", row) for i in range(count)]


def verdicts_idle_and_loaded(count: int) -> tuple[list[str], list[str]]:
    items = load_items(count)
    idle = [verdict.reason for verdict in grade_all(items, progress=False)]
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * os.cpu_count())]
    try:
        loaded = [verdict.reason for verdict in grade_all(items, progress=False)]
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    return idle, loaded


@pytest.mark.slow
def test_500_verdicts_do_not_depend_on_the_load(boxed):
    idle, loaded = verdicts_idle_and_loaded(500)
    assert idle == loaded
    assert idle.count("correct") == sum("2 * x" in item.text for item in load_items(500))


# --- the command -----------------------------------------------------------------------------------------------------


def grade_command(folder: Path, data_type: str, problems: list, answers: str, *options: str):
    (folder / "P.json").write_text(json.dumps(problems))
    (folder / "A.jsonl").write_text(answers)
    files = ("--problems", folder / "P.json", "--answers", folder / "A.jsonl", "--out", folder / "O.jsonl")
    command = [sys.executable, "-m", "t3d.evaluation.grade", "--data_type", data_type, *map(str, files), *options]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)


def lines(*answers: tuple[int, str]) -> str:
    return "".join(json.dumps({"index": index, "text": text}) + "\n" for index, text in answers)


def test_the_command_grades_programs(boxed, tmp_path):
    answers = lines((1, "    return 3 * x\n```"), (0, "    return x * 2\n```"), (0, "no"), (1, "    return 2 * x\n```"))
    run = grade_command(tmp_path, "code", [ROW, ROW], answers, "--workers", "2")
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in (tmp_path / "O.jsonl").read_text().splitlines()]
    assert [set(result) for result in results] == [{"index", "correct", "verdict", "seconds"}] * 4
    got = [(result["index"], result["correct"], result["verdict"]) for result in results]
    assert got == [(1, False, "wrong"), (0, True, "correct"), (0, False, "no_code"), (1, True, "correct")]
    assert "2 of 4 answers are correct: 50.0%" in run.stdout
    assert f"programs run in {sandbox.isolation()}" in run.stdout


def test_the_command_grades_mathematics(tmp_path):
    problems = [
        {"question": "?", "ground_truth_answer": "1,080"},
        {"question": "?", "ground_truth_answer": r"2\sqrt{2}"},
    ]
    answers = lines((1, r"\boxed{\sqrt{8}}"), (0, r"\boxed{1080}"), (0, "1080"), (1, r"\boxed{9^{9^{9^9}}}"))
    run = grade_command(tmp_path, "math", problems, answers, "--time-limit", "1")
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in (tmp_path / "O.jsonl").read_text().splitlines()]
    assert [result["verdict"] for result in results] == ["correct", "correct", "no_answer", "timeout"]
    assert "2 of 4 answers are correct" in run.stdout


def test_the_command_without_answers_has_none_to_grade(tmp_path):
    run = grade_command(tmp_path, "math", [{"question": "?", "ground_truth_answer": "1"}], "\n")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("0 answers\n")
    assert (tmp_path / "O.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("answers", "fault"),
    [
        ('{"index": 0, "text": "x"}\nnonsense\n', "A.jsonl: line 2: no JSON"),
        ("[1]\n", "A.jsonl: line 1: expected an object"),
        ('{"index": 0, "text": "x"}\n{"index": 1, "text": "x"}\n', "A.jsonl: line 2: field 'index' is 1"),
        ('{"index": "0", "text": "x"}\n', "A.jsonl: line 1: field 'index' is '0'"),
        ('{"index": -1, "text": "x"}\n', "A.jsonl: line 1: field 'index'"),
        ('{"index": true, "text": "x"}\n', "A.jsonl: line 1: field 'index'"),
        ('{"index": 0}\n', "A.jsonl: line 1: field 'text' must be text"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_input(tmp_path, answers, fault):
    run = grade_command(tmp_path, "math", [{"question": "?", "ground_truth_answer": "1"}], answers)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and fault in run.stderr
    assert not (tmp_path / "O.jsonl").exists()


def test_grading_needs_no_torch():
    script = (
        "import sys, t3d.evaluation.grade, t3d.grading.code, t3d.grading.math, t3d.grading.sandbox\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'omegaconf'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr

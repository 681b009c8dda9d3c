import datetime
import json
from pathlib import Path

import pytest

from t3d.tasks.problems import Problem, data_type_of, load_problems
from tests.conftest import raises_key

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(tmp_path, rows, name="Sums.json"):
    path = tmp_path / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


def test_rows_become_problems(tmp_path):
    rows = [
        {"question": "1+1?", "ground_truth_answer": "2", "level": 1},
        {"question": "2+2?", "ground_truth_answer": ""},
    ]
    path = write(tmp_path, rows)
    problems = load_problems(path, "math")
    assert problems == [Problem("Sums/0", rows[0]), Problem("Sums/1", rows[1])]
    assert [(p.question, p.ground_truth) for p in problems] == [("1+1?", "2"), ("2+2?", "")]
    assert load_problems(str(path), "math", limit=1) == problems[:1]


@pytest.mark.parametrize("mark", ["", "\N{ZERO WIDTH NO-BREAK SPACE}"])
def test_every_kind_of_file_with_and_without_a_byte_order_mark(tmp_path, mark):
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"{n}+1?", "ground_truth_answer": str(n + 1)} for n in range(3)]
    write(tmp_path, mark + json.dumps(rows))
    write(tmp_path, mark + "\n\n".join(map(json.dumps, rows)), "Sums.jsonl")
    dated = pyarrow.Table.from_pylist([row | {"made": datetime.date(2026, 1, 2)} for row in rows])
    pyarrow.parquet.write_table(dated, tmp_path / "Sums.parquet")
    for end in ("json", "jsonl", "parquet"):
        path = tmp_path / f"Sums.{end}"
        problems = load_problems(path, data_type_of(path, "auto"))
        assert [(p.id, p.question, p.ground_truth) for p in problems] == [
            (f"Sums/{n}", f"{n}+1?", str(n + 1)) for n in range(3)
        ]
        assert json.dumps([problem.raw for problem in problems])  # rows go into the rollouts' JSON


def test_some_kinds_need_no_answer(tmp_path):
    row = {"question": "Add.", "prefix": "def f", "test_list": ["assert f"], "test_method": "function"}
    script = {"question": "Add.", "test_method": "stdio", "test_input": ["1"], "test_output": ["2"], "prefix": "x"}
    path = write(tmp_path, [row, script])
    for kind in ("code", "text"):
        assert [(p.raw, p.ground_truth) for p in load_problems(path, kind)] == [(row, ""), (script, "")]


def test_the_first_row_tells_the_kind_of_a_data_set(tmp_path):
    sums = write(tmp_path, [{"question": "q", "ground_truth_answer": "1"}])
    code = write(tmp_path, [{"question": "q", "test_method": "stdio", "ground_truth_answer": "1"}], "Code.json")
    assert [data_type_of(path, "auto") for path in (sums, code)] == ["math", "code"]
    assert data_type_of(sums, "option") == "option"
    with raises_key("evaluation.data_type", "Sums.json: row 0"):
        data_type_of(write(tmp_path, [{"question": "q"}]), "auto")


@pytest.mark.parametrize(
    ("rows", "data_type", "key", "named"),
    [
        ([{"question": "q"}], "math", "ground_truth_answer", "{file}: row 0"),
        ([{"question": "q", "ground_truth_answer": "1"}, 5], "math", "{file}", "row 1"),
        ([{"question": " ", "ground_truth_answer": "1"}], "math", "question", "row 0"),
        ([{"question": "\ud83d", "ground_truth_answer": "1"}], "math", "{file}: row 0", r"'\ud83d'"),
        ([{"question": "q", "ground_truth_answer": 18}], "math", "ground_truth_answer", "text, found 18"),
        ([{"question": "q", "test_list": ["x"]}], "code", "test_method", "missing"),
        ([{"question": "q", "test_method": "function", "test_list": "x"}], "code", "test_list", "row 0"),
        ([{"question": "q", "test_method": "function", "test_list": []}], "code", "test_list", "row 0"),
        ([{"question": "q", "test_method": "stdio", "test_input": ["1"]}], "code", "test_output", "row 0"),
        ([{"question": "q", "test_method": "judge", "test_list": ["x"]}], "code", "test_method", "'judge'"),
        ([{"question": "q", "ground_truth_answer": "1"}], "poem", "evaluation.data_type", "=poem"),
        ([], "math", "{file}", "no rows"),
        ("{", "math", "{file}", "JSON list"),
        ('[{"question"', "math", "{file}", "row 0"),
    ],
)
def test_errors_name_file_row_field_and_remedy(tmp_path, rows, data_type, key, named):
    file = tmp_path / "Sums.json"
    with raises_key(key.format(file=file), named.format(file=file)):
        load_problems(write(tmp_path, rows), data_type)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("MATH500", "python data/download_data.py --dataset MATH500"),
        ("StoryMath_long", "python -m studies.storymath"),
        ("StoryCode_sft", "python -m studies.storycode --sft"),
        ("NoSuchSet", "give a file, or the name of a set: PrimeIntellect, MATH_train"),
    ],
)
def test_a_missing_set_says_how_to_get_it(tmp_path, name, remedy):
    with raises_key(tmp_path / f"{name}.json", remedy):
        load_problems(tmp_path / f"{name}.json", "math")


@pytest.mark.parametrize(
    ("name", "data_type", "n"),
    [("MATH500", "math", 500), ("GSM8K", "math", 1319), ("MATH_train", "math", 8523), ("HumanEval", "code", 164),
     ("MBPP", "code", 498)],
)  # fmt: skip
def test_the_real_sets_load(name, data_type, n):
    path = DATA / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"needs the real benchmark data at {DATA}")
    assert len(load_problems(path, data_type)) == n

import base64
import csv
import gzip
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from t3d.evaluation.answers import AnswerSet, find_answers, pack
from t3d.evaluation.plots import METHOD_COLOURS, OTHER_COLOURS
from t3d.evaluation.report import (
    main,
    markdown_table,
    print_table,
    read_log,
    split_blocks,
    step_colour,
    training_logs,
    write_report,
)
from tests.conftest import raises_key


def row(method, tokens_per_step, accuracy, **more):
    base = {"method": method, "dataset": "Sums", "block_size": 4, "tokens_per_step": tokens_per_step, "n": 500}
    base |= {"strategy": "low_confidence_static", "accuracy": accuracy, "ci_low": accuracy - 0.03}
    return base | {"ci_high": accuracy + 0.03, "tokens_per_forward": 1.234, "seconds": 5.06} | more


ROWS = [row("original", 1, 0.93), row("original", 4, 0.18), row("t3d", 1, 0.92), row("t3d", 4, 0.725)]
LOG = [
    {
        "step": s,
        "loss": 1.1,
        "ddo_real": 0.69,
        "ddo_fake": 0.35,
        "path": 0.3 / s,
        "reward_margin": 0.0,
        "ddo_accuracy": None,
    }
    for s in range(1, 401)
]
WALK = {
    "title": "T3D <student>",
    "question": "Is 1 < 2 & 3?",
    "ground_truth": "yes",
    "prompt": "<|im_start|>user",
    "tokens": ["a", "<script>", "\n", " ", "e"],
    "unmask_step": [1, 3, 2, 2, 4],
    "block_size": 4,
    "offset": 3,
    "correct": True,
    "steps": 4,
    "forwards": 6,
}


def report(tmp_path, **parts):
    given = {"title": "T", "results": ROWS, "training_logs": {"": LOG}, "walkthrough": [WALK]} | parts
    return write_report(tmp_path / "new" / "report.html", **given).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Gathers ids and references; fails on tags that close what is not open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references = [], [], re.findall(r"url\(([^)]*)\)", text)
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag not in ("link", "image", "img", "iframe")
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in ("href", "xlink:href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    text = report(tmp_path, training_logs={"a": LOG, "b": LOG})
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert page.references and {reference[1:] for reference in page.references} <= set(page.ids)
    assert "@import" not in text and "default-src 'none'" in text
    # accuracy against forwards and against steps, then a chart for each metric that was logged, with both runs in it
    assert text.count("<svg") == 2 + 5


def test_charts_keep_their_text_and_take_the_colour_of_the_page(tmp_path):
    page = report(tmp_path)
    assert "<figcaption>DDO, fake</figcaption>" in page
    for text in ("tokens per step (more is faster)", "Original", "T3D", "72", "80 %", "optimizer step"):
        assert re.search(rf"<text [^>]*>{re.escape(text)}</text>", page), text
    svgs = "".join(re.findall("<svg.*?</svg>", page, re.DOTALL))
    assert set(re.findall("#[0-9a-f]{6}\\b", svgs)) <= {*METHOD_COLOURS.values(), *OTHER_COLOURS}
    assert "currentColor" in svgs


def test_the_same_input_gives_the_same_file(tmp_path):
    assert report(tmp_path) == report(tmp_path)


def test_everything_from_outside_is_escaped(tmp_path):
    evil = '<script>alert(1)</script>&"'
    rows = [row(evil, 1, 0.5, dataset=evil, strategy=evil)]
    page = report(
        tmp_path,
        title=evil,
        results=rows,
        walkthrough=[WALK | {"question": evil, "prompt": evil, "ground_truth": evil}],
    )
    assert "<script>alert" not in page and "alert(1)" in page
    assert "&lt;script&gt;" in page and "T3D &lt;student&gt;" in page


def test_the_lead_says_the_effect_at_the_fastest_setting(tmp_path):
    text = re.sub("<[^>]+>", "", report(tmp_path))
    assert "At 4 tokens per step on Sums, the original model answers 18.0 % right, T3D 72.5 %." in text
    assert "72.0 – 75.5" not in text and "69.5 – 75.5" in text


def test_blocks_follow_the_absolute_grid():
    # Three positions of the first block belong to the prompt.
    assert split_blocks(6, 4, 3) == [range(0, 1), range(1, 5), range(5, 6)]
    assert split_blocks(4, 4, 0) == [range(0, 4)]
    assert split_blocks(2, 4, 1) == [range(0, 2)]


def test_tokens_carry_their_step_within_the_block(tmp_path):
    page = report(tmp_path)
    chips = re.findall(r'class="tok (r\d)" title="([^"]+)">([^<]+)<small>(\d)', page)
    assert [(c, text, step) for c, _, text, step in chips] == [
        ("r1", "a", "1"),
        ("r2", "&lt;script&gt;", "3"),
        ("r1", "↵", "2"),
        ("r1", "␣", "2"),
        ("r3", "e", "4"),
    ]
    assert chips[1][1] == "block 2, step 2 of 3 in it, step 3 of the answer"
    assert page.count('class="block"') == 2


def test_step_colours_run_from_dark_to_light():
    luminances = [sum(int(step_colour(rank, 8)[0][i : i + 2], 16) for i in (1, 3, 5)) for rank in (1, 4, 8)]
    assert luminances == sorted(luminances)
    assert step_colour(1, 4)[1] == "#fff" and step_colour(4, 4)[1] == "#000"
    assert step_colour(1, 1) == step_colour(1, 4)


def test_parts_without_input_are_left_out(tmp_path):
    page = report(tmp_path, results=[], training_logs=None, walkthrough=[])
    assert "<svg" not in page and "<table" not in page and "<h2" not in page


@pytest.mark.parametrize(
    "rows", [ROWS[:1], [row("sft", 1.9, 0.0, ci_low=0.0), row("t3d", 1.5, 1.0, strategy="sequential")]]
)
def test_unusual_results_are_drawn_too(tmp_path, rows):
    page = report(tmp_path, results=rows)
    assert page.count("<svg") == 2 + 5 and "nan" not in re.sub("<script>.*", "", page) and "class=lead" not in page


def test_print_table_is_aligned(capsys):
    print_table(ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Method    Data set  ") and set(lines[1]) == {"-", " "}
    assert all(text in lines[5] for text in ("T3D", "72.5 %", "69.5 – 75.5", "1.23"))
    column = lines[0].index("Accuracy") + len("Accuracy")
    assert all(line[:column].endswith("%") for line in lines[2:])


def test_one_table_of_several_folders(tmp_path, capsys, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(ROWS[:1]))
    monkeypatch.setattr(sys, "argv", ["report", *map(str, folders)])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| Run | Method |") and len(lines) == 4
    assert markdown_table([row("a|b", 1, 0.5)]).splitlines()[2].startswith("| a\\|b |")
    (tmp_path / "b" / "results.json").unlink()
    with raises_key(tmp_path / "b", "eval.py"):
        main()


def test_seeds_in_several_folders_become_one_table(tmp_path, capsys, monkeypatch):
    for seed, accuracy in ((1, 0.5), (2, 0.7)):
        folder = tmp_path / str(seed) / "results"
        folder.mkdir(parents=True)
        rows = [row("original", 4, accuracy, seed=seed), row("original", 4, 0.9, seed=seed, dataset="More|less")]
        (folder / "all.json").write_text(json.dumps(rows))
    files = (tmp_path / "t.csv", tmp_path / "new" / "t.html")
    line = ["report", str(tmp_path / "1"), str(tmp_path / "2"), "--csv", str(files[0]), "--html", str(files[1])]
    monkeypatch.setattr(sys, "argv", [*line, "--paper"])
    main()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("| Method | Data set | Tokens/step | Accuracy | Seeds |")
    assert "| Original | Sums | 4 | 60.0 ± 10.0 % | 2 |" in said[2]
    assert "More\\|less" in said[3] and "| Original | average | 4 | 75.0 ± 5.0 % |" in said[4]
    assert "**Table 1: few-step decoding, accuracy in %**" in said
    with open(files[0], newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["dataset"] for line in table] == ["Sums", "More|less", "average"]
    assert float(table[0]["accuracy"]) == pytest.approx(0.6) and json.loads(table[0]["seeds"]) == [1, 2]
    page = files[1].read_text()
    Page(page)
    assert "Table 1: few-step" in page and "60.0 ± 10.0 %" in page and page.count("<svg") == 4, "no plot of averages"


def test_a_sweep_has_its_plot_table_and_numbers(tmp_path, capsys, monkeypatch):
    sweep = [
        row(f"m{i}", 1.0 + speed, 0.9 - speed / 50, strategy="low_confidence_dynamic", seed=1,
            tokens_per_forward=1.0 + speed + i, decode={"dynamic_threshold": threshold})
        for i in range(12) for speed, threshold in ((0.0, 0.9), (1.0, 0.5))
    ]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(sweep))
    files = (tmp_path / "t.csv", tmp_path / "t.html")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "--csv", str(files[0]), "--html", str(files[1])])
    main()
    assert "**AUP: accuracy under parallelism" in capsys.readouterr().out
    with open(files[0], newline="") as file:
        assert all(float(line["aup"]) > 90 for line in csv.DictReader(file))
    page = files[1].read_text()
    Page(page)
    assert "Sums: accuracy against tokens per forward" in page and page.count("<svg") == 2
    assert all(re.search(rf">m{i}, AUP [\d.]+<", page) for i in range(12)), "any number of models"


def test_a_comparison_is_said_in_words(tmp_path, capsys, monkeypatch):
    for name, right in (("a", (True, False, False)), ("b", (True, True, True))):
        lines = [{"id": f"S/{i}/0", "question": str(i), "correct": correct} for i, correct in enumerate(right)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(sys, "argv", ["report", "--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    main()
    said = capsys.readouterr().out
    assert "questions in common: 3\naccuracy: A 33.3 %, B 100.0 %\nB - A: +66.7 points, 95 % interval" in said
    assert said.endswith("right in A only 0, in B only 2; McNemar's exact p = 0.5\n")
    monkeypatch.setattr(sys, "argv", ["report"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2


def test_a_log_cut_off_by_a_killed_run_is_read_up_to_there(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(path) == [{"step": 1}, {"step": 2}]


def test_importing_loads_no_heavy_library():
    names = "t3d.evaluation.report t3d.grading.math t3d.tasks.problems t3d.tasks.download t3d.data.prompts"
    code = f"import sys, {', '.join(names.split())}; "
    code += "sys.exit(bool({'torch', 'transformers', 'sympy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def record(number, correct, text="so 1 + 1 = 2", **more):
    base = {"id": f"Sums/{number}/0", "question": f"question {number}", "ground_truth": "2", "text": text}
    return base | {"extracted": "2", "correct": correct, "length": 9, "forwards": 7} | more


def unpacked(packed):
    return json.loads(gzip.decompress(base64.b64decode(packed.data)))


def test_questions_that_the_first_set_alone_gets_right_come_first():
    first = AnswerSet("A", "Sums", [record(0, True), record(1, False), record(2, False), record(3, True)])
    second = AnswerSet("B", "Sums", [record(0, True), record(1, False), record(2, True), record(3, False)])
    packed = pack([first, second])
    found = unpacked(packed)
    assert [one["question"][-1] for one in found["questions"]] == ["3", "2", "1", "0"]
    assert found["questions"][0]["answers"] == [["so 1 + 1 = 2", "2", right, 9, 7] for right in (True, False)]
    assert found["sets"] == [{"name": "A", "dataset": "Sums"}, {"name": "B", "dataset": "Sums"}]
    assert packed.shown == packed.all == 4 and packed.length is None


def test_sets_of_other_questions_stand_alone():
    sets = [AnswerSet("A", "Sums", [record(0, True)]), AnswerSet("B", "More", [record(0, True)])]
    assert [one["answers"].count(None) for one in unpacked(pack(sets))["questions"]] == [1, 1]


def test_too_much_text_loses_its_middle_and_then_questions():
    rng = random.Random(0)
    texts = ["begin " + "".join(rng.choices("abcdefghijklmnop +-=", k=3000)) + " end" for _ in range(60)]
    sets = [AnswerSet("A", "Sums", [record(i, True, text) for i, text in enumerate(texts)])]
    cut = pack(sets, limit=60_000)
    assert len(cut.data) <= 60_000 and cut.length == 1000 and cut.shown == 60
    text = unpacked(cut)["questions"][0]["answers"][0][0]
    assert text.startswith("begin ") and text.endswith(" end") and len(text) <= 1000
    fewer = pack(sets, limit=10_000)
    assert len(fewer.data) <= 10_000 and 1 <= fewer.shown < 60 == fewer.all


def unit(folder, name, rows, records):
    (folder / name).mkdir(parents=True)
    (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / name / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


def test_the_answers_below_a_folder_are_named_by_their_rows(tmp_path):
    for method in ("t3d", "original"):
        for speed in (1, 4):
            unit(tmp_path, f"{method}{speed}", [row(method, speed, 0.5)], [record(0, True)])
    (tmp_path / "all.json").write_text(json.dumps([row("original", 1, 0.5), row("t3d", 1, 0.5)]))
    unit(tmp_path, "text", [{k: v for k, v in row("original", 2, 0.5).items() if k != "accuracy"}], [])
    assert [one.name for one in find_answers([tmp_path, tmp_path])] == [
        *("Original, 1 token a step", "Original, 4 tokens a step", "T3D, 1 token a step", "T3D, 4 tokens a step"),
    ]


def test_a_page_of_a_thousand_answers_is_below_two_megabytes(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(3000)]
    sets = [
        AnswerSet(name, "Sums", [record(i, True, " ".join(rng.choices(words, k=500))) for i in range(1000)])
        for name in ("A", "B")
    ]
    page = report(tmp_path, answers=sets)
    assert len(page.encode()) < 2_000_000 and page.count("<svg") == 7
    Page(page)


def test_runs_share_the_axes_of_a_metric(tmp_path):
    page = report(
        tmp_path, training_logs={"slow": LOG, "fast": [one | {"grad_norm": 1.0, "nelbo": 1.1} for one in LOG[:100]]}
    )
    assert page.count("<figcaption>Loss</figcaption>") == page.count("<figcaption>Gradient norm</figcaption>") == 1
    assert "nelbo" not in page, "the loss itself is drawn once"
    assert "It falls and then levels off" in page and page.count(">slow</text>") == 5


def test_training_logs_are_found_and_named_by_what_differs(tmp_path):
    for run in ("a/math/x/run", "a/math/y/run"):
        (tmp_path / run / "ckpt" / "optimized" / "training").mkdir(parents=True)
        for place in (tmp_path / run, tmp_path / run / "ckpt" / "optimized" / "training"):
            (place / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert training_logs([str(tmp_path)]) == {
        name: (tmp_path / "a" / "math" / name / "run" / "log.jsonl").resolve() for name in ("x", "y")
    }
    assert list(training_logs([str(tmp_path / "a/math/x")])) == [""] and training_logs([]) == {}


def test_a_split_that_is_out_of_reach_has_no_plot(tmp_path):
    page = report(tmp_path, results=[*ROWS, row("original", 1, 0.01, dataset="Hard")], training_logs=None)
    assert page.count("<svg") == 2 and "Hard has no plot" in page and "1.0 %" in page


def test_two_runs_are_compared_on_the_page(tmp_path, capsys):
    unit(tmp_path, "a", [row("original", 1, 0.5)], [record(0, True), record(1, False)])
    unit(tmp_path, "b", [row("t3d", 1, 0.5)], [record(0, True), record(1, True)])
    main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b"), "--html", str(tmp_path / "c.html")])
    page = (tmp_path / "c.html").read_text()
    assert "McNemar" in page and "id=packed" in page and "McNemar" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


EVIL = "<img src=x onerror=document.title='taken'>"


@pytest.fixture(scope="module")
def browser(new_browser):
    return new_browser()


@pytest.fixture
def opened(browser, tmp_path):
    ones = [record(i, i % 4 > 0, question=f"{EVIL} {i}" if i == 30 else f"apples {i}") for i in range(60)]
    others = [record(i, i % 3 > 0, text=EVIL, question=one["question"]) for i, one in enumerate(ones)]
    sets = [AnswerSet("Original", "Sums", ones), AnswerSet("T3D", "Sums", others)]
    report(tmp_path, answers=[*sets, AnswerSet("elsewhere", "More", [record(0, True)])])
    browser.size(1100, 900)
    browser.open((tmp_path / "new" / "report.html").as_uri())
    browser.until("return !document.querySelector('#answers').hidden")
    yield browser
    assert browser.errors() == []


def choose(browser, selector, text):
    browser.run(
        "const field = document.querySelector(arguments[0]);"
        "field.value = [...field.options].find(o => o.textContent.startsWith(arguments[1])).value;"
        "field.dispatchEvent(new Event('change'))",
        selector,
        text,
    )


def test_answers_are_browsed(opened):
    cards = "#cards article"
    assert opened.texts("#filter option") == [
        *("A right, B wrong: 15", "A wrong, B right: 10", "both wrong: 5", "both right: 30", "all: 60"),
    ]
    assert len(opened.texts(cards)) == 15 and "✗ wrong · B: T3D" in opened.text(cards)
    assert "A 75.0 %, B 66.7 %" in opened.text("#sum")
    choose(opened, "#filter", "all")
    assert len(opened.texts(cards)) == 20
    opened.click("#more")
    assert len(opened.texts(cards)) == 40
    opened.type("#search", "30 apples")
    opened.until("return document.querySelectorAll('#cards article').length == 0")
    opened.type("#search", "onerror 30")
    opened.until("return document.querySelectorAll('#cards article').length == 1")
    assert EVIL in opened.text(cards) and not opened.run("return document.images.length")
    assert opened.run("return document.title") == "T"
    choose(opened, "#b", "nothing")
    assert opened.texts("#filter option") == ["wrong: 15", "right: 45", "all: 60"]
    choose(opened, "#a", "elsewhere")
    assert opened.texts("#b option") == ["nothing"]


def test_tables_sort(opened):
    column = opened.texts("th").index("Accuracy") + 1
    values = f"td:nth-child({column})"
    opened.click(f"th:nth-child({column}) button")
    assert [float(text.split()[0]) for text in opened.texts(values)] == [18.0, 72.5, 92.0, 93.0]
    opened.click(f"th:nth-child({column}) button")
    assert [float(text.split()[0]) for text in opened.texts(values)] == [93.0, 92.0, 72.5, 18.0]
    assert opened.run("return document.querySelector('th[aria-sort]').textContent") == "Accuracy"


def test_the_report_fits_a_phone(opened):
    opened.size(360, 700)
    assert opened.run("return document.documentElement.scrollWidth") <= 360

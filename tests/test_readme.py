"""README's Python example, as it is printed there."""

import re

from tests.conftest import ROOT


def test_the_python_example_answers_its_question_rightly(monkeypatch, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(ROOT)
    exec(example, {})
    assert r"\boxed{81}" in capsys.readouterr().out


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of every table row below a heading, up to the next heading."""
    below = page.split(heading, 1)[1].split("\n#", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in below.splitlines() if line[:1] == "|"]


def test_the_figures_are_those_of_the_results_page():
    results = (ROOT / "docs/RESULTS.md").read_text().split("## Block 8")[0]
    measured = {}
    for heading, columns in (("### Full-step decoding", 1), ("### Few-step decoding", 2)):
        for name, *cells in rows_of(results, heading):
            figures = [cell.replace("*", "").split(" ")[0] for cell in cells[:columns]]
            measured[name] = measured.get(name, []) + figures
    told = [cells[1:] for cells in rows_of((ROOT / "README.md").read_text(), "## Which method to use")[2:6]]
    assert told == [measured[name] for name in ("original", "t3d", "naive_td", "best")]

"""README's Python example, as it is printed there."""

import re

from tests.conftest import ROOT


def test_the_python_example_answers_its_question_rightly(monkeypatch, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(ROOT)
    exec(example, {})
    assert r"\boxed{81}" in capsys.readouterr().out

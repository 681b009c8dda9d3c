"""The documentation: its links, the commands in it, its generated reference, the site, and the notebook."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys

import pytest

from t3d.cli import COMMANDS
from t3d.common import paths
from t3d.common.options import keys_of
from tests.conftest import ROOT
from tests.training.conftest import log_of, overrides  # noqa: F401  (the fixture of a small training run)

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
PAGES = [page for page in PAGES if page.name != "contents.md"]  # make docs has made it
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def site():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    heads = re.findall(r"^#+ +(.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if re.match(r"https?:", target):
            continue
        place, _, anchor = target.partition("#")
        file = page if not place else (page.parent / place).resolve()
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name}: {target}"


def lines_of_commands(page) -> list[list[str]]:
    """The words of every `t3d ...` line in the page's shell blocks."""
    blocks = [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in ("bash", "sh")]
    joined = [line.strip() for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in joined if line.startswith("t3d ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_exist_with_their_keys(page):
    schemas = site().SCHEMAS
    for command, *words in lines_of_commands(page):
        assert command in COMMANDS, f"{page.name}: t3d {command}"
        if command not in schemas:
            continue
        known = {key.name for key in keys_of(site().named(schemas[command][0]))}
        for key, value in (word.split("=", 1) for word in words if re.match(r"[\w.]+=", word)):
            assert key in known | {"config"}, f"{page.name}: t3d {command} {key}"
            assert key != "config" or value in ("...", "FILE") or paths.resolve(value).is_file(), (
                f"{page.name}: {value}"
            )


def test_the_objective_of_the_tutorial_trains(tmp_path, overrides):  # noqa: F811
    text = (ROOT / "docs" / "OBJECTIVE.md").read_text()
    (example,) = re.findall(r"^```python title=focal.py\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "focal.py").write_text(example)
    line = overrides("focal", "training.objective=focal:Focal", "training.focal_gamma=1")
    command = [sys.executable, str(ROOT / "train" / "self_ddo_sdar_full.py"), *line]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = log_of(tmp_path / "tiny-teacher" / "math" / "p" / "focal")
    assert rows and all(0 < row["weight"] < 1 and row["loss"] > 0 for row in rows)


def test_the_reference_has_every_key_and_command():
    pages = site().pages()
    for place, _ in site().SCHEMAS.values():
        for key in keys_of(site().named(place)):
            assert f"| `{key.name}` |" in pages["reference/settings.md"]
            assert key.help, key.name
    for command in COMMANDS:
        assert f"## t3d {command}\n" in pages["reference/commands.md"]
    assert "usage: t3d report" in pages["reference/commands.md"]
    assert "load_decoder(source" in pages["reference/api.md"]


def test_the_site_has_every_page():
    written = {page.stem for page in (ROOT / "docs").glob("*.md")}
    made = {name.removesuffix(".md") for name in site().pages()}
    listed = [name for names in site().CONTENTS.values() for name in names]
    assert sorted(listed) == sorted((written | made) - {"contents"})


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name, reason="the extra docs is not installed")
    line = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q"]
    line += ["-c", "docs/site", "-d", str(tmp_path / "cache"), "docs", str(tmp_path / "site")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("index.html", "reference/settings.html", "FAQ.html"):
        assert (tmp_path / "site" / name).stat().st_size > 5000
    api = (tmp_path / "site" / "reference" / "api.html").read_text()
    assert "load_decoder" in api and "denoising_steps_per_block" in api


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom():
    nbclient = pytest.importorskip("nbclient", reason="the extra docs is not installed")
    nbformat = pytest.importorskip("nbformat", reason="the extra docs is not installed")
    pytest.importorskip("ipykernel", reason="the extra docs is not installed")
    notebook = nbformat.read(ROOT / "docs" / "start.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "4 steps a block: " in said and "forwards" in said and "| student | StoryMath_test |" in said


def test_the_notebook_holds_no_output():
    cells = json.loads((ROOT / "docs" / "start.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    for cell in code:
        compile("".join(cell["source"]), "start.ipynb", "exec")

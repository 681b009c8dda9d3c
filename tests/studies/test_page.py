"""The page from figures by hand: what is in its tables, what it says of itself, and its plots."""

import json

import pytest

from studies.domains import DOMAINS
from studies.storymath.page import write_page
from tests.conftest import raises_key

from .figures import ABLATIONS, CONVERSION, METHODS, RUNS, run


def written(folder, runs, methods=METHODS):
    figures, page = folder / "results" / "tables", folder / "RESULTS.md"
    figures.mkdir(parents=True)
    for i, one in enumerate(runs):
        (figures / f"run{i:02}.json").write_text(json.dumps(one))
    given = (figures, folder / "results" / "analysis", page, methods, ABLATIONS, CONVERSION, ("test", "long"), 32)
    write_page(DOMAINS["StoryMath"], *given)
    return page.read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return folder, written(folder, [*RUNS, run("gone", 1, (0.5, 0.5, 0.5))])


def part(text, *heads):
    """What stands below the headings, one inside the other, up to the next of the last one's kind or higher."""
    for head in heads:
        text = text[text.index(f"\n{head}\n") + len(head) + 2 :]
        marks = [f"\n{'#' * n} " for n in range(2, head.index(" ") + 1)]
        text = text[: min(text.index(mark) if mark in text else len(text) for mark in marks)]
    return text


def test_few_step(page):
    """Means over seeds; the error of two seeds is half their difference; the gain is over the teacher's same seeds."""
    few = part(page[1], "## Block 4", "### Few-step decoding, StoryMath_test")
    assert "| method | 2 tokens/step | 4 tokens/step | average | gain | tokens/forward at 4 | seeds |" in few
    assert "| original | 65.0 ± 2.9 | 25.0 ± 2.9 | 45.0 ± 2.9 |  | 0.75 | 3 |" in few
    assert "| redi | 10.0 ± 0.0 | 10.0 ± 0.0 | 10.0 ± 0.0 | -35.0 (-78 %) | 1.00 | 3 |" in few
    assert "| t3d | **85.0 ± 5.0** | **65.0 ± 5.0** | **75.0 ± 5.0** | +32.5 (+76 %) | 1.25 | 2 |" in few
    assert "DDO alone" not in few


def test_conversion(tmp_path):
    """The autoregressive model has blocks of 1, so it has one speed; its row is in no other table."""
    rows = [run("autoregressive", 1, (0.9,), block=1), run("opdlm", 1, (0.8, 0.6, 0.5)) | {"tokens": 2e6}]
    text = written(tmp_path, [*RUNS, *rows])
    table = part(text, "## From an autoregressive model")
    assert "| autoregressive | token by token |  | 90.0 (88.0–92.0) |  |  | 1 |" in table
    assert "| opdlm | soft targets | 2.00 M | 80.0 (78.0–82.0) | 60.0 (58.0–62.0) | 50.0 (48.0–52.0) | 1 |" in table
    assert "opdlm" not in part(text, "## Block 4") and "## Block 1" not in text


def test_full_step_keeps_no_bold_within_the_error(page):
    full = part(page[1], "## Block 4", "### Full-step decoding")
    assert "| t3d | 85.0 ± 5.0 | -5.0 | 1.25 | 2 |" in full and "| original | 90.0 ± 0.0 |  | 0.75 | 3 |" in full


def test_dynamic_and_the_harder_split(page):
    quick = part(page[1], "## Block 4", "### Dynamic decoding, threshold 0.9")
    assert "| t3d | 85.0 ± 5.0 | 2.50 ± 0.50 | 1.25 ± 0.25 | 40.0 ± 0.0 | 2 |" in quick
    hard = part(page[1], "## Block 4", "### The harder split, StoryMath_long")
    assert "| t3d | 42.5 ± 2.5 | **42.5 ± 2.5** | **32.5 ± 2.5** | **39.2 ± 0.8** | 1.25 | 2 |" in hard


def test_against_t3d_and_ablations(page):
    """Pairs are the seeds that both have, 1 and 3."""
    against = part(page[1], "## Block 4", "### Against T3D")
    assert "| redi | -75.0 ± 63.5 | -75.0 ± 63.5 | -55.0 ± 63.5 | -65.0 ± 63.5 | 2 |" in against
    assert "| t3d |" not in against
    ablations = part(page[1], "## Block 4", "### Ablations")
    assert "| t3d | **85.0 ± 5.0** |" in ablations
    assert "| t3d, DDO alone | 50.0 ± 0.0 | 50.0 ± 10.0 | 40.0 ± 10.0 | 46.7 ± 6.7 | 1.00 | 2 |" in ablations
    assert "| t3d, DDO alone | -35.0 ± 63.5 | -35.0 ± 63.5 | -25.0 ± 63.5 | -30.0 ± 63.5 | 2 |" in ablations


def test_one_seed_has_the_interval_of_its_questions(page):
    few = part(page[1], "## Block 8", "### Few-step decoding, StoryMath_test")
    line = "**80.0 (78.0–82.0)** | **60.0 (58.0–62.0)** | **40.0 (38.0–42.0)** | **60.0** | +26.7 (+80 %) | 1.00 | 1 |"
    assert f"| t3d | {line}" in few
    assert "| original | +2.0 | -20.0 | -30.0 | -30.0 | -26.7 | 1 |" in part(page[1], "## Block 8", "### Against T3D")
    assert "### Ablations" not in part(page[1], "## Block 8")


def test_it_says_what_is_not_there(page):
    told = page[1]
    assert "StoryMath is not MATH500" in told
    assert "Seeds: 1, 2, 3; problems per evaluation: 100. Not run: t3d (seed 2)." in told
    assert "Without any run: redi, x_T all masks." in told
    assert "tables.py no longer names them: gone." in told and "| gone |" not in told


def test_settings_and_commands(page):
    settings = part(page[1], "## Settings")
    assert "| original | the teacher as it is |  |  |  |  |" in settings
    assert "| t3d | `train.yaml` | 600 | 0.0005 | 4000 | 1.25 M |" in settings
    assert "| t3d, DDO alone | `train.yaml`; `training.lambda_path=0` | 600 |" in settings
    redi = "`redi.yaml`; rollouts: `rollout.random_init_ratio=0.1`; decoding: `rollout."
    assert f"| redi | {redi}" in settings
    assert "Every optimizer step takes 32 sequences." in settings
    assert "Answers are drawn at temperature 0.1" in settings
    commands = part(page[1], "## The commands")
    assert "python -m studies.storymath.tables --ablations --seeds 1\n" in commands  # as the Makefile has it
    assert "run06.json experiments/tables/run06-*   # one run again" in commands
    assert 'python -m studies.storymath.tables --methods "t3d" --blocks 4 --seeds 1\n' in commands


def test_settings_of_a_row_after_another(tmp_path):
    first = {"config": "redi.yaml", "training": ["training.random_start_ratio=0.7"], "rollouts": [], "decoding": []}
    text = written(tmp_path, [run("original", 1, (0.9, 0.6, 0.2)), run("redi", 1, (0.1, 0.1, 0.1), after=first)])
    row = "| redi | `redi.yaml`; `training.random_start_ratio=0.7`; then `redi.yaml`; rollouts: `rollout.random"
    assert row in part(text, "## Settings")


def test_at_a_glance(page):
    """What each method is, and means. A method without runs is left out."""
    glance = part(page[1], "## At a glance")
    heads = (
        "block 4, 1 token/step | block 4, 4 tokens/step | block 8, 1 token/step | block 8, 4 tokens/step | block 8, 8"
    )
    assert f"| method | description | {heads} tokens/step |" in glance
    assert "| t3d | DDO and path | 85.0 | 65.0 | 88.0 | 60.0 | 40.0 |" in glance
    assert "redi, x_T all masks" not in glance  # it has no run


def test_what_a_step_loses(tmp_path):
    """The teacher once a block size, each student beside it; risk and entropy are means over the states."""

    def model(loss: float) -> dict:
        states = [
            {"visible": 0, "cross_entropy": 0.4, "entropy": 0.5},
            {"visible": 1, "cross_entropy": 0.2, "entropy": 0.1},
        ]
        states = [state | {"cross_entropy_error": 0.01, "entropy_error": 0.01} for state in states]
        per_block = [{"tokens_per_step": n, "correlation": loss * n, "correlation_error": 0.01} for n in (2, 4)]
        return {"block_size": 4, "per_block": per_block, "states": states}

    folder = tmp_path / "results" / "analysis"
    folder.mkdir(parents=True)
    for name, loss in (("redi", 0.05), ("t3d", 0.1)):
        (folder / f"{name}-block4-seed1.json").write_text(json.dumps({"teacher": model(0.3), "student": model(loss)}))
    table = part(written(tmp_path, RUNS), "## The loss of a step")
    lines = [line for line in table.splitlines() if line.startswith("| 4")]
    assert lines == [
        "| 4 | original | 0.600 ± 0.010 | 1.200 ± 0.010 | 0.300 | 0.300 |",
        "| 4 | redi | 0.100 ± 0.010 | 0.200 ± 0.010 | 0.300 | 0.300 |",
        "| 4 | t3d | 0.200 ± 0.010 | 0.400 ± 0.010 | 0.300 | 0.300 |",
    ]
    assert "](results/tables/losses-block4.png)" in table
    assert (tmp_path / "results" / "tables" / "losses-block4.png").read_bytes().startswith(b"\x89PNG")
    assert "## The loss of a step" not in written(tmp_path / "none", RUNS)


def test_plots_are_there_and_shown(page):
    folder, text = page
    names = ["accuracy-block4", "ablations-block4", "accuracy-block8"]
    assert sorted(f"{name}.png" for name in names) == sorted(path.name for path in folder.rglob("*.png"))
    for name in names:
        assert f"](results/tables/{name}.png)" in text
        assert (folder / "results" / "tables" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_figures(tmp_path):
    with raises_key(tmp_path, "python -m studies.storymath.tables"):
        given = (tmp_path, tmp_path / "analysis", tmp_path / "RESULTS.md", METHODS, ABLATIONS, CONVERSION)
        write_page(DOMAINS["StoryMath"], *given, ("test", "long"), 32)


def test_a_torn_file_is_named(tmp_path):
    (tmp_path / "one.json").write_text('{"method": "t3d", "rows": [')
    with raises_key(tmp_path / "one.json"):
        given = (tmp_path, tmp_path / "analysis", tmp_path / "RESULTS.md", METHODS, ABLATIONS, CONVERSION)
        write_page(DOMAINS["StoryMath"], *given, ("test", "long"), 32)


def test_a_broken_run_stops_the_page(tmp_path):
    with raises_key("rows", "t3d, block 4, seed 1: 0 figures", "StoryMath_test"):
        written(tmp_path, [run("t3d", 1, (0.9, 0.8))])
    assert not (tmp_path / "RESULTS.md").exists()

"""What the plots draw, read back from their axes."""

import pytest
from matplotlib.figure import Figure

from studies.storymath import plots
from studies.storymath.estimates import by_method
from t3d.evaluation.plots import loss_plot

from .figures import METHODS, RUNS, SPLITS

NAMES = list(METHODS)


@pytest.fixture
def ax():
    return Figure(figsize=(7.5, 5.2), layout="constrained").add_subplot()


def test_variants_share_their_methods_colour_and_no_two_methods_one():
    styles = plots.looks(NAMES)
    assert styles["redi"]["color"] == styles["redi, x_T all masks"]["color"]
    assert styles["redi"]["ls"] != styles["redi, x_T all masks"]["ls"]
    assert len({styles[name]["color"] for name in ("original", "redi", "t3d")}) == 3
    ten = ["original", "t3d", *"abcdefgh"]
    assert len({style["color"] for style in plots.looks(ten).values()}) == 10


def test_accuracy_lines(ax):
    runs = by_method(RUNS, 4, NAMES)
    plots.accuracy_plot(ax, runs, plots.looks(NAMES), SPLITS[0], 4)
    lines = {bars.get_label(): bars.lines[0] for bars in ax.containers}
    assert list(lines) == ["original", "redi", "t3d"]
    assert lines["t3d"].get_ydata() == pytest.approx([85, 85, 65])
    assert lines["t3d"].get_xdata() == pytest.approx([1, 2, 4], rel=0.08), "slightly apart from the others"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["t3d", "original", "redi"], "as the lines end"


def test_ablation_rows_from_the_top(ax):
    runs = by_method(RUNS, 4, ["t3d", "t3d, DDO alone"])
    plots.ablation_plot(ax, runs, SPLITS[0], 4)
    labels = ax.get_yticklabels()
    assert [label.get_text() for label in labels] == ["t3d", "t3d, DDO alone"]
    assert [label.get_fontweight() for label in labels] == ["bold", "normal"]
    assert ax.yaxis_inverted()
    dots = {bars.get_label(): bars.lines[0].get_xdata() for bars in ax.containers}
    assert dots["1"] == pytest.approx([85, 50]) and dots["4"] == pytest.approx([65, 40])


def test_loss_panels():
    """Each panel has a line a model, with its standard errors."""
    rows = [{"tokens_per_step": n, "correlation": 0.1 * n, "correlation_error": 0.01} for n in (4, 2)]
    states = [{"visible": 0, "cross_entropy": 0.4, "cross_entropy_error": 0.02, "entropy": 0.5, "entropy_error": 0.03}]
    axes = Figure().subplots(1, 3)
    models = {name: {"per_block": rows, "states": states} for name in ("original", "t3d")}
    loss_plot(*axes, models=models, styles=plots.looks(NAMES))
    assert [[bars.get_label() for bars in ax.containers] for ax in axes] == [["original", "t3d"]] * 3
    assert axes[0].containers[0].lines[0].get_xydata().tolist() == [[2, 0.2], [4, 0.4]]
    assert axes[2].containers[1].lines[0].get_xydata().tolist() == [[0, 0.5]]


def test_the_same_figures_give_the_same_file(tmp_path):
    runs = by_method(RUNS, 4, NAMES)
    for name in ("one.png", "other.png"):
        plots.save(tmp_path / name, (4, 3), lambda ax: plots.ablation_plot(ax, runs, SPLITS[0], 4))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()

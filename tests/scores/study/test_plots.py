"""What the plots draw, read back from their axes."""

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from t3d.scores.study import plots
from t3d.scores.study.estimates import by_method

from .figures import METHODS, RUNS, SPLITS, run

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


def test_both_names_every_point_and_no_name_covers_another(ax):
    """Six methods at nearly the same place, and one at 100 %, which a logit axis has not."""
    runs = {f"method {i}": [run(f"method {i}", 1, (0.95, 0.8 + i / 500, 0.7))] for i in range(6)}
    runs["perfect"] = [run("perfect", 1, (1.0, 0.98, 0.98))]
    plots.both_plot(ax, runs, plots.looks(list(runs)), SPLITS[0], 4)
    ax.figure.draw_without_rendering()
    assert sorted(text.get_text() for text in ax.texts) == sorted(runs)
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without its line
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_no_name_covers_a_bar(ax):
    """Single seeds, whose intervals are wide."""
    found = {"original": (0.975, 0.655, 0.226), "naive_td": (0.967, 0.917, 0.813), "t3d": (0.965, 0.885, 0.778)}
    runs = {name: [run(name, 1, accuracies)] for name, accuracies in found.items()}
    plots.both_plot(ax, runs, plots.looks(list(runs)), SPLITS[0], 4)
    ax.figure.draw_without_rendering()
    bars = [
        Bbox(ax.transData.transform(ends))
        for container in ax.containers
        for lines in container.lines[2]
        for ends in lines.get_segments()
    ]
    assert len(bars) == 6
    for text in ax.texts:
        box = Text.get_window_extent(text)
        assert not any(box.overlaps(bar) for bar in bars), text.get_text()


def test_ablation_rows_from_the_top(ax):
    runs = by_method(RUNS, 4, ["t3d", "t3d, DDO alone"])
    plots.ablation_plot(ax, runs, SPLITS[0], 4)
    labels = ax.get_yticklabels()
    assert [label.get_text() for label in labels] == ["t3d", "t3d, DDO alone"]
    assert [label.get_fontweight() for label in labels] == ["bold", "normal"]
    assert ax.yaxis_inverted()
    dots = {bars.get_label(): bars.lines[0].get_xdata() for bars in ax.containers}
    assert dots["1"] == pytest.approx([85, 50]) and dots["4"] == pytest.approx([65, 40])


def test_the_same_figures_give_the_same_file(tmp_path):
    runs = by_method(RUNS, 4, NAMES)
    for name in ("one.png", "other.png"):
        plots.save(tmp_path / name, (4, 3), lambda ax: plots.ablation_plot(ax, runs, SPLITS[0], 4))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()

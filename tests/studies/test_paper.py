"""The transcription of the paper's tables, as far as their own redundancy can check it."""

import json

import pytest

from studies.storymath.page import PAPER
from studies.storymath.paper import section, wrong_averages

DATA = json.loads(PAPER.read_text())


def test_averages_are_the_means_of_their_columns_but_for_two_misprints():
    assert wrong_averages(DATA["few_step"]) == [
        "SFT of SDAR-4B-Chat at 2 tokens/step",
        "Naive TD of SDAR-4B-Chat at 4 tokens/step",
    ]


@pytest.mark.parametrize("model", ["SDAR-1.7B-Chat", "SDAR-4B-Chat"])
@pytest.mark.parametrize("speed", ["2", "4"])
def test_gains_follow_from_the_averages(model, speed):
    lines = DATA["few_step"][model][speed]
    base = lines["Original"][-2]
    assert lines["Original"][-1] is None
    for method, (*_, average, gain) in lines.items():
        if method != "Original":
            assert gain == pytest.approx(100 * (average / base - 1), abs=0.1), method


def test_throughput_times_latency_is_the_length():
    for lines in DATA["dynamic"]["SDAR-4B-Chat"].values():
        for rate, latency, steps, length, _ in lines.values():
            assert rate * latency == pytest.approx(length, rel=0.04) and steps < length


def test_every_table_has_all_its_columns():
    for table in ("few_step", "full_step", "dynamic", "ablations"):
        width = len(DATA[table]["columns"])
        stack = [value for key, value in DATA[table].items() if key != "columns"]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                stack += value.values()
            else:
                assert len(value) == width


def test_the_section_says_where_it_is_from():
    text = section(DATA)
    assert "arXiv 2602.12262v1" in text and "https://arxiv.org/html/2602.12262v1" in text
    assert "none is ours" in " ".join(text.split())
    t3d = "47.80 | 69.90 | 22.60 | 23.78 | 44.80 | 63.99 | 21.20 | 23.17 | 39.66 | 85.02"
    assert f"| 4 | T3D | {t3d} |" in text
    assert "| DDO + path |  | 60.60 | 41.00 |" in text
    assert "the average is not the mean of its columns for SFT of SDAR-4B-Chat at 2 tokens/step; Naive TD" in text

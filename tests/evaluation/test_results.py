"""Rows of results: read back, averaged, compared. Expected numbers are worked out here by hand."""

import json
import os
from dataclasses import asdict

import pytest

from t3d.blocks.settings import DecodeSettings
from t3d.evaluation.results import (
    average,
    compare,
    for_people,
    fullest,
    over_seeds,
    pool_nodes,
    read_results,
    tell_apart,
)
from t3d.evaluation.statistics import wilson_interval
from tests.conftest import raises_key


def row(accuracy: float, dataset: str = "Sums", **more) -> dict:
    n = more.get("n", 100)
    low, high = wilson_interval(round(accuracy * n), n)
    base = {"method": "original", "model": "m", "dataset": dataset, "block_size": 4, "tokens_per_step": 2.0}
    base |= {"denoising_steps_per_block": 2, "strategy": "low_confidence_static", "temperature": 0.1, "seed": 1}
    return base | {"n": n, "accuracy": accuracy, "ci_low": low, "ci_high": high, "decode": {"top_k": 0}} | more


def write(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def test_all_results_below_a_folder_are_found_once(tmp_path):
    write(tmp_path / "a" / "results" / "x.json", [row(0.5)])
    write(tmp_path / "results.json", [row(0.5), row(0.7, seed=2), row(0.6, dataset="average")])  # of the whole set
    write(tmp_path / "a" / "temp_data" / "outputs.json", [{"question": "q", "full_output": ["method accuracy"]}])
    write(tmp_path / "a" / "x" / "settings.json", {"method": 1})
    found = read_results(tmp_path)
    assert sorted(r["accuracy"] for r in found) == [0.5, 0.7]
    assert read_results(tmp_path / "a" / "results" / "x.json") == [row(0.5, decode=asdict(DecodeSettings()))]

    write(tmp_path / "b.json", [row(0.9)])  # evaluated anew: the newest counts
    os.utime(tmp_path / "b.json", ns=(2**62, 2**62))
    assert sorted(r["accuracy"] for r in read_results(tmp_path)) == [0.7, 0.9]

    write(tmp_path / "c.json", [{"method": "original", "tokens_per_step": 1.0}])
    with raises_key("block_size", "c.json: row 0"):
        read_results(tmp_path)
    for other in ({"method": 1}, ["method"]):
        write(tmp_path / "d.json", other)
        with raises_key(tmp_path / "d.json"):
            read_results(tmp_path / "d.json")
    with raises_key(tmp_path / "none"):
        read_results(tmp_path / "none")


def test_seeds_become_a_mean_with_its_standard_error():
    rows = [row(0.5, seed=1), row(0.6, seed=2), row(0.7, seed=3), row(0.9, temperature=1.0)]
    mean, alone = over_seeds(rows)
    assert mean["accuracy"] == pytest.approx(0.6) and mean["accuracy_sem"] == pytest.approx(0.1 / 3**0.5)
    assert mean["seeds"] == [1, 2, 3] and mean["n"] == 100 and "seed" not in mean and "ci_low" not in mean
    assert alone == rows[3]


def test_seeds_from_before_a_setting_was_known_merge_with_later_ones(tmp_path):
    """Each in a file of its own; another value than the default is another setting."""
    today = asdict(DecodeSettings())
    before = {name: value for name, value in today.items() if name != "energy_candidates"}
    for seed, decode in ((1, before), (2, today), (3, today | {"energy_candidates": 4})):
        (tmp_path / f"{seed}.json").write_text(json.dumps([row(0.5, seed=seed, decode=decode)]))
    merged = over_seeds(read_results(tmp_path))
    assert sorted(len(one.get("seeds", [0])) for one in merged) == [1, 2]


def test_measured_speeds_do_not_part_the_seeds_of_dynamic_decoding():
    dynamic = {"strategy": "low_confidence_dynamic"}
    (mean,) = over_seeds([row(0.5, tokens_per_step=2.1, **dynamic), row(0.7, tokens_per_step=2.3, seed=2, **dynamic)])
    assert mean["tokens_per_step"] == pytest.approx(2.2)
    assert len(over_seeds([row(0.5), row(0.5, tokens_per_step=4.0, seed=2)])) == 2


def test_runs_that_share_a_seed_are_not_taken_for_seeds():
    a, b = row(0.5, run="x"), row(0.7, run="y", model="n")
    assert tell_apart([a, row(0.7, run="y", seed=2)]) == [row(0.5), row(0.7, seed=2)]
    assert tell_apart([a, b]) == [a, b] and len(over_seeds(tell_apart([a, b]))) == 2
    same_folder = tell_apart([row(0.5, model="p/m"), row(0.7, model="p/n")])
    assert [r["method"] for r in same_folder] == ["original (m)", "original (n)"]
    assert [r["accuracy"] for r in over_seeds([row(0.5), row(0.7)])] == [0.5, 0.7]


def test_averages_over_data_sets_are_made_per_seed():
    rows = [row(score, name, seed=seed) for seed, scores in ((1, (0.2, 0.6)), (2, (0.4, 1.0)))
            for name, score in zip(("A", "B"), scores, strict=True)]  # fmt: skip
    first, second = average(rows)
    assert (first["accuracy"], second["accuracy"]) == (pytest.approx(0.4), pytest.approx(0.7))
    assert first["datasets"] == ["A", "B"] and first["n"] == 200 and first["dataset"] == "average"
    halves = [(r["ci_high"] - r["ci_low"]) / 2 for r in rows[:2]]
    assert first["ci_high"] - first["accuracy"] == pytest.approx((halves[0] ** 2 + halves[1] ** 2) ** 0.5 / 2)
    mean = next(r for r in for_people(rows) if r["dataset"] == "average")
    assert mean["accuracy"] == pytest.approx(0.55) and mean["accuracy_sem"] == pytest.approx(0.15)
    assert average(rows[:1]) == []


def test_a_trial_run_does_not_enter_an_average():
    rows = [row(0.2, "A"), row(0.9, "A", n=10), row(0.6, "B")]
    assert fullest(rows) == [rows[0], rows[2]]
    assert [r["accuracy"] for r in average(rows)] == [pytest.approx(0.4)]


def test_rows_stand_in_an_order_for_people():
    rows = [
        row(0.5, "A", method="t3d"),
        row(0.5, "A", tokens_per_step=4.0),
        row(0.5, "A", strategy="low_confidence_dynamic", tokens_per_step=1.5),
        row(0.5, "B"),
        row(0.5, "A"),
        row(0.5, "A", block_size=8),
    ]
    places = [(r["dataset"], r["block_size"], r["strategy"][15:], r["tokens_per_step"], r["method"]) for r in
              for_people(rows)][:6]  # fmt: skip
    assert places == [
        ("A", 4, "static", 2.0, "original"),
        ("A", 4, "static", 2.0, "t3d"),
        ("A", 4, "static", 4.0, "original"),
        ("A", 4, "dynamic", 1.5, "original"),
        ("A", 8, "static", 2.0, "original"),
        ("B", 4, "static", 2.0, "original"),
    ]


def test_parts_of_several_machines_become_one_row():
    measured = {"steps_per_answer": 10.0, "forwards_per_answer": 12.0, "latency_mean": 1.0, "tokens_per_second": 50.0}
    measured |= {"seconds": 7.0}
    parts = [
        row(0.5, n=20, questions=20, mean_length=20.0, node="0/2", **measured),
        row(0.8, n=10, questions=10, mean_length=50.0, node="1/2", **measured),
    ]
    (whole,) = pool_nodes(parts)
    assert whole["n"] == 30 and whole["accuracy"] == pytest.approx(18 / 30) and "node" not in whole
    assert (whole["ci_low"], whole["ci_high"]) == wilson_interval(18, 30)
    assert whole["mean_length"] == pytest.approx(30) and whole["measured_tokens_per_step"] == pytest.approx(3)
    assert whole["tokens_per_second"] == 100 and whole["seconds"] == 7
    assert pool_nodes([*parts, parts[0] | {"n": 2, "questions": 2, "accuracy": 0.0}]) == [whole], "a trial run"
    with raises_key("node", "0/2"):
        pool_nodes(parts[:1])
    for nodes in (["0/2", "1/2", "2/3"], ["2/3", "1/2", "0/2"], ["0/2", "2/3"]):  # those of 3 nodes were left behind
        with raises_key("node", nodes[0], "2/3"):
            pool_nodes([row(0.5, node=node) for node in nodes])
    assert pool_nodes([row(0.5)]) == [row(0.5)]


# --- comparisons -----------------------------------------------------------------------------------------------------


def records(folder, right: dict[str, list[bool]], question="q{}\u2028a text may hold a line separator"):
    lines = [
        {"id": f"{id}/{k}", "question": question.format(id), "correct": correct}
        for id, answers in right.items()
        for k, correct in enumerate(answers)
    ]
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write(folder.with_suffix(".json"), [row(0.5)])
    return folder


def test_two_runs_are_compared_question_by_question(tmp_path):
    a = {f"S/{i}": [i < 6] for i in range(20)}  # the first six
    b = {f"S/{i}": [i == 0 or 6 <= i < 15] for i in range(21)}  # the first, and nine others; one question more
    found = compare(records(tmp_path / "a", a), records(tmp_path / "b", b).with_suffix(".json"))
    assert (found["n"], found["left_out"], found["first_only"], found["second_only"]) == (20, 1, 5, 9)
    assert (found["first"], found["second"], found["difference"]) == pytest.approx((0.3, 0.5, 0.2))
    tail = sum((1, 14, 91, 364, 1001, 2002))  # C(14, 0) .. C(14, 5)
    assert found["p"] == pytest.approx(2 * tail / 2**14)
    assert found["ci_low"] < 0 < found["difference"] < found["ci_high"]
    # The spread of the 20 differences, five of -1 and nine of +1, gives the interval.
    error = ((14 / 20 - 0.2**2) / 20) ** 0.5
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_several_answers_per_question_are_compared_by_their_share(tmp_path):
    a = records(tmp_path / "a", {"S/0": [True, False], "S/1": [False, False]})
    b = records(tmp_path / "b", {"S/0": [True, True], "S/1": [False, True]})
    found = compare(a, b)
    assert found["difference"] == pytest.approx(0.5) and "p" not in found


def test_runs_that_cannot_be_compared(tmp_path):
    a = records(tmp_path / "a", {"S/0": [True]})
    with raises_key("question", "S/0"):
        compare(a, records(tmp_path / "b", {"S/0": [True]}, question="other {}"))
    with raises_key(tmp_path / "c"):
        compare(a, records(tmp_path / "c", {"T/0": [True]}))
    with raises_key(tmp_path / "none" / "records.jsonl"):
        compare(a, tmp_path / "none")

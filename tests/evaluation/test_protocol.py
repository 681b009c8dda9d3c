"""The paper's settings and its tables."""

import math

from t3d.common.options import load
from t3d.evaluation.protocol import aup_tables, paper_tables, settings
from t3d.evaluation.results import for_people
from t3d.evaluation.settings import EvalConfig
from t3d.rollout.settings import RolloutConfig
from tests.conftest import raises_key
from tests.evaluation.test_results import row


def test_settings_of_the_paper():
    def found(protocol, blocks=(4, 8)):
        chosen = settings(RolloutConfig(dynamic_threshold=0.5, top_k=7), protocol, blocks)
        assert all(setting.top_k == 7 for setting in chosen)
        return [
            (s.block_size, s.denoising_steps_per_block, s.remasking_strategy.rpartition("_")[2], s.dynamic_threshold)
            for s in chosen
        ]

    few = [(4, 2, "static", 0.5), (4, 1, "static", 0.5), (8, 4, "static", 0.5), (8, 2, "static", 0.5)]
    full, dynamic = [(4, 4, "static", 0.5), (8, 8, "static", 0.5)], [(4, 4, "dynamic", 0.9)]
    assert found("few_step") == few and found("full_step") == full and found("dynamic") == dynamic
    assert found("paper") == few + full + dynamic
    assert found("paper", [4]) == few[:2] + full[:1] + dynamic


def test_tables_of_the_paper():
    rows = [
        row(score, name, method=method, tokens_per_step=speed, denoising_steps_per_block=4 / speed, seed=seed)
        for method, speed, seed, scores in (
            ("original", 2.0, 1, (0.4, 0.6)),
            ("t3d", 2.0, 1, (0.7, 0.8)),
            ("t3d", 2.0, 2, (0.8, 0.9)),
            ("original", 1.0, 1, (0.9, 1.0)),
        )
        for name, score in zip(("A", "B"), scores, strict=True)
    ]
    rows.append(row(0.1, "A", method="original", n=10))  # a trial run of fewer questions
    speeds = {"tokens_per_second": 123.4, "latency_mean": 30.0, "steps_per_answer": 20.0, "mean_length": 50.0}
    rows.append(row(0.5, "A", strategy="low_confidence_dynamic", tokens_per_step=2.5, **speeds))
    few, full, dynamic = paper_tables(rows)
    assert few.columns == ["Block", "Tokens/step", "Method", "A", "B", "Average", "Gain, %"]
    assert few.cells == [
        ["4", "2", "Original", "40.0", "60.0", "50.0", ""],
        ["4", "2", "T3D", "75.0 ± 5.0", "85.0 ± 5.0", "80.0 ± 5.0", "+60.0"],
    ]
    assert full.columns[-1] == "Average" and full.cells == [["4", "1", "Original", "90.0", "100.0", "95.0"]]
    (line,) = [dict(zip(dynamic.columns, cells, strict=True)) for cells in dynamic.cells]
    # 50 tokens at 123.4 a second; one answer among those in flight took 30 s
    assert line["Latency, s"] == "0.41" and line["In flight, s"] == "30.00" and line["Tokens/s"] == "123"
    assert (line["Steps"], line["Length"], line["Tokens/step"], line["Accuracy, %"]) == ("20.0", "50.0", "2.50", "50.0")
    assert paper_tables([]) == []


def sweep(method, points, **more):
    """Rows of dynamic decoding at several thresholds."""
    return [
        row(accuracy, method=method, strategy="low_confidence_dynamic", tokens_per_forward=speed,
            tokens_per_step=speed, decode={"dynamic_threshold": threshold}, **more)
        for threshold, speed, accuracy in points
    ]  # fmt: skip


def test_a_sweep_is_one_setting_for_each_threshold():
    chosen = settings(RolloutConfig(), "sweep", [4, 8], [0.5, 0.9])
    found = [(s.block_size, s.denoising_steps_per_block, s.remasking_strategy, s.dynamic_threshold) for s in chosen]
    assert found == [(b, b, "low_confidence_dynamic", t) for b in (4, 8) for t in (0.5, 0.9)]
    with raises_key("evaluation.thresholds"):
        load(EvalConfig, ["evaluation.thresholds=[0.9]"])


def test_aup_of_every_method_over_its_sweep():
    slow, fast = [(0.9, 1.0, 0.8), (0.5, 2.0, 0.76)], [(0.9, 2.0, 0.8), (0.5, 3.0, 0.8)]
    rows = [r for seed in (1, 2) for r in sweep("original", slow, seed=seed)] + sweep("t3d", fast)
    rows += [row(0.9, strategy="low_confidence_dynamic", dataset="Other", decode={"dynamic_threshold": 0.9})]
    (table,) = aup_tables(rows)
    weighted = 76 * math.exp(-3 * (1 - 76 / 80))
    assert table.columns == ["Block", "Method", "Strategy", "Sums"]
    assert table.cells == [
        ["4", "Original", "dynamic", f"{80 + (80 + weighted) / 2:.1f}"],
        ["4", "T3D", "dynamic", f"{2 * 80 + 80:.1f}"],
    ]
    assert [r.get("aup") for r in for_people(sweep("t3d", fast))] == [240.0, 240.0], "for the CSV"
    assert aup_tables(rows[:1]) == [] and aup_tables([row(0.5)]) == []


def test_an_energy_is_a_method_at_fixed_tokens_per_step():
    (table,) = paper_tables([row(0.5), row(0.7, method="edlm", strategy="low_confidence_static+energy16")])
    assert [line[2:4] for line in table.cells] == [["Original", "50.0"], ["edlm", "70.0"]]
    assert not paper_tables([row(0.7, strategy="low_confidence_static+verify")])


def test_averages_over_different_data_sets_are_not_compared():
    rows = [row(0.5, "A"), row(0.5, "B"), row(0.5, "A", method="t3d"), row(0.9, "B", method="t3d"), row(0.1, "C")]
    (table,) = paper_tables(rows)
    assert table.columns[-1] == "Average", "the original's average is over three sets, the other's over two"


def test_other_settings_stand_in_lines_of_their_own():
    (table,) = paper_tables([row(0.5), row(0.7, temperature=1.0), row(0.6, method="t3d", temperature=1.0)])
    assert [line[2:] for line in table.cells] == [
        ["Original", "50.0", ""],
        ["Original", "70.0", ""],
        ["T3D", "60.0", "-14.3"],
    ]

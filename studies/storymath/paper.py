"""The paper's own figures: the tables of docs/results/paper.json, as printed, without figures of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t3d.evaluation.tables import Table


def section(paper: Mapping[str, Any]) -> str:
    """Few-step, full-step and dynamic decoding, and the ablations, with their source."""
    odd = "; ".join(wrong_averages(paper["few_step"]))
    parts = [
        f"""## The paper's own figures

{paper["source"]} ({paper["url"]}). The paper's authors measured these accuracies on real models and benchmarks; none
is ours. Their models were trained at block 8 on rollouts at block 4. Figures are in per cent, printed without
intervals. Later versions of the paper may print other figures. EDLM is in none of these tables.""",
        "### Few-step decoding",
        *_tables(paper["few_step"], "tokens/step", "method"),
        f"As printed: the average is not the mean of its columns for {odd}." if odd else "",
        "### Full-step decoding (block 4, one token per step)",
        *_tables(paper["full_step"], "method"),
        "### Dynamic decoding (block 4, threshold 0.9, temperature 0.1)",
        *_tables(paper["dynamic"], "data set", "method"),
        "### Ablations (MATH500)",
        *_tables(paper["ablations"], "method"),
        "As printed: a row that also stands in a table above does not always agree with it.",
    ]
    return "\n\n".join(filter(None, parts))


def wrong_averages(few: Mapping[str, Any]) -> list[str]:
    """The rows whose printed average differs from the mean of its columns by more than rounding."""
    return [
        f"{name} of {model} at {speed} tokens/step"
        for model, lines in _models(few)
        for (speed, name), (*columns, average, _) in _flat(lines, 2)
        if abs(sum(columns) / len(columns) - average) > 0.01
    ]


def _tables(data: Mapping[str, Any], *keys: str) -> list[str]:
    """One table a model; `keys` head the nested names before the figures."""
    heads = [*keys, *data["columns"]]
    return [
        Table(
            model, heads, [[*names, *map(_cell, values)] for names, values in _flat(lines, len(keys))], keys
        ).markdown()
        for model, lines in _models(data)
    ]


def _models(data: Mapping[str, Any]) -> list[tuple[str, Mapping]]:
    return [(model, lines) for model, lines in data.items() if model != "columns"]


def _flat(lines: Mapping[str, Any], depth: int) -> Iterator[tuple[tuple[str, ...], Sequence[Any]]]:
    """(names, figures) of every row below `depth` levels of names; the last figure may be None."""
    for name, below in lines.items():
        if depth == 1:
            yield (name,), below
        else:
            for names, values in _flat(below, depth - 1):
                yield (name, *names), values


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

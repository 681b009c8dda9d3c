"""The report's file and page: which parts ran, and their rows."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # case, metric, value, baseline, ratio; see studies.benchmarks.measure.row


@dataclass
class Outcome:
    """One part. state: finished, out of time, failed or not run; seconds, limit: wall clock; reason: of a failure."""

    name: str
    state: str = "not run"
    seconds: float = 0.0
    limit: float = 0.0
    reason: str = ""
    rows: list[Row] = field(default_factory=list)


def read_rows(file: Path) -> list[Row]:
    """The rows that a part has written, one JSON object a line; a torn last line is left out."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def write(folder: Path, outcomes: Sequence[Outcome], **context: Any) -> None:
    """Write ``report.json`` and ``report.md``. A stop in between leaves the earlier files whole."""
    report = {"context": context, "parts": [asdict(outcome) for outcome in outcomes]}
    for name, text in (("report.json", json.dumps(report, indent=1) + "\n"), ("report.md", page(outcomes, context))):
        fresh = folder / f".{name}"
        fresh.write_text(text)
        os.replace(fresh, folder / name)


def page(outcomes: Sequence[Outcome], context: dict[str, Any]) -> str:
    """The Markdown page: conditions, the parts' states, and a table for each part."""
    lines = ["# Report of a GPU", "", *(f"- {name}: {value}" for name, value in context.items()), ""]
    lines += ["| part | state | seconds | limit | reason |", "| --- | --- | --- | --- | --- |"]
    for o in outcomes:
        reason = o.reason.replace("|", "/")
        lines.append(f"| {o.name} | {o.state} | {o.seconds:.0f} | {o.limit:.0f} | {reason} |")
    for o in outcomes:
        if o.rows:
            lines += ["", f"## {o.name}", "", "| case | metric | value | baseline | ratio |", "| --- " * 5 + "|"]
            lines += [_line(row) for row in o.rows]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    shown = [_shown(row.get(key)) for key in ("value", "baseline", "ratio")]
    return f"| {row['case']} | {row['metric']} | {' | '.join(shown)} |"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")

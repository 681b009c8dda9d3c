"""A table of texts: aligned for the terminal, and as Markdown. The report's template writes it as HTML."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """title; columns: their heads; cells: one list of texts per line; text: the columns without numbers."""

    title: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    text: Collection[str] = ()

    def without_empty(self, *columns: str) -> Table:
        """The table without the named columns that are empty in every line."""
        keep = [i for i, name in enumerate(self.columns) if name not in columns or any(line[i] for line in self.cells)]
        cells = [[line[i] for i in keep] for line in self.cells]
        return Table(self.title, [self.columns[i] for i in keep], cells, self.text)

    def plain(self) -> str:
        lines = [list(self.columns), *self.cells]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        marks = [f"{{:{'<' if name in self.text else '>'}{n}}}" for name, n in zip(self.columns, widths, strict=True)]
        body = ["  ".join(marks).format(*line).rstrip() for line in lines]
        return "\n".join([self.title, *body] if self.title else body)

    def markdown(self) -> str:
        rule = ["---" if name in self.text else "---:" for name in self.columns]
        lines = [list(self.columns), rule, *self.cells]
        body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *body] if self.title else body)


def percent(row: Mapping[str, Any]) -> str:
    """A row's accuracy in per cent, with the standard error if it is a mean over seeds."""
    error = f" ± {100 * row['accuracy_sem']:.1f}" if row.get("accuracy_sem") is not None else ""
    return f"{100 * row['accuracy']:.1f}{error}"

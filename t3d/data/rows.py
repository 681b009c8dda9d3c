"""Rows of a data file: a .json list, a .jsonl or a .parquet file, read as a stream."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t3d.common.errors import UserError
from t3d.common.jsonfiles import read_json_array


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Stream a file's rows. A byte-order mark is skipped.

    Raises:
        UserError: no such file, or a row that cannot be read; the message names the file and the line or row.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist", str(path))
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return _read_lines(path) if path.suffix == ".jsonl" else read_json_array(path)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}", str(path)) from error
            if not text.strip():
                continue
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object", str(path))
            yield row


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            for row in batch.to_pylist():
                yield json.loads(json.dumps(row, default=str))  # dates and bytes become text, as in JSON
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file that can be read: {error}", str(path)) from error


def column(row: dict[str, Any], key: str) -> Any:
    """The value under a key, or None. Dots lead into nested objects and lists ("conversations.0.value")."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if isinstance(value, list):
            value = value[int(part)] if part.isdecimal() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value

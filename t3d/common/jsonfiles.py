"""Files and folders that appear whole or not at all, and JSON lists of any size as streams."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from t3d.common.errors import UserError, disk_faults_as_user_errors

log = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[str]]:
    """A text file that appears under its name only when it is complete. UserError if the disk refuses it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_faults_as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder that takes its name when the block ends without an error, in place of an older folder."""
    path = Path(path)
    fresh, stale = (path.with_name(f".{kind}-{path.name}") for kind in ("tmp", "old"))
    try:
        for leftover in (fresh, stale):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        if path.exists():
            path.rename(stale)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(stale, ignore_errors=True)  # not where an error came between the two renames


def write_json_array(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as a JSON list, one row a line, streaming and atomic. Returns how many."""
    count = 0
    with atomic_write(path) as file:
        for count, row in enumerate(rows, 1):
            file.write("[\n" if count == 1 else ",\n")
            file.write(json.dumps(row, ensure_ascii=False))  # json.dump does not use the module's C code
        file.write("\n]\n" if count else "[]\n")
    return count


def read_json_array(path: str | Path, chunk: int = 1 << 20) -> Iterator[dict[str, Any]]:
    """Stream the objects of a JSON list of any size and layout. `UserError` if the file is no such list."""
    path, decoder, count = Path(path), json.JSONDecoder(), 0
    if not path.is_file():
        raise UserError(f"{path} does not exist", str(path))
    with open(path, encoding="utf-8-sig") as file:
        while (first := _text(file, 1)).isspace():
            pass
        if first != "[":
            raise UserError(f"{path} is not a JSON list of rows", str(path))
        buffer = ""
        while True:
            buffer = buffer.lstrip(" \t\r\n,")
            if buffer.startswith("]"):
                return
            if buffer and not buffer.startswith("{"):
                raise UserError(f"{path}, row {count}: not a JSON object", str(path))
            try:
                row, end = decoder.raw_decode(buffer)
            except ValueError as error:
                more = _text(file, max(chunk, len(buffer)))  # doubling keeps a huge row linear
                if not more:
                    raise UserError(f"{path}, row {count}: incomplete or broken JSON ({error})", str(path)) from error
                buffer += more
                continue
            yield row
            buffer, count = buffer[end:], count + 1


def check_characters(where: str, value: Any) -> None:
    """`UserError`, "<where>: ...", if a value holds half of a surrogate pair. Tokenizers and files refuse it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{where}: {half!a} is half of a character; correct or remove the row", where) from None


def _text(file: IO[str], size: int) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.name} is not text in UTF-8 ({error.reason}); give a JSON file", str(file.name)
        ) from None

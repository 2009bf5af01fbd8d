"""Records of local files: rows of tables, JSON objects and lines, compressed or not."""

import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

Record = dict[str, Any]
# A record and the line that it ends on, for messages.
Records = Iterator[tuple[int, Record]]

_OPENERS: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".xz": lzma.open}
_TABLES = (".tsv", ".txt", ".csv")


class DataError(ValueError):
    """Data that does not fit; the message is one sentence for the person who provided it."""


def read_records(
    path: Path,
    formats: Sequence[str],
    *,
    columns: tuple[str, ...] | None = None,
    quoting: bool | None = None,
) -> list[tuple[int, Record]]:
    """Reads all records of a file.

    Args:
        path: The file; what it holds is told by the end of its name, before .gz or .xz.
        formats: The ends that fit, among .tsv, .txt, .csv (tables), .json and .jsonl.
        columns: Names of the columns of a table that has no header line.
        quoting: Whether double quotes enclose a table's fields; None means yes for .csv alone.

    Returns:
        The records, each with the line that it ends on, or in a .json file its number.

    Raises:
        DataError: If the file is missing, damaged, empty or of another format.
    """
    suffix = _suffix(path, formats)

    def parse(file: TextIO) -> list[tuple[int, Record]]:
        if suffix in _TABLES:
            return list(_rows(file, path, suffix, columns, quoting))
        return list(_lines(file, path) if suffix == ".jsonl" else _array(file, path))

    records = _read(path, parse)
    if not records:
        raise DataError(f"`{path}` holds no examples")
    return records


def read_text(path: Path) -> str:
    """Reads a text file.

    Args:
        path: The file: .txt, also with .gz or .xz.

    Returns:
        The text, not empty.

    Raises:
        DataError: If the file is missing, damaged, empty or of another format.
    """
    _suffix(path, (".txt",))
    text = _read(path, lambda file: file.read())
    if not text.strip():
        raise DataError(f"`{path}` holds no text")
    return text


def field_of(record: Record, name: str, path: Path | str, line: int) -> Any:
    """A field that a record must have.

    Args:
        record: The record.
        name: The field's name.
        path: The file, or the dataset's name, for the message.
        line: The record's line, for the message.

    Returns:
        The field's value.

    Raises:
        DataError: If the record has no such field.
    """
    if name not in record:
        raise DataError(f"`{path}`, line {line}: no column `{name}`; there are {', '.join(record)}")
    return record[name]


def _suffix(path: Path, formats: Sequence[str]) -> str:
    compression = path.suffix if path.suffix in _OPENERS else ""
    suffix = Path(path.name.removesuffix(compression)).suffix
    if suffix not in formats:
        raise DataError(
            f"`{path}` must end in {', '.join(formats)}, and may add {' or '.join(_OPENERS)}"
        )
    return suffix


def _read(path: Path, parse: Callable[[TextIO], Any]) -> Any:
    try:
        # utf-8-sig drops the byte order mark that some tools write; newlines are the parsers'.
        opener = _OPENERS.get(path.suffix, open)
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            return parse(file)
    except UnicodeDecodeError:
        raise DataError(f"`{path}` is not UTF-8 text") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"cannot read `{path}`: {getattr(error, 'strerror', None) or error}"
        ) from None


def _rows(
    file: TextIO, path: Path, suffix: str, columns: Sequence[str] | None, quoting: bool | None
) -> Records:
    quoted = suffix == ".csv" if quoting is None else quoting
    reader = csv.reader(
        file,
        delimiter="," if suffix == ".csv" else "\t",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        for row in reader:
            if not row:  # a blank line, as often at the end of a file
                continue
            if columns is None:
                columns = row
                continue
            if len(row) != len(columns):
                raise DataError(
                    f"`{path}`, line {reader.line_num}: {len(row)} fields, but there are "
                    f"{len(columns)} columns ({', '.join(columns)})"
                )
            yield reader.line_num, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise DataError(f"`{path}`, line {reader.line_num}: {error}") from None


def _lines(file: TextIO, path: Path) -> Records:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"`{path}`, line {number}: not JSON: {error.msg}") from None
        yield number, _object(record, path, number)


def _array(file: TextIO, path: Path) -> Records:
    try:
        records = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(f"`{path}`, line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(records, list):
        raise DataError(f"`{path}` must be a JSON array of objects")
    for number, record in enumerate(records, start=1):
        yield number, _object(record, path, number)


def _object(record: Any, path: Path, number: int) -> Record:
    if not isinstance(record, dict):
        raise DataError(f"`{path}`, line {number}: must be a JSON object")
    return record

"""Files of text: one format for each suffix, packed or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from cospadi.calibration.texts.documents import Conversation
from cospadi.calibration.texts.records import Records, kind, parsed
from cospadi.errors import CalibrationError

Document = str | Conversation


def read_file(path: Path, records: Records) -> Iterator[Document]:
    """The documents of a file.

    Lines and rows are read as they are asked for; ``.txt``, ``.md``, ``.json`` and ``.csv`` at once.

    Args:
        path: its suffix, before ``.gz`` or ``.zst``, says the format.
        records: turns records into documents.

    Raises:
        CalibrationError: if it cannot be read (naming byte, line or row), or its suffix is unknown.
    """
    suffix = text_suffix(path)
    if suffix not in READERS:
        raise CalibrationError(f"{path}: {path.suffix or 'a file without a suffix'} is not one of {LISTED}")
    try:
        with opened(path) as stream:
            yield from READERS[suffix](stream, str(path), records)
    except (OSError, EOFError, zlib.error) as error:
        cause = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CalibrationError(f"{path}: cannot be read: {cause}") from None


def read_stream(stream: IO[bytes], where: str, records: Records) -> Iterator[Document]:
    """The documents of a stream without a name: a JSON list or JSON lines if it begins so, else one of plain text.

    Args:
        stream: standard input, or a pipe.
        where: what messages call it.
        records: turns records into documents.

    Raises:
        CalibrationError: if it is not UTF-8, or malformed after a beginning that is JSON.
    """
    data = stream.read()
    text = decoded(data, where)
    first = text.lstrip()[:1]
    if first == "[" or (first and first in '{"' and _is_json(text.lstrip().split("\n", 1)[0])):
        yield from _json(io.BytesIO(data), where, records, one=True)
    else:
        yield _newlines(text)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def text_suffix(path: Path) -> str:
    """The suffix that says the format, in lower case, without that of the packing."""
    return (Path(path.stem).suffix if path.suffix.lower() in PACKED else path.suffix).lower()


def opened(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked as they are read."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow  # a dependency of datasets; Python itself reads zstd from 3.14 on

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd"))
    return path.open("rb")


def decoded(data: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 as text, without a byte-order mark.

    Raises:
        CalibrationError: naming the first byte that is not UTF-8, counted from `offset`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset + error.start}); convert it "
            "to UTF-8"
        ) from None
    return text if offset else text.removeprefix("\ufeff")


def _newlines(text: str) -> str:
    """Line endings as in Python's text mode.

    Models have hardly seen carriage returns, and a perplexity must not depend on the system that saved the file.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _plain(stream: IO[bytes], where: str, records: Records) -> Iterator[Document]:
    yield _newlines(decoded(stream.read(), where))


def _lines(stream: IO[bytes], where: str, records: Records) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(stream, 1):  # bytes split at \n alone; JSON strings may hold U+2028 and similar
        text = decoded(line, where, offset)
        offset += len(line)
        if text.strip():
            yield records.document(parsed(text, where, number), f"{where}: line {number}")


def _json(stream: IO[bytes], where: str, records: Records, one: bool = False) -> Iterator[Document]:
    """A list of strings or records, or JSON lines under the wrong suffix; with `one`, also a single record."""
    data = stream.read()
    try:
        found = parsed(decoded(data, where), where)
    except CalibrationError as error:
        if "Extra data" not in str(error):
            raise
        yield from _lines(io.BytesIO(data), where, records)
        return
    if one and not isinstance(found, list):
        found = [found]
    if not isinstance(found, list):
        raise CalibrationError(f"{where}: must contain a list of strings or records, not {kind(found)}")
    for number, record in enumerate(found, 1):
        yield records.document(record, f"{where}: entry {number}")


def _csv(stream: IO[bytes], where: str, records: Records) -> Iterator[Document]:
    text = decoded(stream.read(), where)
    before = csv.field_size_limit(2**31 - 1)  # documents may be longer than the 128 KiB that it allows
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader]
        header = reader.fieldnames
    except csv.Error as error:
        raise CalibrationError(f"{where}: malformed CSV on line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(before)
    if header:
        records.wanted(header, where, "column")
    for number, row in rows:
        yield records.document(row, f"{where}: line {number}")


def _parquet(stream: IO[bytes], where: str, records: Records) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        # a parquet file begins at its end, and what is packed can only be read forwards
        file = parquet.ParquetFile(io.BytesIO(stream.read()) if where.lower().endswith(PACKED) else stream)
        names = file.schema_arrow.names
        columns = [*records.wanted(names, f"{where}:", "column"), *(["tools"] if "tools" in names else [])]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield records.document(record, f"{where}: row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{where}: not a readable parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[IO[bytes], str, Records], Iterator[Document]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
PACKED = (".gz", ".zst")
LISTED = f"{', '.join(READERS)} (each also with {' or '.join(PACKED)})"
"""The accepted suffixes, for messages."""
STRUCTURED = (".jsonl", ".json", ".csv", ".parquet")
"""Suffixes of files of records."""


def is_readable(path: Path) -> bool:
    """Whether a file's name says that it holds text."""
    return text_suffix(path) in READERS

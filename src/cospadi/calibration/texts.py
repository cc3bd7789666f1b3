"""Reading calibration and evaluation texts: files, lists, and hub datasets."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cospadi.errors import CalibrationError

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
HUB_CHARACTERS = 16_000_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.+-]+){0,2}")


@dataclass(frozen=True)
class Texts:
    """Documents in order.

    Attributes:
        documents: at least one; documents of only whitespace are left out.
        source: their origin, for reports.
        notes: remarks for the report.
    """

    documents: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.documents)


def read_texts(
    source: "str | Path | list[str] | tuple[str, ...] | Texts",
    *,
    field: str = "text",
    hub_characters: int = HUB_CHARACTERS,
) -> Texts:
    """Read documents.

    Args:
        source: a list or tuple of documents; a file: ``.txt`` (one document; every line ending becomes a newline),
            ``.json`` (a list of strings or records), ``.jsonl`` (one string or record per line), ``.parquet``; or, if
            no such file exists, a hub dataset as ``name``, ``name:split`` or ``name:configuration:split`` (default
            split: train), which is streamed. Only a hub dataset uses the network.
        field: the field of a record that holds the text.
        hub_characters: number of characters to take from the start of a hub dataset.

    Returns:
        the documents.

    Raises:
        CalibrationError: if the text is missing, empty, not UTF-8 (naming the byte), malformed (naming the line), or
            has records without `field` (naming the line and what it has).
    """
    if isinstance(source, Texts):
        return source
    if isinstance(source, (list, tuple)):
        return _checked(_strings(source, "the list", field), "a list of documents")
    if not isinstance(source, (str, Path)):
        raise CalibrationError(
            f"a text must be a file, the name of a hub dataset or a list of documents, not {source!r}"
        )
    path = Path(source).expanduser()
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError:  # longer than a file name can be
        raise CalibrationError(
            f"{str(source)[:40]!r}…: there is no such file; to pass the text itself, put it into a list"
        ) from None
    if folder:
        raise CalibrationError(f"{source}: is a directory; pass a file ({', '.join(SUFFIXES)})")
    if file:
        return _checked(_read_file(path, field), str(source))
    if isinstance(source, Path) or path.suffix.lower() in SUFFIXES or not _HUB_NAME.fullmatch(source):
        raise CalibrationError(f"{source}: there is no such file")
    return _read_hub(source, field, hub_characters)


def _checked(documents: Iterator[str], source: str, notes: tuple[str, ...] = ()) -> Texts:
    kept, blank = [], 0
    for document in documents:
        if document.strip():
            kept.append(document)
        else:
            blank += 1
    if not kept:
        raise CalibrationError(f"{source}: contains no text")
    if blank:
        notes = (*notes, f"{blank} empty documents left out")
    return Texts(tuple(kept), source, notes)


def _read_file(path: Path, field: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, field)
    if suffix not in SUFFIXES:
        raise CalibrationError(f"{path}: {suffix or 'a file without a suffix'} is not one of {', '.join(SUFFIXES)}")
    text = _decode(path)
    if suffix == ".txt":
        # line endings as in Python's text mode: models have hardly seen carriage returns, and a perplexity must not
        # depend on the system that saved the file
        return iter([text.replace("\r\n", "\n").replace("\r", "\n")])
    if suffix == ".json":
        records = _parsed(text, str(path))
        if not isinstance(records, list):
            raise CalibrationError(f"{path}: must contain a list of strings or records, not {_kind(records)}")
        return _strings(records, str(path), field, what="entry")
    return _read_lines(path, text, field)


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}); convert it to UTF-8"
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from None


def _read_lines(path: Path, text: str, field: str) -> Iterator[str]:
    # split at newlines only: str.splitlines also splits at U+2028 and similar, which JSON allows inside strings
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        yield _text_of(_parsed(line, str(path), number), f"{path}: line {number}", field)


def _parsed(text: str, where: str, line: int | None = None) -> Any:
    """Parsed JSON of a whole file, or of one of its lines."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: malformed JSON on line {line or error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # more digits or brackets than Python reads
        place = f"line {line}" if line else "the file"
        raise CalibrationError(f"{where}: {place} cannot be read as JSON: {str(error).split(';')[0]}") from None


def _strings(records: Sequence[Any], where: str, field: str, what: str = "item") -> Iterator[str]:
    for number, record in enumerate(records, 1):
        yield _text_of(record, f"{where}: {what} {number}", field)


def _text_of(record: Any, where: str, field: str) -> str:
    if isinstance(record, str):
        return _sound(record, where)
    if not isinstance(record, dict):
        raise CalibrationError(f"{where} is {_kind(record)}, neither a string nor a record")
    if field not in record:
        keys = ", ".join(map(repr, record)) or "nothing"
        raise CalibrationError(f"{where} has no field {field!r} (it has {keys})")
    if not isinstance(record[field], str):
        raise CalibrationError(f"{where}: field {field!r} is {_kind(record[field])}, not a string")
    return _sound(record[field], where)


def _sound(text: str, where: str) -> str:
    """Refuse unpaired surrogates, which JSON escapes can express but no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: character {error.start} is an unpaired surrogate, which is not text"
        ) from None
    return text


def _kind(value: Any) -> str:
    names = {dict: "a record", list: "a list", str: "a string", bool: "a truth value", int: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            raise CalibrationError(f"{path}: has no column {field!r} (it has {', '.join(map(repr, names)) or 'none'})")
        number = 0
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _text_of({field: value}, f"{path}: row {number}", field)
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


def _read_hub(source: str, field: str, characters: int) -> Texts:
    from datasets import load_dataset

    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    configuration = rest[0] if len(rest) == 2 else None
    documents: list[str] = []
    taken = 0
    try:
        for number, record in enumerate(load_dataset(name, configuration, split=split, streaming=True), 1):
            documents.append(_text_of(record, f"{source}: record {number}", field))
            taken += len(documents[-1])
            if taken >= characters:
                break
    except CalibrationError:
        raise
    except Exception as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise CalibrationError(f"{source}: neither a local file nor a reachable hub dataset: {cause[0]}") from error
    notes = (f"the first {len(documents)} documents of {source}",) if taken >= characters else ()
    return _checked(iter(documents), source, notes)

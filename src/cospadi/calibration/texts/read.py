"""Reading texts: whatever people have, as documents in order."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

from cospadi.calibration.texts.documents import Texts
from cospadi.calibration.texts.files import LISTED, READERS, Document, read_file, read_stream, text_suffix
from cospadi.calibration.texts.folders import read_folder
from cospadi.calibration.texts.hub import HUB_NAME, read_hub
from cospadi.calibration.texts.records import Records
from cospadi.errors import CalibrationError

TextSource = str | Path | Texts | Iterable[Any]
"""A file, a directory, a hub data set, ``-``, or documents in memory."""
ACCEPTED = f"a file ({LISTED}), a directory of them, - for standard input, or a hub dataset"
"""What a text may be on the command line, for messages."""
STDIN = "standard input"
CHARACTERS = 16_000_000
"""How much is taken from what has no end: hub data sets, generators, streamed data sets."""


def described(source: TextSource) -> str:
    """What reports call a text."""
    if isinstance(source, Texts):
        return source.source
    if isinstance(source, (str, Path)):
        return STDIN if source == "-" else str(source)
    if isinstance(source, (list, tuple)):
        return "a list of documents"
    name = type(source).__name__
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def short_name(source: TextSource) -> str:
    """The same, of a file or directory without the way to it."""
    name = described(source)
    return Path(name).name if isinstance(source, (str, Path)) else name


def read_texts(source: TextSource, *, field: str | None = None, characters: int = CHARACTERS) -> Texts:
    """Read documents.

    Args:
        source: a file: ``.txt`` and ``.md`` (one document; every line ending becomes a newline), ``.json`` (a list of
            strings or records), ``.jsonl`` (one string or record per line), ``.csv`` (a header and rows), ``.parquet``,
            each also ``.gz`` or ``.zst``; a directory of such files, or one written by ``save_to_disk`` of datasets;
            ``-``: standard input; if there is no such file, a hub data set as ``name``, ``name:split`` or
            ``name:configuration:split`` (default split: train), which is streamed and alone uses the network. Or
            documents in memory: anything that yields strings or records, such as a list, a generator, a ``Dataset`` or
            ``IterableDataset``, or a column of one.
        field: the field of a record that holds the text or the messages; None: ``text``, else ``messages`` (or
            ``conversations``), else ``prompt`` and ``completion``.
        characters: how many to take from the start of a hub data set, and of iterables without a length.

    Returns:
        the documents; conversations are rendered when a tokenizer is known, see
        :func:`~cospadi.calibration.texts.render.rendered`.

    Raises:
        CalibrationError: if the text is missing, empty, not UTF-8 (naming the byte), malformed (naming the line), or
            has records without text (naming the line and what it has).
    """
    if isinstance(source, Texts):
        return source
    records = Records(field)
    if isinstance(source, (str, Path)):
        return _named(source, records, characters)
    documents = _in_memory(source, records)
    limit = None if isinstance(source, Sized) else characters
    return _checked(documents, described(source), records, limit=limit)


def _named(source: str | Path, records: Records, characters: int) -> Texts:
    if source == "-":
        return _checked(read_stream(sys.stdin.buffer, STDIN, records), STDIN, records)
    path = Path(source).expanduser()
    try:
        folder, file, pipe = path.is_dir(), path.is_file(), path.is_fifo()
    except OSError:  # longer than a file name can be
        raise CalibrationError(
            f"{str(source)[:40]!r}…: there is no such file; to pass the text itself, put it into a list"
        ) from None
    if folder:
        documents, notes = read_folder(path, records)
        return _checked(documents, str(source), records, notes)
    if pipe:
        with path.open("rb") as stream:
            return _checked(read_stream(stream, str(source), records), str(source), records)
    if file:
        return _checked(read_file(path, records), str(source), records)
    if isinstance(source, Path) or text_suffix(path) in READERS or not HUB_NAME.fullmatch(source):
        raise CalibrationError(f"{source}: there is no such file")
    return _checked(read_hub(source, records), source, records, limit=characters)


def _in_memory(source: Any, records: Records) -> Iterator[Document]:
    if hasattr(source, "iloc") and hasattr(source, "columns"):  # a data frame, which yields the names of its columns
        source = source.to_dict("records")
    if isinstance(source, Mapping):
        names = ", ".join(map(repr, source)) or "nothing"
        raise CalibrationError(
            f"a text must be documents in order, not a {type(source).__name__} (it has {names}): pass one of its "
            "splits, or a list of records"
        )
    if not isinstance(source, Iterable) or isinstance(source, (bytes, bytearray)):
        raise CalibrationError(
            f"a text must be a file, a directory, the name of a hub dataset or documents in memory, not {source!r}"
        )
    where = "the list" if isinstance(source, (list, tuple)) else described(source).replace("a ", "the ", 1)
    for number, record in enumerate(source, 1):
        yield records.document(record, f"{where}: item {number}")


def _checked(
    documents: Iterator[Document], source: str, records: Records, notes: tuple[str, ...] = (), limit: int | None = None
) -> Texts:
    """The documents that are not blank, up to a number of characters."""
    kept: list[Document] = []
    blank = taken = 0
    for document in documents:
        if isinstance(document, str) and not document.strip():
            blank += 1
            continue
        kept.append(document)
        taken += len(document)
        if limit is not None and taken >= limit:
            notes = (*notes, f"the first {len(kept)} documents of {source}")
            break
    if not kept:
        raise CalibrationError(f"{source}: contains no text")
    if blank:
        notes = (*notes, f"{blank} empty documents left out")
    return Texts(tuple(kept), source, notes, records.fields)

"""Directories of text: files of any accepted kind, or a data set as ``save_to_disk`` of datasets writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cospadi.calibration.texts.files import LISTED, STRUCTURED, Document, is_readable, read_file, text_suffix
from cospadi.calibration.texts.records import Records
from cospadi.errors import CalibrationError


def read_folder(folder: Path, records: Records) -> tuple[Iterator[Document], tuple[str, ...]]:
    """The documents of a directory and everything below it, in the order of the paths.

    Hidden files are left out, as are files of other kinds, and a README.md beside files of records, which describes
    them.

    Args:
        folder: a directory.
        records: turns records into documents.

    Returns:
        the documents, read as they are asked for; what was read, for the report.

    Raises:
        CalibrationError: if it holds no text, or several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if len(splits) != 1:
            shown = ", ".join(splits) or "none"
            raise CalibrationError(f"{folder}: holds the splits {shown}; name one of them, such as {folder / 'train'}")
        folder = folder / splits[0]
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved(folder, records), ("written by save_to_disk of datasets",)
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path.relative_to(folder))]
    files = [path for path in inside if is_readable(path)]
    if any(text_suffix(path) in STRUCTURED for path in files):
        files = [path for path in files if path.name.lower() != "readme.md"]
    if not files:
        raise CalibrationError(f"{folder}: this directory has no text; it may hold {LISTED}")
    kinds = Counter("".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix for path in files)
    counted = ", ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items()))
    notes = [f"{len(files)} files: {counted}"]
    if len(inside) > len(files):
        notes.append(f"{len(inside) - len(files)} files of other kinds left out")
    return (document for path in files for document in read_file(path, records)), tuple(notes)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _saved(folder: Path, records: Records) -> Iterator[Document]:
    from datasets import load_from_disk

    try:
        rows: Any = load_from_disk(str(folder))
        names = records.wanted(rows.column_names, f"{folder}:", "column")
        rows = rows.select_columns([*names, *(["tools"] if "tools" in rows.column_names else [])])
        for number, row in enumerate(rows, 1):
            yield records.document(row, f"{folder}: row {number}")
    except CalibrationError:
        raise
    except Exception as error:  # whatever datasets raises for files that are damaged or of another version
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"{folder}: cannot be read by datasets: {cause}") from error

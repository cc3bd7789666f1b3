"""Data sets of the hub, streamed: the only text that uses the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cospadi.calibration.texts.files import Document
from cospadi.calibration.texts.records import Records
from cospadi.errors import CalibrationError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.+-]+){0,2}")


def read_hub(source: str, records: Records) -> Iterator[Document]:
    """The documents of ``name``, ``name:split`` or ``name:configuration:split`` (default split: train).

    Raises:
        CalibrationError: if there is no such data set, or a record holds no text.
    """
    from datasets import load_dataset

    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    configuration = rest[0] if len(rest) == 2 else None
    try:
        rows: Any = load_dataset(name, configuration, split=split, streaming=True)
        for number, record in enumerate(rows, 1):
            yield records.document(record, f"{source}: record {number}")
    except CalibrationError:
        raise
    except Exception as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise CalibrationError(f"{source}: neither a local file nor a reachable hub dataset: {cause[0]}") from error

"""From a record to a document: which of its fields hold the text."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cospadi.calibration.texts.documents import Conversation
from cospadi.errors import CalibrationError

FORMS = (("text",), ("messages",), ("conversations",), ("prompt", "completion"))
"""Fields that are looked for where none is named, as in data sets for supervised fine-tuning; the first there win."""
_ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles in ShareGPT's ``conversations``."""


class Records:
    """Turns records into documents, and knows which fields it has used.

    Args:
        field: the one that holds the text; None: the first of `FORMS` that a record has.
    """

    def __init__(self, field: str | None) -> None:
        self.field = field
        self._used: dict[str, None] = {}

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that documents came from, in the order of their first use."""
        return tuple(self._used)

    def wanted(self, names: Collection[str], where: str, what: str = "field") -> tuple[str, ...]:
        """The fields that hold the text, among those that are there.

        Raises:
            CalibrationError: if there are none.
        """
        forms = FORMS if self.field is None else ((self.field,),)
        for form in forms:
            if all(name in names for name in form):
                return form
        there = ", ".join(repr(name) for name in names if name is not None) or "nothing"
        if self.field is not None:
            raise CalibrationError(f"{where} has no {what} {self.field!r} (it has {there})")
        raise CalibrationError(
            f"{where} has no {what} 'text', 'messages', or 'prompt' and 'completion' (it has {there}); name the one "
            "that holds the text: --text-field NAME, or calibration.field in a recipe"
        )

    def document(self, record: Any, where: str) -> str | Conversation:
        """The text or conversation of a record.

        Args:
            record: a string, or fields by name.
            where: its place, for messages.

        Raises:
            CalibrationError: if it is neither, or its fields do not hold text.
        """
        if isinstance(record, str):
            return sound(record, where)
        if not isinstance(record, Mapping):
            raise CalibrationError(f"{where} is {kind(record)}, neither a string nor a record")
        names = self.wanted(record.keys(), where)
        self._used |= dict.fromkeys(names)
        values = [record[name] for name in names]
        if all(isinstance(value, str) for value in values):
            return sound("".join(values), where)
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, Mapping) for item in value):
                expected = "a string or a list of messages" if len(names) == 1 else "a list of messages as the other"
                expected = "a string" if name == "text" else expected
                raise CalibrationError(f"{where}: field {name!r} is {kind(value)}, not {expected}")
        messages = [message for value in values for message in value]
        return Conversation(
            tuple(_message(item, f"{where}: message {number}") for number, item in enumerate(messages, 1)),
            _tools(record.get("tools"), where),
            where,
        )


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {str(key): value for key, value in item.items() if value is not None}
    if "role" not in found and "from" in found:
        role = found.pop("from")
        found = {"role": _ROLES.get(role, role), "content": found.pop("value", "")} | found
    if not isinstance(found.get("role"), str):
        keys = ", ".join(map(repr, found)) or "nothing"
        raise CalibrationError(f"{where} has no 'role' (it has {keys})")
    if "content" not in found and len(found) == 1:
        raise CalibrationError(f"{where} has no 'content'")
    for value in found.values():
        if isinstance(value, str):
            sound(value, where)
    return found


def _tools(value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) and value:
        value = parsed(value, f"{where}: field 'tools'")
    if value is not None and not isinstance(value, (list, tuple, str)):
        raise CalibrationError(f"{where}: field 'tools' is {kind(value)}, not a list")
    return tuple(value or ())


def parsed(text: str, where: str, line: int | None = None) -> Any:
    """Parsed JSON of a whole file, or of one of its lines.

    Raises:
        CalibrationError: naming the line.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: malformed JSON on line {line or error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # more digits or brackets than Python reads
        place = f"line {line}" if line else "the file"
        raise CalibrationError(f"{where}: {place} cannot be read as JSON: {str(error).split(';')[0]}") from None


def sound(text: str, where: str) -> str:
    """Refuse unpaired surrogates, which JSON escapes can express but no tokenizer can read.

    Raises:
        CalibrationError: naming the character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: character {error.start} is an unpaired surrogate, which is not text"
        ) from None
    return text


def kind(value: Any) -> str:
    """What a value is, in words."""
    names = {dict: "a record", list: "a list", str: "a string", bool: "a truth value", int: "a number"}
    if isinstance(value, Sequence) and not isinstance(value, (str, list)):
        return "a list" if isinstance(value, tuple) else f"a {type(value).__name__}"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")

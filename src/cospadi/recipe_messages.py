"""What is wrong with a recipe, in words that need no knowledge of pydantic."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_LONGEST_VALUE = 60


def first_problem(error: ValidationError, whole: type[BaseModel]) -> str:
    """The first complaint of pydantic as the end of a message.

    Args:
        error: of a section, or of the whole.
        whole: the model that was filled, to name the nearest key.
    """
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{path} cannot be {_shown(first['input'])}: {_allowed(first)}"
    model: type[BaseModel] = whole
    for part in first["loc"][:-1]:
        annotation = model.model_fields[str(part)].annotation
        for inner in (annotation, *get_args(annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    near = difflib.get_close_matches(str(first["loc"][-1]), list(model.model_fields), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(model.model_fields)}"
    return f"unknown key {path!r}{hint}"


_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
KINDS = {
    "int_": "an integer",
    "float_": "a number",
    "string_": "text",
    "bool_": "true or false",
    "list_": "a list",
    "dict_": "a section of keys and values",
    "model_": "a section of keys and values",
}


def _allowed(problem: Mapping[str, Any]) -> str:
    """Pydantic's complaint in words that need no knowledge of pydantic."""
    for key, words in _BOUNDS.items():
        if key in (problem.get("ctx") or {}):
            return f"it must be {words} {problem['ctx'][key]}"
    for kind, words in KINDS.items():
        if problem["type"].startswith(kind):
            return f"it must be {words}"
    if problem["type"] == "literal_error":
        return f"it must be {problem['ctx']['expected']}"
    reason = str(problem["msg"]).removeprefix("Value error, ")
    return f"{reason[:1].lower()}{reason[1:]}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"

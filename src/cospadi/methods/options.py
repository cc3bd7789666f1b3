"""Options of methods, validated before anything is read. Messages name the option, its value and what is allowed."""

import difflib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from cospadi.aliases import canonical
from cospadi.errors import RecipeError
from cospadi.methods.ranges import range_text


def checked_options(
    method: str, options: type[BaseModel], given: dict[str, Any], others: Mapping[str, type[BaseModel]] | None = None
) -> dict[str, Any]:
    """Validate the options of a compression or pruning method and fill in defaults.

    Args:
        method: its name.
        options: the options it takes.
        given: what the user set, canonical names or the aliases of `cospadi.aliases`.
        others: the options that other methods take, by name, so that the message can point to a method that knows an
            option which this one does not.

    Returns:
        the options under their canonical names, with defaults.

    Raises:
        RecipeError: on an unknown option (suggests the nearest), a wrong value, or an option given twice.
    """
    known = list(options.model_fields)
    given = canonical(given, known)
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known) or 'none'}"
            having = [name for name, other in (others or {}).items() if key in other.model_fields]
            hint += f"; methods with it: {', '.join(having)}" if having and not near else ""
            raise RecipeError(f"method {method!r} has no option {key!r}{hint}")
        kind = options.model_fields[key].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):  # pydantic would take true for 1
            raise RecipeError(f"method {method!r}, option {key!r} cannot be {value}: it takes no truth value")
    try:
        return dict(options(**given))
    except ValidationError as error:
        raise RecipeError(f"method {method!r}, {_problem(error, options)}") from None


def _problem(error: ValidationError, options: type[BaseModel]) -> str:
    """What is wrong with which option, and what is allowed."""
    first = error.errors()[0]
    key, value = str(first["loc"][0]), first["input"]
    # of a type such as `Annotated[int, …] | None` the field itself has no bounds: then the one that was crossed
    allowed = range_text(options.model_fields[key].metadata) or range_text([SimpleNamespace(**first.get("ctx", {}))])
    if first["type"] == "finite_number":
        return f"option {key!r} cannot be {value}: it must be a finite number"
    if allowed and first["type"].startswith(("greater", "less")):
        return f"option {key!r} cannot be {value}: it must be {allowed}"
    reason = first["msg"].removeprefix("Value error, ")
    return f"option {key!r} cannot be {value!r}: {reason[:1].lower()}{reason[1:]}"

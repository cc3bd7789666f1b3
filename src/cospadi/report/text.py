"""Numbers and texts for people: sizes, times, shares, and strings that can be published.

Given ``None`` or a number that is not finite, every function returns a dash, because an incomplete report must still
be printed.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from numbers import Real
from typing import Any

DASH = "–"
_ROOT = r"(?:~[\w.-]*|[A-Za-z]:)?[/\\]"
_ABSOLUTE = re.compile(rf"""(?<![\w.:/\\~<]){_ROOT}(?:[^\s/\\'"=]+[/\\])*([^\s/\\'"=]+)[/\\]?""")
_WHOLE_PATH = re.compile(rf"{_ROOT}[^\n=]*")


def number(value: object) -> float | None:
    """A finite float, or None for anything else (a bool, text, NaN, a missing key)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        real = float(value)
    except OverflowError:
        return None
    return real if math.isfinite(real) else None


def whole(value: object) -> int | None:
    """A whole number, or None."""
    real = number(value)
    return None if real is None else int(real)


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> Sequence[Any]:
    """The value if it is a list or tuple, else an empty one."""
    return value if isinstance(value, (list, tuple)) else ()


def _scaled(value: float, step: float, units: Sequence[str]) -> str:
    """Three significant digits with the largest unit that keeps the number at one or more."""
    index = 0
    while index + 1 < len(units) and float(f"{value:.3g}") >= step:
        value /= step
        index += 1
    if index == 0:
        return f"{value:.0f} {units[0]}".rstrip()
    digits = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:.{digits}f} {units[index]}"


def human_bytes(value: object) -> str:
    """A size in decimal units: ``812 B``, ``57.4 MB``, ``1.20 GB``."""
    real = number(value)
    if real is None:
        return DASH
    sign = "-" if real < 0 else ""
    return sign + _scaled(abs(real), 1000.0, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_count(value: object) -> str:
    """A count: ``812``, ``135 M``, ``7.24 B`` (B for 10⁹, as parameters are counted)."""
    real = number(value)
    return DASH if real is None else _scaled(real, 1000.0, ("", "k", "M", "B", "T"))


def human_seconds(value: object) -> str:
    """A duration: ``0.4 s``, ``1 min 15 s``, ``2 h 05 min``."""
    real = number(value)
    if real is None or real < 0:
        return DASH
    if real < 59.95:
        return f"{real:.1f} s"
    seconds = round(real)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: object) -> str:
    """A share of one: ``61.2%``."""
    real = number(value)
    return DASH if real is None else f"{100 * real:.1f}%"


def error_text(value: object) -> str:
    """A relative error: ``3.41%``; below one hundredth of a percent with one significant digit, ``0.006%``."""
    real = number(value)
    if real is None:
        return DASH
    return f"{100 * real:.2f}%" if real == 0 or abs(real) >= 1e-4 else f"{100 * real:.1g}%"


def perplexity_text(value: object) -> str:
    """A perplexity, with two decimals below 1000; ``diverged`` if it is not finite."""
    real = number(value)
    if real is None:
        return "diverged" if isinstance(value, float) else DASH
    if abs(real) < 1000:
        return f"{real:.2f}"
    return f"{real:,.0f}" if abs(real) < 1e6 else f"{real:.1e}"


def integer_text(value: object) -> str:
    """A whole number with thousands separators."""
    real = number(value)
    return DASH if real is None else f"{real:,.0f}"


def arrow(before: str, after: str) -> str:
    """``63.7 → 40.7 MB``: a shared unit is written once; if one of the two is missing, the other alone."""
    if before == DASH:
        return after
    if after == DASH:
        return before
    number_before, _, unit = before.partition(" ")
    return f"{number_before if unit and after.endswith(f' {unit}') else before} → {after}"


def moment(value: object) -> str:
    """An ISO 8601 timestamp as ``2025-11-22 20:14 UTC``; any other text unchanged."""
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M %Z").rstrip()
    except ValueError:
        return "" if value is None else str(value)


def _without_path(text: str, prose: bool = False) -> str:
    if not prose and _WHOLE_PATH.fullmatch(text):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or text
    return _ABSOLUTE.sub(r"\1", text)


def publishable_command(command: str) -> str:
    """A command line with absolute paths shortened to their last part, also in ``--option=/a/path``."""
    try:
        words = shlex.split(command)
    except ValueError:
        return _without_path(command, prose=True)
    short = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        short.append(option + equals + _without_path(value))
    return shlex.join(short) if short != words else command


def publishable(value: Any, prose: bool = False) -> Any:
    """A copy in plain JSON types, with absolute paths shortened to their last part.

    A report is distributed with the checkpoint, and an absolute path reveals a person's machine. Hub ids, URLs and
    relative paths are kept. Numbers that JSON cannot hold become None, numpy scalars become plain numbers, and any
    other object becomes its text.

    Args:
        value: what to copy.
        prose: strings are sentences: only the paths within them are shortened.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return _without_path(str(value), prose)
    if isinstance(value, Mapping):
        copy = {str(key): publishable(item, prose or key == "warnings") for key, item in value.items()}
        if isinstance(value.get("command"), str):
            copy["command"] = publishable_command(value["command"])
        return copy
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [publishable(item, prose) for item in items]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return publishable(value.item(), prose)
    return _without_path(str(value), prose)

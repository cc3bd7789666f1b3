"""`compress`: from a model and a recipe to a directory that ``from_pretrained`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cospadi.engine.run import Result, Run
from cospadi.model_view import source_name
from cospadi.progress import Progress, silent
from cospadi.recipe import Recipe
from cospadi.runtime.memory import memory_errors


def compress(
    model: str | Path,
    out: str | Path,
    *,
    keep: float | None = None,
    method: str | None = None,
    calibration: str | Path | list[str] | tuple[str, ...] | None = None,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    command: str = "",
    **changes: Any,
) -> Result:
    """Compress a model into a directory that ``from_pretrained`` loads.

    The same call after an interruption goes on where it stopped and gives the same bytes.

    Args:
        model: local directory or hub id.
        out: output directory: new, empty, or of the same run.
        keep: share of the linear layers' 16-bit bytes to keep, in (0, 1).
        method: name of a method; left out: the recipe's, else the default.
        calibration: text file, hub data set name, or a list of texts.
        recipe: a recipe, its keys and values, or the path of one; the other arguments override it.
        fresh: forget an earlier run in `out`.
        progress: called with (phase, done, total, detail, error so far).
        command: the command line, for the report.
        **changes: any other field of :class:`~cospadi.recipe.Recipe`.

    Returns:
        paths, sizes and errors.

    Raises:
        CospadiError: see `cospadi.errors`; the message names cause and remedy.
    """
    base = Recipe.of(recipe)
    texts = list(calibration) if isinstance(calibration, (list, tuple)) else None
    if calibration is not None:
        section = {"source": "a list of texts" if texts is not None else str(calibration)}
        changes["calibration"] = section | dict(changes.get("calibration", {}))
    if keep is not None:
        changes |= {"keep": keep, "target_size": changes.get("target_size")}
    if method is not None:
        changes["method"] = method
    merged = base.merged(changes)
    with memory_errors():
        return Run(source_name(model), Path(out), merged, texts, progress or silent, command).go(fresh)

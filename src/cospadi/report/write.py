"""Everything a finished run writes for people, next to the weights."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cospadi.errors import ResourceError
from cospadi.io import write_durably
from cospadi.report import plots
from cospadi.report.figures import save
from cospadi.report.html import write_html
from cospadi.report.markdown import ASSETS
from cospadi.report.model_card import model_card
from cospadi.report.text import publishable


def report_json(report: Mapping[str, Any]) -> str:
    """The report as strict JSON, sorted and indented; see :func:`cospadi.report.text.publishable` for its values."""
    return json.dumps(publishable(report), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_plots(report: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Write the plots of a report as PNG files.

    Returns:
        the files written; none without matplotlib or without groups.

    Raises:
        OutputError: if a file cannot be written.
    """
    if not report.get("groups"):
        return []
    makers = {
        "error_per_layer.png": plots.error_per_layer,
        "bytes_per_layer.png": plots.bytes_per_layer,
    }
    try:
        return [save(make(report), Path(folder) / name) for name, make in makers.items()]
    except ResourceError:
        return []


def pages_written(out: str | os.PathLike[str]) -> bool:
    """Whether the pages of a finished run exist; they are written last, so an interruption may have prevented it."""
    return all(Path(out, name).exists() for name in ("report.html", "README.md"))


def write_all(report: Mapping[str, Any], out_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``report.json``, ``report.html``, ``README.md`` and the plots in ``assets/``.

    Without matplotlib, the page and the card have no plots.

    Args:
        report: the content of ``report.json``; absolute paths in it are shortened to their last part.
        out_dir: the checkpoint's directory.

    Returns:
        the files, keyed by their path within `out_dir`.

    Raises:
        OutputError: if a file cannot be written.
    """
    out = Path(out_dir)
    files = {"report.json": write_durably(out / "report.json", report_json(report))}
    pictures = write_plots(report, out / ASSETS)
    files |= {f"{ASSETS}/{path.name}": path for path in pictures}
    files["report.html"] = write_html(report, out / "report.html")
    card = model_card(report, [path.name for path in pictures])
    files["README.md"] = write_durably(out / "README.md", card)
    return files

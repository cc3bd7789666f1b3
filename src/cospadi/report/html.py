"""The report page: one self-contained file without scripts or links, so it opens anywhere and can be mailed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi.errors import ResourceError
from cospadi.io import write_durably
from cospadi.report import plots
from cospadi.report.html_parts import (
    html_cards,
    html_code,
    html_document,
    html_facts,
    html_figure,
    html_no_plots,
    html_remark,
    html_section,
    html_table,
    html_warnings,
    yaml_text,
)
from cospadi.report.text import error_text, human_bytes, human_seconds, integer_text, moment, percent, publishable
from cospadi.report.view import (
    GroupRow,
    KindRow,
    by_kind,
    calibration_facts,
    error_meaning,
    headlines,
    model_facts,
    model_name,
    read_groups,
    warnings_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OPEN_ROWS = 64  # a longer table of groups starts folded


def write_html(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the report page.

    Args:
        report: the content of ``report.json``; any key may be missing.
        path: of the file.

    Raises:
        OutputError: if it cannot be written.
    """
    return write_durably(path, page(report))


def page(report: Mapping[str, Any]) -> str:
    """The report page as text; see :func:`write_html`."""
    report = publishable(report)
    groups, method = read_groups(report), report.get("method")
    return html_document(
        f"{model_name(report)}, compressed by cospadi",
        model_name(report),
        ("compressed by cospadi", f"method {method}" if method else "", moment(report.get("created"))),
        [
            html_cards(headlines(report)),
            html_warnings(warnings_of(report)),
            html_section("Layers", _figures(report)),
            html_section("Projections", kind_table(by_kind(groups))),
            html_section("Groups", _group_table(groups, error_meaning(report))),
            html_section("Recipe", html_code(yaml_text(report.get("recipe")))),
            html_section("Calibration text", html_facts(calibration_facts(report))),
            html_section("Run", html_facts(model_facts(report))),
            html_section("Command", html_code(str(report.get("command") or ""))),
        ],
    )


def kind_table(kinds: Sequence[KindRow]) -> str:
    """A table of the kinds of projections; empty without any."""
    columns = [
        ("projection", False), ("method", False), ("groups", True), ("before", True), ("after", True),
        ("kept", True), ("mean error", True), ("worst", True), ("in layer", True),
    ]  # fmt: skip
    rows = [
        [
            escape(kind.kind),
            escape(kind.methods),
            integer_text(kind.groups),
            human_bytes(kind.bytes_before),
            human_bytes(kind.bytes),
            percent(kind.keep),
            error_text(kind.mean_error),
            error_text(kind.worst and kind.worst.error),
            integer_text(kind.worst and kind.worst.layer),
        ]
        for kind in kinds
    ]
    return html_table(columns, rows)


def _bar(error: float | None, longest: float) -> str:
    if error is None or longest <= 0:
        return ""
    width = 100 * min(1.0, max(0.0, error / longest))
    return f'<span class="bar" aria-hidden="true"><i style="width:{width:.0f}%"></i></span>'


def _group_table(groups: Sequence[GroupRow], error: str) -> str:
    if not groups:
        return ""
    columns = [
        ("group", False), ("method", False), ("atoms", True), ("non-zeros", True), ("bits", True),
        ("before", True), ("after", True), ("kept", True), ("error", True), ("time", True),
    ]  # fmt: skip
    longest = max((group.error or 0.0 for group in groups), default=0.0)
    rows = [
        [
            f'<span class="name">{escape(group.name)}</span>',
            escape(group.method),
            integer_text(group.atoms),
            escape(group.sparsity),
            group.bits,
            human_bytes(group.bytes_before),
            human_bytes(group.bytes),
            percent(group.keep),
            error_text(group.error) + _bar(group.error, longest),
            human_seconds(group.seconds),
        ]
        for group in groups
    ]
    remark = html_remark(f"Error: {error}. Bits: of a dictionary value / of a code value.")
    state = " open" if len(rows) <= _OPEN_ROWS else ""
    table = remark + html_table(columns, rows)
    return f"<details{state}>\n<summary>{len(rows)} groups</summary>\n{table}</details>\n"


def _figures(report: Mapping[str, Any]) -> str:
    groups = read_groups(report)
    makers: list[tuple[str, str, Callable[[Mapping[str, Any]], Figure]]] = []
    if any(group.error is not None and group.layer is not None for group in groups):
        makers.append(("error", "Relative output error per layer", plots.error_per_layer))
    if any(group.bytes is not None and group.layer is not None for group in groups):
        makers.append(("bytes", "Bytes per layer before and after compression", plots.bytes_per_layer))
    try:
        return "".join(html_figure(make(report), name, label) for name, label, make in makers)
    except ResourceError as error:
        return html_no_plots(error)

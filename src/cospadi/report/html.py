"""The report page: one file without scripts or links to elsewhere, so it opens anywhere and can be mailed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cospadi.errors import ResourceError
from cospadi.io import write_durably
from cospadi.report import plots
from cospadi.report.style import CSS
from cospadi.report.text import error_text, human_bytes, human_seconds, integer_text, moment, percent, publishable
from cospadi.report.view import (
    Fact,
    GroupRow,
    KindRow,
    by_kind,
    calibration_facts,
    headlines,
    model_facts,
    model_name,
    read_groups,
    warnings_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OPEN_ROWS = 64  # a longer table of groups starts folded
_COLOURS = {
    plots.INK: "var(--ink)",
    plots.MUTED: "var(--muted)",
    plots.FAINT: "var(--faint)",
    **{colour: f"var(--c{index})" for index, colour in enumerate(plots.PALETTE)},
}


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
    title = f"{model_name(report)}, compressed by cospadi"
    sections = [
        html_warnings(warnings_of(report)),
        html_section("By layer", _figures(report)),
        html_section("By kind of projection", _kind_table(by_kind(read_groups(report)))),
        html_section("Groups", _group_table(read_groups(report))),
        html_section("Recipe", html_code(yaml_text(report.get("recipe")))),
        html_section("Calibration text", html_facts(calibration_facts(report))),
        html_section("Run", html_facts(model_facts(report))),
        html_section("Command", html_code(str(report.get("command") or ""))),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(model_name(report))}</h1>\n{_lead(report)}{_cards(headlines(report))}"
        + "".join(sections)
        + "</main>\n</body>\n</html>\n"
    )


def _lead(report: Mapping[str, Any]) -> str:
    method = report.get("method")
    parts = ["compressed by cospadi", f"method {method}" if method else "", moment(report.get("created"))]
    return f'<p class="lead">{escape(" · ".join(str(part) for part in parts if part))}</p>\n'


def html_section(title: str, content: str) -> str:
    """A section with its heading; nothing where there is no content."""
    return f"<section>\n<h2>{title}</h2>\n{content}</section>\n" if content else ""


def html_code(text: str) -> str:
    """Text as it is; nothing where it is blank."""
    return f"<pre><code>{escape(text.rstrip())}</code></pre>\n" if text.strip() else ""


def yaml_text(value: object) -> str:
    """A value as YAML; nothing for an empty one."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=88) if value else ""


def _cards(facts: Sequence[Fact]) -> str:
    cards = [
        f'<div><dt>{escape(fact.label)}</dt><dd class="value">{escape(fact.value)}</dd>'
        + (f'<dd class="note">{escape(fact.note)}</dd>' if fact.note else "")
        + "</div>\n"
        for fact in facts
    ]
    return f'<dl class="cards">\n{"".join(cards)}</dl>\n' if cards else ""


def html_facts(facts: Sequence[Fact]) -> str:
    """A list of labels, values and notes."""
    items = [
        f"<dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}"
        + (f' <span class="note">{escape(fact.note)}</span>' if fact.note else "")
        + "</dd>\n"
        for fact in facts
    ]
    return f'<dl class="facts">\n{"".join(items)}</dl>\n' if items else ""


def html_warnings(warnings: Sequence[str]) -> str:
    """A box of warnings; nothing where there are none."""
    items = "".join(f"<li>{escape(text)}</li>\n" for text in warnings)
    return f'<div class="warnings" role="note">\n<ul>\n{items}</ul>\n</div>\n' if items else ""


def html_table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; a column is its title and whether it holds numbers."""
    css = [' class="n"' if numeric else "" for _, numeric in columns]
    head = "".join(f'<th scope="col"{c}>{escape(title)}</th>' for (title, _), c in zip(columns, css, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, css, strict=True)) + "</tr>\n" for row in rows
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f'<div class="wide">\n{table}\n</div>\n'


def _kind_table(kinds: Sequence[KindRow]) -> str:
    if not kinds:
        return ""
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


def _group_table(groups: Sequence[GroupRow]) -> str:
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
    remark = (
        '<p class="remark">Error: relative error of the outputs on the calibration text. '
        "Bits: of a dictionary value / of a code value.</p>\n"
    )
    table = remark + html_table(columns, rows)
    state = " open" if len(rows) <= _OPEN_ROWS else ""
    return f"<details{state}>\n<summary>{len(rows)} groups</summary>\n{table}</details>\n"


def _figures(report: Mapping[str, Any]) -> str:
    groups = read_groups(report)
    makers: list[tuple[str, str, Callable[[Mapping[str, Any]], Figure]]] = []
    if any(group.error is not None and group.layer is not None for group in groups):
        makers.append(("error", "Relative output error per layer", plots.error_per_layer))
    if any(group.bytes is not None and group.layer is not None for group in groups):
        makers.append(("bytes", "Bytes per layer before and after", plots.bytes_per_layer))
    try:
        return "".join(
            f'<figure role="img" aria-label="{label}">\n{inline_svg(make(report), name)}</figure>\n'
            for name, label, make in makers
        )
    except ResourceError as error:
        return f'<p class="lead">No plots here: {escape(str(error))}</p>\n'


def inline_svg(figure: Figure, name: str) -> str:
    """A figure as SVG that takes its colours and font from the page.

    Args:
        figure: drawn with the colours of `plots`.
        name: put before every id, so that two figures can stand in one page.
    """
    svg = plots.render(figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]*)"', rf'xlink:href="#{name}-\1"', svg)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _COLOURS.get(found[0], found[0]), svg)

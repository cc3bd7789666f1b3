"""What all HTML pages share: the document, sections, facts, tables, code, and plots that adopt the page's colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import yaml

from cospadi.report.figures import FAINT, INK, MUTED, PALETTE, render
from cospadi.report.style import CSS, FRAGMENT_CSS
from cospadi.report.view import Fact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    FAINT: "var(--faint)",
    **{colour: f"var(--c{index})" for index, colour in enumerate(PALETTE)},
}


def html_document(title: str, heading: str, lead: Sequence[object], body: Sequence[str]) -> str:
    """A whole page, which loads nothing and runs nothing.

    Args:
        title: of the browser's window.
        heading: of the page.
        lead: parts of the line below the heading; empty ones are left out.
        body: sections as HTML.
    """
    line = " · ".join(str(part) for part in lead if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(heading)}</h1>\n<p class="lead">{escape(line)}</p>\n'
        + "".join(body)
        + "</main>\n</body>\n</html>\n"
    )


def html_fragment(heading: str, lead: Sequence[object], body: Sequence[str]) -> str:
    """A part of someone else's page, such as the output of a notebook's cell: it loads nothing and runs nothing.

    Args:
        heading: of the fragment; may be empty.
        lead: parts of the line below the heading; empty ones are left out.
        body: content as HTML.
    """
    line = " · ".join(str(part) for part in lead if part)
    top = f'<p class="heading">{escape(heading)}</p>\n' if heading else ""
    top += f'<p class="remark">{escape(line)}</p>\n' if line else ""
    return f'<div class="cospadi">\n<style>{FRAGMENT_CSS}</style>\n{top}{"".join(body)}</div>\n'


def html_folded(title: str, content: str) -> str:
    """Content that opens on a click; empty if there is none."""
    return f"<details>\n<summary>{escape(title)}</summary>\n{content}</details>\n" if content else ""


def html_section(title: str, content: str) -> str:
    """A section with its heading; empty if it has no content."""
    return f"<section>\n<h2>{title}</h2>\n{content}</section>\n" if content else ""


def html_code(text: str) -> str:
    """Preformatted text; empty if the text is blank."""
    return f"<pre><code>{escape(text.rstrip())}</code></pre>\n" if text.strip() else ""


def html_remark(text: str) -> str:
    """A small-print line above a table."""
    return f'<p class="remark">{escape(text)}</p>\n'


def yaml_text(value: object) -> str:
    """A value as YAML; an empty string for an empty value."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=88) if value else ""


def html_cards(facts: Sequence[Fact]) -> str:
    """The headline numbers, one card each."""
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
    """A box of warnings; empty if there are none."""
    items = "".join(f"<li>{escape(text)}</li>\n" for text in warnings)
    return f'<div class="warnings" role="note">\n<ul>\n{items}</ul>\n</div>\n' if items else ""


def html_table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """A table; empty without rows.

    Args:
        columns: each column's title and whether it holds numbers.
        rows: cells that are HTML already.
    """
    if not rows:
        return ""
    css = [' class="n"' if numeric else "" for _, numeric in columns]
    head = "".join(f'<th scope="col"{c}>{escape(title)}</th>' for (title, _), c in zip(columns, css, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, css, strict=True)) + "</tr>\n" for row in rows
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f'<div class="wide">\n{table}\n</div>\n'


def html_figure(figure: Figure, name: str, label: str) -> str:
    """A plot with a description for screen readers.

    Args:
        figure: drawn with the colours of :mod:`cospadi.report.figures`.
        name: unique in the page, see :func:`inline_svg`.
        label: the description.
    """
    return f'<figure role="img" aria-label="{escape(label)}">\n{inline_svg(figure, name)}</figure>\n'


def html_no_plots(reason: object) -> str:
    """The line that stands in place of plots."""
    return f'<p class="lead">No plots: {escape(str(reason))}</p>\n'


def inline_svg(figure: Figure, name: str) -> str:
    """A figure as SVG that takes its colours and font from the page.

    Args:
        figure: drawn with the colours of :mod:`cospadi.report.figures`.
        name: prefix of every id, so that several figures can share a page.
    """
    svg = render(figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]*)"', rf'xlink:href="#{name}-\1"', svg)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _COLOURS.get(found[0], found[0]), svg)

"""What all model cards share: front matter, inline text without markup, sections, tables and code blocks."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cospadi.report.html_parts import yaml_text
from cospadi.report.view import Fact, opener

ASSETS = "assets"
"""Folder of a checkpoint that holds the card's pictures."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def markdown_document(parts: Sequence[str]) -> str:
    """The parts that are not blank, separated by blank lines."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def front_matter(report: Mapping[str, Any], tags: Sequence[str]) -> str:
    """YAML front matter, as model hubs read it.

    Args:
        report: `base_model` is taken from it only if it is a hub id (``owner/name``), `license` only if it is given: a
            card must not claim what nobody stated.
        tags: of the model.
    """
    head: dict[str, Any] = {"library_name": "transformers"}
    if opener(report) == "AutoModelForCausalLM":
        head["pipeline_tag"] = "text-generation"
    base = report.get("base_model") or report.get("model")
    if isinstance(base, str) and _HUB_ID.fullmatch(base):
        head["base_model"] = base
    if isinstance(report.get("license"), str):
        head["license"] = report["license"]
    head["tags"] = list(tags)
    return f"---\n{yaml_text(head)}---"


def inline(text: str) -> str:
    """Text that Markdown shows as it is, in a line or a table cell: no markup, no HTML, no line breaks."""
    flat = escape(" ".join(text.split()), quote=False)
    flat = re.sub(r"([\\`*\[\]|~$])", r"\\\1", flat)
    flat = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", flat)  # inside a word it is no markup
    return re.sub(r"^(#{1,6}|[+-]|\d+[.)])(?= |$)", lambda found: found[1][:-1] + "\\" + found[1][-1], flat)


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside; empty if the text is blank."""
    if not text.strip():
        return ""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def section(title: str, content: str) -> str:
    """A section with its heading; empty if it has no content."""
    return f"## {title}\n\n{content}" if content else ""


def bullets(lines: Sequence[str]) -> str:
    """A list of plain texts."""
    return "\n".join(f"- {inline(line)}" for line in lines)


def facts_list(facts: Sequence[Fact]) -> str:
    """A list of labels, values and notes."""
    return "\n".join(f"- {inline(fact.label)}: {inline(f'{fact.value} {fact.note}'.strip())}" for fact in facts)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 10**6) -> str:
    """A table; empty without rows.

    Args:
        columns: titles.
        rows: cells as plain text.
        numbers_from: columns from this index on are aligned to the right.
    """
    if not rows:
        return ""
    rule = ["---:" if index >= numbers_from else "---" for index in range(len(columns))]
    lines = [[inline(cell) for cell in row] for row in (columns, *rows)]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

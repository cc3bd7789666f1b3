"""The model card: the README.md of a compressed checkpoint, as model hubs and people read it."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from cospadi.report.text import error_text, human_bytes, human_seconds, integer_text, percent, publishable
from cospadi.report.view import (
    Fact,
    by_kind,
    calibration_facts,
    headlines,
    model_facts,
    model_name,
    read_groups,
    warnings_of,
)

ASSETS = "assets"
PICTURES = {
    "error_per_layer.png": "Relative output error per layer, one line per kind of projection",
    "bytes_per_layer.png": "Bytes per layer before and after compression",
}
_LOADING = """\
import cospadi  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or its id on the hub
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
"""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(report: Mapping[str, Any], pictures: Sequence[str] = tuple(PICTURES)) -> str:
    """The model card of a checkpoint.

    `base_model` stands in the front matter only where the report names a hub id (``owner/name``), and `license` only
    where the report has one: a card must not claim what nobody said.

    Args:
        report: the content of ``report.json``; any key may be missing.
        pictures: files of the folder ``assets`` to show, of those in `PICTURES`.

    Returns:
        Markdown with YAML front matter.
    """
    report = publishable(report)
    name = model_name(report)
    parts = [
        _front_matter(report),
        f"# {inline(name)}, compressed by cospadi",
        _introduction(report, name),
        _table(["", "", ""], [[fact.label, fact.value, fact.note] for fact in headlines(report)]),
        "## How to load",
        _fenced(_LOADING, "python"),
        _bullets("Warnings of the run", warnings_of(report)),
        _by_layer(report, pictures),
        _groups(report),
        _section("Recipe", _fenced(_yaml(report.get("recipe")), "yaml")),
        _section("Calibration text", _facts(calibration_facts(report))),
        _section("Run", _facts(model_facts(report))),
        _section("Command", _fenced(str(report.get("command") or ""), "bash")),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def inline(text: str) -> str:
    """Text for a line or a table cell of Markdown that reads as itself: no markup, no HTML, no line breaks."""
    flat = escape(" ".join(text.split()), quote=False)
    flat = re.sub(r"([\\`*\[\]|~$])", r"\\\1", flat)
    flat = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", flat)  # inside a word it is no markup
    return re.sub(r"^(#{1,6}|[+-]|\d+[.)])(?= |$)", lambda found: found[1][:-1] + "\\" + found[1][-1], flat)


def _front_matter(report: Mapping[str, Any]) -> str:
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = report.get("base_model") or report.get("model")
    if isinstance(base, str) and _HUB_ID.fullmatch(base):
        head["base_model"] = base
    if isinstance(report.get("license"), str):
        head["license"] = report["license"]
    head["tags"] = ["cospadi", "compression"]
    return f"---\n{_yaml(head)}---"


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=88) if value else ""


def _introduction(report: Mapping[str, Any], name: str) -> str:
    method = report.get("method")
    by = f" with the method {inline(str(method))}" if method else ""
    return (
        f"This is {inline(name)} made smaller{by}, without retraining. Each compressed linear layer is stored as a "
        "dictionary and sparse codes, or as one of its relatives; all other weights are unchanged."
    )


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    if not text.strip():
        return ""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _bullets(title: str, lines: Sequence[str]) -> str:
    return _section(title, "\n".join(f"- {inline(line)}" for line in lines))


def _facts(facts: Sequence[Fact]) -> str:
    return "\n".join(f"- {inline(fact.label)}: {inline(f'{fact.value} {fact.note}'.strip())}" for fact in facts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 10**6) -> str:
    """A Markdown table; columns from index `numbers_from` on stand to the right."""
    if not rows:
        return ""
    rule = ["---:" if index >= numbers_from else "---" for index in range(len(columns))]
    lines = [[inline(cell) for cell in row] for row in (columns, *rows)]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_layer(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    kinds = by_kind(read_groups(report))
    if not kinds:
        return ""
    images = "\n\n".join(f"![{PICTURES.get(file, file)}]({ASSETS}/{file})" for file in pictures)
    columns = ["projection", "method", "groups", "before", "after", "kept", "mean error", "worst", "in layer"]
    rows = [
        [
            kind.kind,
            kind.methods,
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
    remark = "Errors are relative errors of the outputs on the calibration text."
    return "\n\n".join(part for part in ("## Layers", images, _table(columns, rows, numbers_from=2), remark) if part)


def _groups(report: Mapping[str, Any]) -> str:
    groups = read_groups(report)
    if not groups:
        return ""
    columns = ["group", "method", "atoms", "non-zeros", "bits", "before", "after", "kept", "error", "time"]
    rows = [
        [
            group.name,
            group.method,
            integer_text(group.atoms),
            group.sparsity,
            group.bits,
            human_bytes(group.bytes_before),
            human_bytes(group.bytes),
            percent(group.keep),
            error_text(group.error),
            human_seconds(group.seconds),
        ]
        for group in groups
    ]
    table = _table(columns, rows, numbers_from=2)
    return f"<details>\n<summary>All {len(rows)} groups</summary>\n\n{table}\n\n</details>"

"""The model card: the README.md of a compressed checkpoint, for model hubs and people."""

from collections.abc import Mapping, Sequence
from typing import Any

from cospadi.report.html_parts import yaml_text
from cospadi.report.markdown import (
    ASSETS,
    bullets,
    facts_list,
    fenced,
    front_matter,
    inline,
    markdown_document,
    section,
    table,
)
from cospadi.report.text import error_text, human_bytes, human_seconds, integer_text, percent, publishable
from cospadi.report.view import (
    by_kind,
    calibration_facts,
    error_meaning,
    headlines,
    model_facts,
    model_name,
    opener,
    read_groups,
    warnings_of,
)

PICTURES = {
    "error_per_layer.png": "Relative output error per layer, one line per kind of projection",
    "bytes_per_layer.png": "Bytes per layer before and after compression",
}
_LOADING = """\
import cospadi  # registers the format
from transformers import {kind}, AutoTokenizer

path = "."  # this folder, or its id on the hub
model = {kind}.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
"""


def model_card(report: Mapping[str, Any], pictures: Sequence[str] = tuple(PICTURES)) -> str:
    """The model card of a checkpoint.

    Args:
        report: the content of ``report.json``; any key may be missing.
        pictures: files of the folder ``assets`` to show, out of `PICTURES`.

    Returns:
        Markdown with YAML front matter.
    """
    report = publishable(report)
    name = model_name(report)
    return markdown_document(
        [
            front_matter(report, ("cospadi", "compression")),
            f"# {inline(name)}, compressed by cospadi",
            _introduction(report, name),
            table(["", "", ""], [[fact.label, fact.value, fact.note] for fact in headlines(report)]),
            section("How to load", fenced(_LOADING.format(kind=opener(report)), "python")),
            section("Warnings", bullets(warnings_of(report))),
            _layers(report, pictures),
            _groups(report),
            section("Recipe", fenced(yaml_text(report.get("recipe")), "yaml")),
            section("Calibration text", facts_list(calibration_facts(report))),
            section("Run", facts_list(model_facts(report))),
            section("Command", fenced(str(report.get("command") or ""), "bash")),
        ]
    )


def _introduction(report: Mapping[str, Any], name: str) -> str:
    method = report.get("method")
    by = f" with the method {inline(str(method))}" if method else ""
    return (
        f"This is {inline(name)}, compressed{by} without retraining. Each compressed linear layer is stored as a "
        "dictionary with sparse codes, or in a related form such as low-rank factors or integers. All other weights "
        "are unchanged."
    )


def _layers(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
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
    remark = f"Error: {error_meaning(report)}."
    parts = (images, table(columns, rows, numbers_from=2), remark)
    return section("Layers", "\n\n".join(part for part in parts if part))


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
    rows_of_groups = table(columns, rows, numbers_from=2)
    return f"<details>\n<summary>All {len(rows)} groups</summary>\n\n{rows_of_groups}\n\n</details>"

"""The files of ``cospadi compare``: table (CSV), data (JSON), plot (PNG and SVG), and a page with all of it (HTML)."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cospadi.errors import ResourceError
from cospadi.io import write_durably
from cospadi.report import plots
from cospadi.report.figures import render
from cospadi.report.html_parts import (
    html_document,
    html_facts,
    html_figure,
    html_no_plots,
    html_remark,
    html_section,
    html_table,
    html_warnings,
)
from cospadi.report.text import human_bytes, human_seconds, integer_text, number, percent, perplexity_text, publishable
from cospadi.report.view import Fact, calibration_facts, error_meaning, model_facts, model_name, share, warnings_of
from cospadi.report.write import report_json

COLUMNS = (
    "method", "keep", "keep_actual", "bytes", "bytes_before", "total_bytes", "perplexity", "error", "seconds",
    "evaluate_seconds", "peak_memory_bytes", "peak_device_bytes", "directory", "reason",
)  # fmt: skip


def all_rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows and references; a reference is named after its method and bits."""
    references = [dict(row, method=reference_name(row)) for row in comparison.get("references", ())]
    return [*map(dict, comparison.get("rows", ())), *references]


def reference_name(row: Mapping[str, Any]) -> str:
    """The name of a reference: ``gptq 4 bit``."""
    bits = (row.get("options") or {}).get("bits")
    return f"{row.get('method')} {bits} bit" if bits else str(row.get("method"))


def comparison_csv(comparison: Mapping[str, Any]) -> str:
    """CSV with a line for the dense model, each row and each reference; further texts and tasks add columns."""
    dense = dict(comparison.get("dense") or {}, method="dense", keep=1.0, keep_actual=1.0)
    dense["bytes_before"] = dense.get("bytes")
    lines = [dense, *all_rows(comparison)]
    texts = list(dict.fromkeys(name for line in lines for name in line.get("texts") or {}))
    scores = list(
        dict.fromkeys(
            (task, metric)
            for line in lines
            for task, metrics in (line.get("tasks") or {}).items()
            for metric, value in metrics.items()
            if number(value) is not None
        )
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            *COLUMNS,
            *(f"{what} {name}" for name in texts for what in ("perplexity", "bits_per_byte")),
            *(f"{task} {metric}" for task, metric in scores),
        ]
    )
    for line in lines:
        measured = line.get("texts") or {}
        tasks = line.get("tasks") or {}
        writer.writerow(
            [
                *(line.get(column) for column in COLUMNS),
                *(measured.get(name, {}).get(what) for name in texts for what in ("perplexity", "bits_per_byte")),
                *(tasks.get(task, {}).get(metric) for task, metric in scores),
            ]
        )
    return out.getvalue()


def write_comparison(comparison: Mapping[str, Any], folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``comparison.json``, ``.csv``, ``.html`` and, with matplotlib, ``.png`` and ``.svg``.

    Args:
        comparison: what :func:`cospadi.evaluation.compare.compare` returned; absolute paths in it are shortened
            to their last part.
        folder: created if necessary.

    Returns:
        the files, keyed by suffix.

    Raises:
        OutputError: if a file cannot be written.
    """
    comparison = publishable(comparison)
    base = Path(folder) / "comparison"
    contents: dict[str, bytes | str] = {
        "json": report_json(comparison),
        "csv": comparison_csv(comparison),
        "html": comparison_page(comparison),
    }
    try:
        figure = plots.quality_against_bytes(_plotted(comparison), comparison.get("dense"))
        contents |= {kind: render(figure, kind) for kind in ("png", "svg")}
    except ResourceError:
        pass
    return {kind: write_durably(base.with_suffix(f".{kind}"), content) for kind, content in contents.items()}


def _plotted(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Points of the plot: references keep their method's plain name, so their bit widths form one line."""
    return [*comparison.get("rows", ()), *comparison.get("references", ())]


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """The self-contained page of a comparison, without scripts or links."""
    rows = all_rows(comparison)
    run = {key: value for key, value in comparison.items() if key not in ("dense", "rows", "references", "text")}
    title = f"{model_name(comparison)}: methods compared"
    measured = f"measured {comparison.get('measured')}" if comparison.get("measured") else ""
    return html_document(
        title,
        title,
        ("by cospadi", measured, comparison.get("device")),
        [
            html_warnings(warnings_of(comparison)),
            html_section("Quality against bytes", _figure(comparison)),
            html_section("Rows", comparison_rows(comparison)),
            html_section("Rows without a result", _reasons(rows)),
            html_section("Tasks", _task_table(comparison)),
            html_section("Calibration text", html_facts(calibration_facts(comparison))),
            html_section("Run", html_facts([*model_facts(run), Fact("Command", str(comparison.get("command") or ""))])),
        ],
    )


def comparison_rows(comparison: Mapping[str, Any]) -> str:
    """The table of all rows, with a line on how they were measured."""
    table = _row_table(all_rows(comparison), comparison.get("dense") or {})
    return html_remark(_remark(comparison)) + table


def _figure(comparison: Mapping[str, Any]) -> str:
    try:
        figure = plots.quality_against_bytes(_plotted(comparison), comparison.get("dense"))
    except ResourceError as error:
        return html_no_plots(error)
    return html_figure(figure, "quality", "Perplexity against the share of bytes kept")


def _remark(comparison: Mapping[str, Any]) -> str:
    """How the columns of the table were measured."""
    blocks = comparison.get("max_blocks")
    length = f", blocks of {comparison['seq_len']} tokens" if comparison.get("seq_len") else ""
    first = f" (the first {blocks})" if blocks else ""
    return (
        f"Perplexity: on {comparison.get('text')}{length}{first}. Bytes: compressed layers only. All: including "
        f"embeddings, norms and head. Error: {error_meaning(comparison)}. Time and memory (peak): of compression."
    )


def _row_table(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> str:
    reference = number(dense.get("perplexity"))
    columns = [
        ("method", False), ("keep", True), ("kept", True), ("bytes", True), ("all", True), ("perplexity", True),
        ("vs dense", True), ("error", True), ("time", True), ("memory", True), ("GPU memory", True),
    ]  # fmt: skip
    lines = [_cells(dict(dense, method="dense", keep_actual=1.0), None)]
    lines += [_cells(row, reference) for row in sorted(rows, key=_order)]
    return html_table(columns, lines)


def _order(row: Mapping[str, Any]) -> tuple[float, float]:
    """Sort key: largest keep first, then lowest perplexity."""
    perplexity = number(row.get("perplexity"))
    return -(number(row.get("keep")) or 0.0), float("inf") if perplexity is None else perplexity


def _cells(row: Mapping[str, Any], reference: float | None) -> list[str]:
    rise = share(row.get("perplexity"), reference) if reference else None
    return [
        escape(str(row.get("method"))),
        percent(row.get("keep")),
        percent(row.get("keep_actual")),
        human_bytes(row.get("bytes")),
        human_bytes(row.get("total_bytes")),
        perplexity_text(row.get("perplexity")),
        "" if rise is None else f"{100 * (rise - 1):+.1f}%",
        percent(row.get("error")),
        human_seconds(row.get("seconds")),
        human_bytes(row.get("peak_memory_bytes")),
        human_bytes(row.get("peak_device_bytes")),
    ]


def _reasons(rows: Sequence[Mapping[str, Any]]) -> str:
    items = [
        f"<dt>{escape(str(row['method']))}, keep {percent(row.get('keep'))}</dt><dd>{escape(str(row['reason']))}</dd>\n"
        for row in rows
        if row.get("reason")
    ]
    return f'<dl class="facts">\n{"".join(items)}</dl>\n' if items else ""


def _task_table(comparison: Mapping[str, Any]) -> str:
    rows = [dict(comparison.get("dense") or {}, method="dense", keep=1.0), *all_rows(comparison)]
    names = list(dict.fromkeys(name for row in rows for name in row.get("tasks") or {}))
    if not names:
        return ""
    columns = [("method", False), ("keep", True), *((name, True) for name in names)]
    lines = []
    for row in rows:
        if row.get("tasks"):
            lines.append([escape(str(row["method"])), percent(row.get("keep")), *(_score(row, name) for name in names)])
    examples = {name: rows[0].get("tasks", {}).get(name, {}).get("samples") for name in names}
    remark = ", ".join(f"{name} {integer_text(count)}" for name, count in examples.items())
    return html_remark(f"Accuracy ± standard error. Examples: {remark}.") + html_table(columns, lines)


def _score(row: Mapping[str, Any], task: str) -> str:
    metrics = row["tasks"].get(task, {})
    value, spread = number(metrics.get("acc")), number(metrics.get("acc_stderr"))
    if value is None:
        return ""
    return f"{100 * value:.1f}%" + ("" if spread is None else f" ± {100 * spread:.1f}")

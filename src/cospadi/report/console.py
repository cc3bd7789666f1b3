"""What the commands print: tables that fit 80 columns, and numbers with units."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from cospadi.report.measured import contents_facts, estimate_facts, evaluation_facts, task_rows, tensor_rows
from cospadi.report.terminal import Table, print_facts, print_heading, print_warnings
from cospadi.report.text import (
    DASH,
    error_text,
    human_bytes,
    human_seconds,
    integer_text,
    number,
    percent,
    perplexity_text,
)
from cospadi.report.view import (
    by_kind,
    headlines,
    model_name,
    read_groups,
    share,
)


def print_summary(report: Mapping[str, Any], console: Console) -> None:
    """Print the summary of ``cospadi compress``: sizes and quality, errors per kind of projection, warnings."""
    print_heading(console, model_name(report), report.get("method"))
    print_facts(console, headlines(report))
    kinds = by_kind(read_groups(report))
    if kinds:
        table = Table(
            ("projection", "left"), ("groups", "right"), ("before", "right"), ("after", "right"),
            ("kept", "right"), ("error", "right"), ("worst", "right"), ("in layer", "right"),
        )  # fmt: skip
        for kind in kinds:
            table.add(
                kind.kind,
                integer_text(kind.groups),
                human_bytes(kind.bytes_before),
                human_bytes(kind.bytes),
                percent(kind.keep),
                error_text(kind.mean_error),
                error_text(kind.worst and kind.worst.error),
                integer_text(kind.worst and kind.worst.layer),
            )
        table.print(console)
    print_warnings(console, report)


def print_estimate(estimate: Mapping[str, Any], console: Console) -> None:
    """Print a dry run: how each kind of projection would be stored, and the memory and time the run would need.

    Args:
        estimate: keys as in a report, as far as they are known before a run: ``model``, ``architecture``,
            ``parameters``, ``method``, ``keep_requested``, ``keep_actual``, ``bytes_before``, ``bytes_after``,
            ``file_bytes_before``, ``file_bytes``, ``groups``, ``peak_memory_bytes``, ``memory`` (per part),
            ``seconds`` (a number, or phases with ``total``, which is None if it cannot be estimated), ``device``,
            ``warnings``.
        console: where to print.
    """
    print_heading(console, model_name(estimate), estimate.get("method"), "estimate")
    print_facts(console, estimate_facts(estimate))
    kinds = by_kind(read_groups(estimate))
    if kinds:
        table = Table(
            ("projection", "left"), ("method", "left"), ("groups", "right"), ("atoms", "right"),
            ("non-zeros", "right"), ("before", "right"), ("after", "right"), ("kept", "right"),
        )  # fmt: skip
        for kind in kinds:
            table.add(
                kind.kind,
                kind.methods,
                integer_text(kind.groups),
                kind.atoms,
                kind.sparsity,
                human_bytes(kind.bytes_before),
                human_bytes(kind.bytes),
                percent(kind.keep),
            )
        table.print(console)
    print_warnings(console, estimate)


def print_inspect(report: Mapping[str, Any], console: Console) -> None:
    """Print the contents of a checkpoint: its groups, or the kinds of its tensors where it has none.

    Args:
        report: see :func:`cospadi.evaluation.inspect`.
        console: where to print.
    """
    print_heading(console, model_name(report), report.get("architecture"), report.get("kind"), report.get("method"))
    print_facts(console, contents_facts(report))
    tensors = Table(
        ("tensor", "left"), ("number", "right"), ("shape", "right"), ("dtype", "left"), ("bytes", "right")
    )  # fmt: skip
    for cells in tensor_rows(report):
        tensors.add(*cells)
    tensors.print(console)
    rows = read_groups(report)
    table = Table(
        ("layer", "right"), ("projection", "left"), ("method", "left"), ("atoms", "right"),
        ("non-zeros", "right"), ("bits", "right"), ("bytes", "right"), ("kept", "right"),
        ("error", "right"),
    )  # fmt: skip
    for row in rows:
        table.add(
            integer_text(row.layer),
            row.kind,
            row.method,
            integer_text(row.atoms),
            row.sparsity,
            row.bits,
            human_bytes(row.bytes),
            percent(row.keep),
            error_text(row.error),
        )
    table.print(console)
    print_warnings(console, report)


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print the result of ``cospadi evaluate``.

    Args:
        result: ``perplexity`` and, if known, ``dense_perplexity``, ``text``, ``tokens``, ``bytes``,
            ``dense_bytes``, ``bits_per_byte``, ``word_perplexity``, ``seconds``, ``model``, and ``tasks``, which maps a
            task's name to a number or to a mapping of metrics.
        console: where to print.
    """
    print_heading(console, model_name(result) if result.get("model") else "", "evaluation")
    print_facts(console, evaluation_facts(result))
    table = Table(("task", "left"), ("metric", "left"), ("value", "right"))
    for row in task_rows(result):
        table.add(*row)
    table.print(console)
    print_warnings(console, result)


def print_comparison(
    rows: Sequence[Mapping[str, Any]], console: Console, dense: Mapping[str, Any] | None = None
) -> None:
    """Print the table of ``cospadi compare``: sorted by keep, then by perplexity; the best row of each keep in bold.

    Args:
        rows: ``{"method", "keep", "perplexity", "bytes", "seconds"}``, and ``keep_actual`` if known.
        console: where to print.
        dense: ``{"perplexity", "bytes"}`` of the model before compression.
    """

    def order(row: Mapping[str, Any]) -> tuple[float, float]:
        perplexity = number(row.get("perplexity"))
        return -(number(row.get("keep")) or 0.0), float("inf") if perplexity is None else perplexity

    table = Table(
        ("keep", "right"), ("method", "left"), ("perplexity", "right"), ("vs dense", "right"),
        ("bytes", "right"), ("kept", "right"), ("time", "right"),
    )  # fmt: skip
    reference = (dense or {}).get("perplexity")
    if dense:
        table.add(DASH, "dense", perplexity_text(reference), DASH, human_bytes(dense.get("bytes")), "100.0%", DASH)
    previous: float | None = None
    for row in sorted(rows, key=order):
        best = -order(row)[0] != previous
        previous = -order(row)[0]
        rise = share(row.get("perplexity"), reference)
        table.add(
            percent(row.get("keep")),
            str(row.get("method") or DASH),
            perplexity_text(row.get("perplexity")),
            DASH if rise is None else f"{100 * (rise - 1):+.1f}%",
            human_bytes(row.get("bytes")),
            percent(row.get("keep_actual", share(row.get("bytes"), (dense or {}).get("bytes")))),
            human_seconds(row.get("seconds")),
            style="bold" if best and number(row.get("perplexity")) is not None else "",
        )
    table.print(console)

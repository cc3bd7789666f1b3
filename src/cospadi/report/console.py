"""What the commands print: tables that fit 80 columns, and numbers with units."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from cospadi.report.depth import depth_headlines
from cospadi.report.terminal import Table, print_facts, print_heading, print_warnings
from cospadi.report.text import (
    DASH,
    arrow,
    error_text,
    human_bytes,
    human_count,
    human_seconds,
    integer_text,
    mapping,
    number,
    percent,
    perplexity_text,
    sequence,
)
from cospadi.report.view import (
    Fact,
    by_kind,
    headlines,
    model_name,
    perplexity_fact,
    read_groups,
    requested,
    share,
    total,
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
    rows = read_groups(estimate)
    before = estimate.get("bytes_before", total(row.bytes_before for row in rows))
    after = estimate.get("bytes_after", total(row.bytes for row in rows))
    keep = estimate.get("keep_actual", share(after, before))
    times = estimate.get("seconds")
    seconds = times.get("total") if isinstance(times, Mapping) else times
    device = f"on {estimate['device']}" if estimate.get("device") else ""
    process = (estimate.get("memory") or {}).get("process")
    own = f"including {human_bytes(process)} for Python and its libraries" if process else device
    took = human_seconds(seconds)
    if isinstance(times, Mapping) and seconds is None and times.get("calibrate") is not None:
        took = f"{DASH} (calibration alone takes {human_seconds(times['calibrate'])})"
    print_heading(console, model_name(estimate), estimate.get("method"), "estimate")
    whole = arrow(human_bytes(estimate.get("file_bytes_before")), human_bytes(estimate.get("file_bytes")))
    print_facts(
        console,
        [
            Fact("Architecture", str(estimate.get("architecture") or "")),
            Fact("Parameters", human_count(estimate.get("parameters"))),
            Fact("Compressed layers", arrow(human_bytes(before), human_bytes(after))),
            Fact("Bytes kept", percent(keep), requested(estimate)),
            Fact("Whole checkpoint", whole),
            Fact("Estimated memory", human_bytes(estimate.get("peak_memory_bytes")), own),
            Fact("Estimated time", took, device),
        ],
    )
    kinds = by_kind(rows)
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
    facts = depth_headlines(report) if report.get("prune") and report.get("kind") == "pruned" else headlines(report)
    if not any(fact.label == "Parameters" for fact in facts):
        facts = [Fact("Parameters", human_count(report.get("parameters"))), *facts]
    hashes = "and its hash in SHA256SUMS" if report.get("checksums") else "there are no hashes"
    print_facts(console, [*facts, Fact("Verified", "every file", hashes)])
    _print_tensors(report, console)
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


def _print_tensors(report: Mapping[str, Any], console: Console) -> None:
    table = Table(
        ("tensor", "left"), ("number", "right"), ("shape", "right"), ("dtype", "left"), ("bytes", "right")
    )  # fmt: skip
    for row in map(mapping, sequence(report.get("tensors"))):
        shape = " × ".join(map(str, sequence(row.get("shape"))))
        table.add(
            str(row.get("name")),
            integer_text(row.get("count")),
            shape,
            str(row.get("dtype")),
            human_bytes(row.get("bytes")),
        )
    table.print(console)


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print the result of ``cospadi evaluate``.

    Args:
        result: ``perplexity`` and, if known, ``dense_perplexity``, ``text``, ``tokens``, ``bytes``,
            ``dense_bytes``, ``bits_per_byte``, ``word_perplexity``, ``seconds``, ``model``, and ``tasks``, which maps a
            task's name to a number or to a mapping of metrics.
        console: where to print.
    """
    print_heading(console, model_name(result) if result.get("model") else "", "evaluation")
    bits = number(result.get("bits_per_byte"))
    kept = share(result.get("bytes"), result.get("dense_bytes"))
    print_facts(
        console,
        [
            perplexity_fact(result),
            Fact("Bits per byte", DASH if bits is None else f"{bits:.4f}"),
            Fact("Word perplexity", perplexity_text(result.get("word_perplexity"))),
            Fact(
                "Size",
                arrow(human_bytes(result.get("dense_bytes")), human_bytes(result.get("bytes"))),
                "" if kept is None else percent(kept),
            ),
            Fact("Time", human_seconds(result.get("seconds"))),
        ],
    )
    tasks = mapping(result.get("tasks"))
    if tasks:
        table = Table(("task", "left"), ("metric", "left"), ("value", "right"))
        for task, metrics in tasks.items():
            for metric, value in (metrics if isinstance(metrics, Mapping) else {"": metrics}).items():
                real = number(value)
                if real is not None:
                    table.add(str(task), str(metric), f"{real:.4f}")
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

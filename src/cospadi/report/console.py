"""What the commands print: tables that fit 80 columns, and numbers with units."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
)
from cospadi.report.view import (
    Fact,
    by_kind,
    headlines,
    model_name,
    perplexity_fact,
    read_groups,
    share,
    total,
    warnings_of,
)

Column = tuple[str, Literal["left", "right"]]


class _Table:
    """A table of one line a row: texts on the left are cut where room is short, numbers on the right never are."""

    def __init__(self, *columns: Column) -> None:
        self.columns = columns
        self.rows: list[tuple[list[str], str]] = []

    def add(self, *cells: str, style: str = "") -> None:
        """Add a row."""
        self.rows.append(([" ".join(cell.split()) for cell in cells], style))

    def print(self, console: Console) -> None:
        """Print, if there are rows."""
        if not self.rows:
            return
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold dim")
        for (title, side), width in zip(self.columns, self._widths(console.width), strict=True):
            table.add_column(title, justify=side, no_wrap=True, overflow="ellipsis", width=width)
        for cells, style in self.rows:
            table.add_row(*map(Text, cells), style=style)
        console.print(table)

    def _widths(self, room: int) -> list[int]:
        """Numbers get what they need; the widest texts give way until the line fits."""
        cells = [[title, *(cells[i] for cells, _ in self.rows)] for i, (title, _) in enumerate(self.columns)]
        widths = [max(map(cell_len, column)) for column in cells]
        texts = [i for i, (_, side) in enumerate(self.columns) if side == "left"]
        over = sum(widths) + 2 * len(widths) - room  # two blanks between columns, one at each edge
        while over > 0 and texts:
            widest = max(texts, key=widths.__getitem__)
            if widths[widest] <= 4:
                break  # rich cuts the rest
            widths[widest] -= 1
            over -= 1
        return widths


def _facts(console: Console, facts: Sequence[Fact]) -> None:
    """Names and numbers in two columns; long ones continue below themselves."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for fact in facts:
        if fact.value not in ("", DASH):
            value = Text(" ".join(fact.value.split()), style="bold")
            if fact.note:
                value.append(f"  {' '.join(fact.note.split())}", style="not bold dim")
            grid.add_row(fact.label, value)
    console.print(grid)


def _heading(console: Console, *parts: object) -> None:
    console.print(Text(" · ".join(str(part) for part in parts if part), style="bold", overflow="fold"))


def _warnings(console: Console, report: Mapping[str, Any]) -> None:
    for line in warnings_of(report):
        console.print(Text(f"warning: {line}", style="yellow", overflow="fold"))


def print_summary(report: Mapping[str, Any], console: Console) -> None:
    """The end of ``cospadi compress``: the numbers, the error by kind of projection, the warnings."""
    _heading(console, model_name(report), report.get("method"))
    _facts(console, headlines(report))
    kinds = by_kind(read_groups(report))
    if kinds:
        table = _Table(
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
    _warnings(console, report)


def print_estimate(estimate: Mapping[str, Any], console: Console) -> None:
    """A dry run: what every kind of projection would become, and what the run would take.

    Args:
        estimate: keys as in a report, as far as they are known before a run: ``model``, ``architecture``,
            ``parameters``, ``method``, ``keep_requested``, ``keep_actual``, ``bytes_before``, ``bytes_after``,
            ``file_bytes_before``, ``file_bytes``, ``groups``, ``peak_memory_bytes``, ``memory`` (by part),
            ``seconds`` (a number, or phases with ``total``, which is None where it cannot be guessed), ``device``,
            ``warnings``.
        console: where to print.
    """
    rows = read_groups(estimate)
    before = estimate.get("bytes_before", total(row.bytes_before for row in rows))
    after = estimate.get("bytes_after", total(row.bytes for row in rows))
    keep = estimate.get("keep_actual", share(after, before))
    asked = percent(estimate.get("keep_requested"))
    times = estimate.get("seconds")
    seconds = times.get("total") if isinstance(times, Mapping) else times
    device = f"on {estimate['device']}" if estimate.get("device") else ""
    process = (estimate.get("memory") or {}).get("process")
    own = f"{human_bytes(process)} of it Python with its libraries" if process else device
    took = human_seconds(seconds)
    if isinstance(times, Mapping) and seconds is None and times.get("calibrate") is not None:
        took = f"{DASH} (calibration alone {human_seconds(times['calibrate'])})"
    _heading(console, model_name(estimate), estimate.get("method"), "estimate")
    whole = arrow(human_bytes(estimate.get("file_bytes_before")), human_bytes(estimate.get("file_bytes")))
    _facts(
        console,
        [
            Fact("Architecture", str(estimate.get("architecture") or "")),
            Fact("Parameters", human_count(estimate.get("parameters"))),
            Fact("Compressed layers", arrow(human_bytes(before), human_bytes(after))),
            Fact("Bytes kept", percent(keep), "" if asked == DASH else f"{asked} asked for"),
            Fact("Whole checkpoint", whole),
            Fact("Memory, about", human_bytes(estimate.get("peak_memory_bytes")), own),
            Fact("Time, about", took, device),
        ],
    )
    kinds = by_kind(rows)
    if kinds:
        table = _Table(
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
    _warnings(console, estimate)


def print_inspect(report: Mapping[str, Any], console: Console) -> None:
    """What is in a compressed checkpoint, group by group.

    Args:
        report: the content of ``report.json``, or as much of it as the checkpoint's ``config.json`` gives.
        console: where to print.
    """
    _heading(console, model_name(report), report.get("architecture"), report.get("method"))
    _facts(console, headlines(report))
    rows = read_groups(report)
    table = _Table(
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
    _warnings(console, report)


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """The result of ``cospadi evaluate``.

    Args:
        result: ``perplexity`` and, as far as known, ``dense_perplexity``, ``text``, ``tokens``, ``bytes``,
            ``dense_bytes``, ``bits_per_byte``, ``word_perplexity``, ``seconds``, ``model``, and ``tasks``: a mapping of
            a task's name to a number or to a mapping of metrics.
        console: where to print.
    """
    _heading(console, model_name(result) if result.get("model") else "", "evaluation")
    bits = number(result.get("bits_per_byte"))
    kept = share(result.get("bytes"), result.get("dense_bytes"))
    _facts(
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
        table = _Table(("task", "left"), ("metric", "left"), ("value", "right"))
        for task, metrics in tasks.items():
            for metric, value in (metrics if isinstance(metrics, Mapping) else {"": metrics}).items():
                real = number(value)
                if real is not None:
                    table.add(str(task), str(metric), f"{real:.4f}")
        table.print(console)
    _warnings(console, result)


def print_comparison(
    rows: Sequence[Mapping[str, Any]], console: Console, dense: Mapping[str, Any] | None = None
) -> None:
    """The table of ``cospadi compare``: best first within each keep, the best of each in bold.

    Args:
        rows: ``{"method", "keep", "perplexity", "bytes", "seconds"}``, and ``keep_actual`` where known.
        console: where to print.
        dense: ``{"perplexity", "bytes"}`` of the model before compression.
    """

    def order(row: Mapping[str, Any]) -> tuple[float, float]:
        perplexity = number(row.get("perplexity"))
        return -(number(row.get("keep")) or 0.0), float("inf") if perplexity is None else perplexity

    table = _Table(
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

"""What `cospadi benchmark` prints and writes: tables, the numbers as JSON, and a plot of times relative to dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from cospadi.errors import ResourceError
from cospadi.io import write_durably
from cospadi.report.figures import FAINT, INK, MARKERS, MUTED, PALETTE, blank_figure, save
from cospadi.report.terminal import Column, Table
from cospadi.report.text import DASH, human_bytes, human_seconds, number, percent
from cospadi.report.write import report_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "benchmark"
_RIVALS = (("low_rank_of_dense", "low rank", 3), ("bitmask_of_dense", "bitmask", 4))


def times(value: object) -> str:
    """A ratio of times: ``0.63×``."""
    real = number(value)
    return DASH if real is None else f"{real:.2f}×"


def _time(microseconds: object) -> str:
    real = number(microseconds)
    if real is None:
        return DASH
    return f"{real:.1f} µs" if real < 1000 else f"{real / 1000:.2f} ms"


def print_speed(data: Mapping[str, Any], console: Console) -> None:
    """Tables of layers, whole models and loading."""
    rate = number(data.get("copy_bytes_per_second"))
    copied = DASH if rate is None else human_bytes(rate)
    console.print(Text(f"{data['device']} · a large copy moves {copied} per second (read and written)", style="bold"))
    _print_layers(data["layers"], console)
    _print_models(data["models"], console)
    _print_loading(data["loading"], console)
    console.print(
        "Times relative to dense bfloat16 in the same round (medians). Of copy: bandwidth for the fewest tokens.",
        style="dim",
    )


def _print_layers(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One block per shape: dense times, then each variant's multiples of them; one column per number of tokens."""
    counts = sorted({row["tokens"] for row in rows})
    table = Table(
        ("layers, tokens at once", "left"), *((str(count), "right") for count in counts), ("of copy", "right")
    )
    for name in dict.fromkeys(_layer_name(row) for row in rows):
        mine = [row for row in rows if _layer_name(row) == name]
        dense = {row["tokens"]: row["dense_us"] for row in reversed(mine)}
        table.add(f"{name}, dense", *(_time(dense.get(count)) for count in counts), "", style="bold")
        for keep in dict.fromkeys(row["keep"] for row in mine):
            share = [row for row in mine if row["keep"] == keep]
            for bits in dict.fromkeys(row["bits"] for row in share):
                ours = [row for row in share if row["bits"] == bits]
                label = f"  keep {keep:.2g}" + ("" if bits is None else f", {bits} bits")
                table.add(label, *_multiples(ours, counts, "of_dense"), _of_copy(ours))
            for key, label, _ in _RIVALS:
                if any(key in row for row in share):
                    table.add(f"  {label}, same bytes", *_multiples(share, counts, key), "", style="dim")
    table.print(console)


def _multiples(rows: Sequence[Mapping[str, Any]], counts: Sequence[int], key: str) -> list[str]:
    found = {row["tokens"]: row.get(key) for row in rows}
    return [times(found.get(count)) for count in counts]


def _of_copy(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bandwidth for the fewest tokens, relative to that of a copy."""
    return percent(min(rows, key=lambda row: row["tokens"])["of_copy"])


def _layer_name(row: Mapping[str, Any]) -> str:
    return f"{row['d_in']}→{row['d_out']} {row['group'].replace('_proj', '')}"


def _print_models(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not rows:
        return
    first, graphs = rows[0], any("decode_graph_ms" in row for row in rows)
    console.print(
        f"{first['shape']}, {first['layers']} decoder layers, random weights: one token with a static cache, a prompt "
        f"of {first['prompt']} tokens" + ("; launched: without a CUDA graph" if graphs else ""),
        style="dim",
        markup=False,
    )
    placed = any(row["device_bytes"] is not None for row in rows)
    launched: list[Column] = [("launched", "right")] if graphs else []
    table = Table(
        ("whole model", "left"), ("device" if placed else "weights", "right"),
        ("decode", "right"), *launched, ("prefill", "right"), *launched,
    )  # fmt: skip
    for row in rows:
        # the dense model is timed with every variant; its row shows the first times
        source, prefix = (rows[1], "dense_") if row["keep"] is None and len(rows) > 1 else (row, "")
        cells = [row["variant"], human_bytes(row["device_bytes"] if placed else row["weight_bytes"])]
        for mode, direct in (("decode", "decode_eager"), ("prefill", "prefill")):
            best = f"{mode}_graph" if graphs else direct
            ratio = row.get(f"{best}_of_dense")
            measured = _milliseconds(source.get(f"{prefix}{best}_ms"))
            cells.append(measured if ratio is None else f"{measured} {times(ratio)}")
            cells += [times(row.get(f"{direct}_of_dense"))] if graphs else []
        table.add(*cells)
    table.print(console)


def _milliseconds(value: object) -> str:
    real = number(value)
    return DASH if real is None else f"{real:.2f} ms"


def _print_loading(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    for row in rows:
        text = (
            f"Loading {row['shape']}, {row['variant']}: {human_bytes(row['file_bytes'])} in "
            f"{human_seconds(row['seconds'])} ({human_seconds(row['checked_seconds'])} with checksums); dense "
            f"{human_bytes(row['dense_file_bytes'])} in {human_seconds(row['dense_seconds'])}"
        )
        if row["device_bytes"] is not None:
            text += f"; on the device {human_bytes(row['device_bytes'])}"
        console.print(text, markup=False, soft_wrap=True)


def speed_plot(data: Mapping[str, Any]) -> Figure:
    """Time relative to the dense layer per shape, one panel per number of tokens.

    Raises:
        ResourceError: if matplotlib is not installed.
    """
    rows = data["layers"]
    counts = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(_layer_name(row) for row in rows))
    figure = blank_figure((2.2 + 2.1 * max(1, len(counts)), 1.7 + 0.42 * max(1, len(names))))
    figure.text(0.02, 0.965, f"Time relative to a dense layer: {data['device']}", fontsize=11, fontweight="bold",
                color=INK, va="top")  # fmt: skip
    panels = figure.subplots(1, max(1, len(counts)), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=False):
        _panel(axes, [row for row in rows if row["tokens"] == count], names)
        axes.set_title(f"{count} token{'s' * (count > 1)}", fontsize=9, color=INK)
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(6, len(handles)), frameon=False,
                      fontsize=8, labelcolor=INK)  # fmt: skip
    figure.subplots_adjust(left=0.24, right=0.98, top=0.84, bottom=0.30, wspace=0.12)
    return figure


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    places = {name: len(names) - 1 - index for index, name in enumerate(names)}
    kinds = list(dict.fromkeys((row["keep"], row["bits"]) for row in rows))
    for index, (keep, bits) in enumerate(kinds):
        mine = [row for row in rows if (row["keep"], row["bits"]) == (keep, bits)]
        label = f"keep {keep:.2g}" + ("" if bits is None else f", {bits} bits")
        axes.plot(
            [row["of_dense"] for row in mine], [places[_layer_name(row)] for row in mine], ls="", ms=5.5, label=label,
            marker=MARKERS[index % len(MARKERS)], color=PALETTE[index % len(PALETTE)],
        )  # fmt: skip
    for key, label, index in _RIVALS:
        found = [(row[key], places[_layer_name(row)]) for row in rows if key in row]
        if found:
            axes.plot(
                *zip(*found, strict=True), ls="", ms=5, mfc="none", marker=MARKERS[index], color=MUTED,
                label=f"{label}, same bytes",
            )  # fmt: skip
    axes.axvline(1.0, color=MUTED, lw=0.9, ls=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_yticks(range(len(names)), labels=list(reversed(names)), fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(colors=MUTED, labelsize=8, length=3)
    axes.grid(color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def write_numbers(data: Mapping[str, Any], out: Path) -> Path:
    """Write ``benchmark.json``, without absolute paths.

    Raises:
        OutputError: if it cannot be written.
    """
    return write_durably(out / f"{NAME}.json", report_json(data))


def write_speed(data: Mapping[str, Any], out: Path) -> list[Path]:
    """Write ``benchmark.json`` and, if layers were measured and matplotlib is installed, the plot as SVG and PNG.

    Raises:
        OutputError: if a file cannot be written.
    """
    written = [write_numbers(data, out)]
    if not data["layers"]:
        return written
    try:
        figure = speed_plot(data)
    except ResourceError:
        return written
    return [*written, *(save(figure, out / f"{NAME}.{kind}") for kind in ("svg", "png"))]

"""Plots of a report: errors per layer, bytes per layer, and quality against bytes.

Lines are labelled with their names. The same report produces the same bytes, as SVG and as PNG.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cospadi.report.figures import (
    FAINT,
    INK,
    MUTED,
    PALETTE,
    figure_with_axes,
    label_ends,
    layer_ticks,
    marker_of,
    nothing_to_draw,
    percent_axis,
    write_title,
)
from cospadi.report.text import human_bytes, number, percent, perplexity_text
from cospadi.report.view import GroupRow, error_meaning, mean, read_groups, total

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN_QUANTISATION = frozenset({"rtn", "gptq"})
_LEADS = (  # leading digits of ticks, from wide axes to narrow ones
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0),
)


def error_per_layer(report: Mapping[str, Any]) -> Figure:
    """Relative output error of every layer, one line per kind of projection.

    Several groups of one kind in a layer (experts) are drawn as their mean.

    Raises:
        ResourceError: without matplotlib.
    """
    figure, axes = figure_with_axes()
    write_title(figure, "Error per layer", error_meaning(report))
    points: dict[str, dict[int, list[float | None]]] = {}
    for row in read_groups(report):
        if row.layer is not None and row.error is not None:
            points.setdefault(row.kind, {}).setdefault(row.layer, []).append(row.error)
    if not points:
        nothing_to_draw(axes)
        return figure
    layers = sorted({layer for line in points.values() for layer in line})
    ends = []
    for index, (kind, line) in enumerate(points.items()):
        xs = sorted(line)
        ys = [mean(line[x]) or 0.0 for x in xs]
        colour = PALETTE[index % len(PALETTE)]
        marker = marker_of(index) if len(xs) <= 48 else ""
        axes.plot(xs, ys, color=colour, lw=1.6, marker=marker, ms=4 if len(xs) <= 24 else 2.5)
        ends.append((float(xs[-1]), ys[-1], kind, colour))
    axes.set_ylim(bottom=0.0)
    margin = max(0.4, 0.02 * (layers[-1] - layers[0]))
    axes.set_xlim(layers[0] - margin, layers[-1] + margin)
    layer_ticks(axes, layers)
    percent_axis(axes)
    axes.grid(axis="y", color=FAINT, lw=0.6)
    axes.set_xlabel("layer", color=MUTED, fontsize=9)
    label_ends(axes, ends)
    return figure


def _unit(largest: float) -> tuple[float, str]:
    """The decimal unit of bytes for an axis, chosen by its largest number."""
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= size:
            return size, name
    return 1.0, "B"


def bytes_per_layer(report: Mapping[str, Any]) -> Figure:
    """Bytes of every layer: outlined before compression, stacked by kind of projection after it.

    A group that spans several layers counts towards the first; groups outside the layers are not drawn.

    Raises:
        ResourceError: without matplotlib.
    """
    figure, axes = figure_with_axes()
    rows = [row for row in read_groups(report) if row.layer is not None and row.bytes is not None]
    if not rows:
        write_title(figure, "Bytes per layer", "")
        nothing_to_draw(axes)
        return figure
    layers = sorted({row.layer for row in rows if row.layer is not None})

    def sums(members: Sequence[GroupRow], of: Callable[[GroupRow], float | None]) -> list[float]:
        return [total(of(row) for row in members if row.layer == layer) or 0.0 for layer in layers]

    before = sums(rows, lambda row: row.bytes_before)
    size, unit = _unit(max(*before, *sums(rows, lambda row: row.bytes)))
    write_title(figure, "Bytes per layer", f"{unit} of compressed linear layers; outline: at 16 bits per weight")
    if any(before):
        axes.bar(layers, [b / size for b in before], width=0.86, facecolor="none", edgecolor=MUTED, lw=0.9)
    base = [0.0] * len(layers)
    ends = []
    for index, kind in enumerate(dict.fromkeys(row.kind for row in rows)):
        heights = [b / size for b in sums([row for row in rows if row.kind == kind], lambda row: row.bytes)]
        colour = PALETTE[index % len(PALETTE)]
        axes.bar(layers, heights, bottom=base, width=0.86, color=colour, linewidth=0)
        ends.append((layers[-1] + 0.43, base[-1] + heights[-1] / 2, kind, colour))
        base = [low + height for low, height in zip(base, heights, strict=True)]
    axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axes.set_ylim(0.0, 1.04 * max(max(base), max(before) / size))
    layer_ticks(axes, layers)
    axes.grid(axis="y", color=FAINT, lw=0.6)
    axes.set_xlabel("layer", color=MUTED, fontsize=9)
    label_ends(axes, ends)
    return figure


def _log_ticks(axes: Axes, low: float, high: float) -> None:
    """Label perplexities as plain numbers, even if the axis spans less than a decade."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    ticks: list[float] = []
    for leads in _LEADS:
        candidates = [lead * 10.0**power for power in range(-3, 13) for lead in leads]
        ticks = [tick for tick in candidates if low <= tick <= high]
        if len(ticks) >= 4:
            break
    else:
        ticks = [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(ticks, labels=[f"{tick:,.6g}" for tick in ticks])


def quality_against_bytes(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any] | None = None) -> Figure:
    """Perplexity against the share of bytes kept, one line per method.

    Compression increases to the right, so every line starts near the dense model and is labelled where lines are
    furthest apart. Plain quantisation (`PLAIN_QUANTISATION`), the baseline, is drawn dashed in ink. Rows without a
    finite perplexity are left out.

    Args:
        rows: ``{"method", "keep", "perplexity", "bytes", …}``; ``keep_actual`` is preferred to ``keep``.
        dense: ``{"perplexity", "bytes"}`` of the model before compression.

    Raises:
        ResourceError: without matplotlib.
    """
    figure, axes = figure_with_axes()
    dense_perplexity = number((dense or {}).get("perplexity"))
    dense_bytes = number((dense or {}).get("bytes"))
    size = "" if dense_bytes is None else f"; 100% is {human_bytes(dense_bytes)}"
    write_title(figure, "Quality against bytes", f"perplexity (log scale, lower is better) over bytes kept{size}")
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        keep = number(row.get("keep_actual"))
        keep = number(row.get("keep")) if keep is None else keep
        perplexity = number(row.get("perplexity"))
        if keep is not None and perplexity is not None and perplexity > 0:
            lines.setdefault(str(row.get("method", "?")), []).append((keep, perplexity))
    if not lines:
        nothing_to_draw(axes)
        return figure
    axes.set_yscale("log")
    ends, colours = [], iter(range(10**6))
    for method, points in sorted(lines.items()):
        points.sort(reverse=True)
        plain = method in PLAIN_QUANTISATION
        index = next(colours) if not plain else sorted(PLAIN_QUANTISATION).index(method)
        colour = INK if plain else PALETTE[index % len(PALETTE)]
        xs, ys = [keep for keep, _ in points], [perplexity for _, perplexity in points]
        axes.plot(
            xs, ys, color=colour, lw=1.6, ls=(0, (4, 2)) if plain else "-", ms=5,
            marker=marker_of(index), mfc="none" if plain else colour,
        )  # fmt: skip
        ends.append((xs[-1], ys[-1], method, colour))
    keeps = [keep for points in lines.values() for keep, _ in points]
    values = [perplexity for points in lines.values() for _, perplexity in points]
    if dense_perplexity is not None and dense_perplexity > 0:
        keeps.append(1.0)
        values.append(dense_perplexity)
        axes.axhline(dense_perplexity, color=MUTED, lw=0.9, ls=":")
        axes.plot([1.0], [dense_perplexity], color=INK, marker="*", ms=9, ls="")
    pad = max(0.02, 0.04 * (max(keeps) - min(keeps)))
    axes.set_xlim(max(keeps) + pad, min(keeps) - pad)
    reach = (max(values) / min(values)) ** 0.06 * 1.01
    axes.set_ylim(min(values) / reach, max(values) * reach)
    _log_ticks(axes, min(values) / reach, max(values) * reach)
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value).replace(".0%", "%")))
    axes.grid(color=FAINT, lw=0.6)
    axes.set_xlabel("bytes kept", color=MUTED, fontsize=9)
    if dense_perplexity is not None and dense_perplexity > 0:
        ends.append((axes.get_xlim()[1], dense_perplexity, f"dense {perplexity_text(dense_perplexity)}", MUTED))
    label_ends(axes, ends)
    return figure

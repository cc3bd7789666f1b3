"""Plots of a report: errors, bytes, and quality against bytes.

Figures are made without pyplot, so a program's own plots and backend stay as they are. The first six colours are
those of Okabe and Ito (2008), which people with any common colour vision tell apart; markers differ as well. Lines
carry their names. The same report gives the same bytes, as SVG and as PNG.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi.errors import ResourceError
from cospadi.io import write_durably
from cospadi.report.text import human_bytes, number, percent, perplexity_text
from cospadi.report.view import GroupRow, mean, read_groups, total

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
INK, MUTED, FAINT = "#1f2328", "#656d76", "#d0d7de"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
PLAIN_QUANTISATION = frozenset({"rtn", "gptq"})
_LEADS = (  # leading digits of ticks, from wide axes to narrow ones
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0),
)
_SIZE = (7.2, 3.5)  # inches
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files, and a page can give its own font and colours
    "svg.hashsalt": "cospadi",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "path.simplify": False,
}


def _figure() -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResourceError("plots need matplotlib, which is not installed: pip install 'cospadi[report]'") from error
    figure = Figure(figsize=_SIZE, dpi=144)
    figure.patch.set_alpha(0.0)
    axes = figure.add_axes((0.085, 0.14, 0.745, 0.68))
    axes.patch.set_alpha(0.0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED, labelsize=8.5, length=3)
    axes.tick_params(which="minor", length=2)
    axes.set_axisbelow(True)
    return figure, axes


def _marker(index: int) -> str:
    """Another marker for the same colour when the palette starts again."""
    return MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]


def _title(figure: Figure, title: str, remark: str) -> None:
    left = figure.axes[0].get_position().x0
    figure.text(left, 0.955, title, fontsize=11, fontweight="bold", color=INK, va="center", ha="left")
    figure.text(left, 0.885, remark, fontsize=8.5, color=MUTED, va="center", ha="left")


def _layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    """Whole numbers only, at most about a dozen."""
    first, last = min(layers), max(layers)
    steps = (1, 2, 5, 10, 20, 50, 100)
    step = next((step for step in steps if (last - first) / step <= 14), 1 + (last - first) // 14)
    axes.set_xticks(range(first, last + 1, step))


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights in [0, 1] apart until neighbours are `gap` apart, as little as a simple sweep allows.

    Args:
        heights: wanted places, any order.
        gap: least distance; made smaller if not all fit.

    Returns:
        places in the order of `heights`.
    """
    if len(heights) > 1:
        gap = min(gap, 1.0 / (len(heights) - 1))
    order = sorted(range(len(heights)), key=lambda i: (heights[i], i))
    places = [0.0] * len(heights)
    floor = 0.0
    for index in order:
        places[index] = floor = max(heights[index], floor)
        floor += gap
    ceiling = 1.0
    for index in reversed(order):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    return places


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the name of every line in the right margin, with a hairline from its last point.

    Args:
        axes: with final limits.
        ends: (x, y, name, colour) of each line's last point, in data coordinates.
    """
    to_axes = axes.transAxes.inverted()
    points = [to_axes.transform(axes.transData.transform((x, y))) for x, y, _, _ in ends]
    places = spread_labels([min(1.0, max(0.0, float(point[1]))) for point in points], 0.075)
    for (_, _, name, colour), point, place in zip(ends, points, places, strict=True):
        axes.annotate(
            name if len(name) <= 18 else name[:17] + "…",
            xy=(float(point[0]), float(point[1])),
            xycoords="axes fraction",
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            ha="left",
            annotation_clip=False,
            parse_math=False,
            arrowprops=dict(arrowstyle="-", color=colour, lw=0.6, alpha=0.6, shrinkA=0, shrinkB=2),  # noqa: C408
        )


def _nothing(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "nothing to draw", transform=axes.transAxes, ha="center", va="center", color=MUTED)


def _percent_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def error_per_layer(report: Mapping[str, Any]) -> Figure:
    """Relative output error of every layer, one line per kind of projection.

    Groups of the same kind in one layer (experts) are drawn as their mean.

    Raises:
        ResourceError: without matplotlib.
    """
    figure, axes = _figure()
    _title(figure, "Error per layer", "relative error of the layer's outputs on the calibration text")
    points: dict[str, dict[int, list[float | None]]] = {}
    for row in read_groups(report):
        if row.layer is not None and row.error is not None:
            points.setdefault(row.kind, {}).setdefault(row.layer, []).append(row.error)
    if not points:
        _nothing(axes)
        return figure
    layers = sorted({layer for line in points.values() for layer in line})
    ends = []
    for index, (kind, line) in enumerate(points.items()):
        xs = sorted(line)
        ys = [mean(line[x]) or 0.0 for x in xs]
        colour = PALETTE[index % len(PALETTE)]
        marker = _marker(index) if len(xs) <= 48 else ""
        axes.plot(xs, ys, color=colour, lw=1.6, marker=marker, ms=4 if len(xs) <= 24 else 2.5)
        ends.append((float(xs[-1]), ys[-1], kind, colour))
    axes.set_ylim(bottom=0.0)
    margin = max(0.4, 0.02 * (layers[-1] - layers[0]))
    axes.set_xlim(layers[0] - margin, layers[-1] + margin)
    _layer_ticks(axes, layers)
    _percent_axis(axes)
    axes.grid(axis="y", color=FAINT, lw=0.6)
    axes.set_xlabel("layer", color=MUTED, fontsize=9)
    _label_ends(axes, ends)
    return figure


def _unit(largest: float) -> tuple[float, str]:
    """A decimal unit of bytes that suits the largest number of an axis."""
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= size:
            return size, name
    return 1.0, "B"


def bytes_per_layer(report: Mapping[str, Any]) -> Figure:
    """Bytes of every layer: before as an outline, after stacked by kind of projection.

    A group that spans several layers counts for the first of them; groups outside of layers are not drawn.

    Raises:
        ResourceError: without matplotlib.
    """
    figure, axes = _figure()
    rows = [row for row in read_groups(report) if row.layer is not None and row.bytes is not None]
    if not rows:
        _title(figure, "Bytes per layer", "")
        _nothing(axes)
        return figure
    layers = sorted({row.layer for row in rows if row.layer is not None})

    def sums(members: Sequence[GroupRow], of: Callable[[GroupRow], float | None]) -> list[float]:
        return [total(of(row) for row in members if row.layer == layer) or 0.0 for layer in layers]

    before = sums(rows, lambda row: row.bytes_before)
    size, unit = _unit(max(*before, *sums(rows, lambda row: row.bytes)))
    _title(figure, "Bytes per layer", f"{unit} of compressed linear layers; outline: before, at 16 bits a weight")
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
    _layer_ticks(axes, layers)
    axes.grid(axis="y", color=FAINT, lw=0.6)
    axes.set_xlabel("layer", color=MUTED, fontsize=9)
    _label_ends(axes, ends)
    return figure


def _log_ticks(axes: Axes, low: float, high: float) -> None:
    """Perplexities as plain numbers, also where the axis spans less than a decade."""
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
    """Perplexity against the share of bytes kept, one line a method.

    Compression grows to the right, so every line starts near the dense model and its name stands where lines
    are furthest apart. Plain quantisation (`PLAIN_QUANTISATION`), the rival to beat, is drawn in ink with
    dashes. Rows without a finite perplexity are left out.

    Args:
        rows: ``{"method", "keep", "perplexity", "bytes", …}``; ``keep_actual`` counts before ``keep``.
        dense: ``{"perplexity", "bytes"}`` of the model before compression.

    Raises:
        ResourceError: without matplotlib.
    """
    figure, axes = _figure()
    dense_perplexity = number((dense or {}).get("perplexity"))
    dense_bytes = number((dense or {}).get("bytes"))
    size = "" if dense_bytes is None else f"; 100% is {human_bytes(dense_bytes)}"
    _title(figure, "Quality against bytes", f"perplexity (log scale, lower is better) by share of bytes kept{size}")
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        keep = number(row.get("keep_actual"))
        keep = number(row.get("keep")) if keep is None else keep
        perplexity = number(row.get("perplexity"))
        if keep is not None and perplexity is not None and perplexity > 0:
            lines.setdefault(str(row.get("method", "?")), []).append((keep, perplexity))
    if not lines:
        _nothing(axes)
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
            marker=_marker(index), mfc="none" if plain else colour,
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
    _label_ends(axes, ends)
    return figure


def render(figure: Figure, kind: str) -> bytes:
    """A figure as bytes, the same for the same figure.

    Args:
        figure: any.
        kind: ``"svg"`` (transparent) or ``"png"`` (on white).
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(_STYLE):
        if kind == "svg":
            empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
            figure.savefig(buffer, format="svg", metadata=empty, transparent=True)
        else:
            figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor="white")
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure to a ``.svg`` or ``.png`` file.

    Raises:
        ValueError: for another suffix.
        OutputError: if the file cannot be written.
    """
    target = Path(path)
    kind = target.suffix.lower().lstrip(".")
    if kind not in ("svg", "png"):
        raise ValueError(f"{target.name}: plots are written as .svg or .png")
    return write_durably(target, render(figure, kind))

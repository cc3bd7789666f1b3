"""What all plots share: empty figures, colours, labels, and rendering to the same bytes every time.

Figures are made without pyplot, so a program's own plots and backend are left alone. The first six colours are those of
Okabe and Ito (2008), which remain distinct under common colour-vision deficiencies; markers differ as well.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi.errors import ResourceError
from cospadi.io import write_durably

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
INK, MUTED, FAINT = "#1f2328", "#656d76", "#d0d7de"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
SIZE = (7.2, 3.5)
"""Width and height of a plot in inches."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files, and a page can set its own font and colours
    "svg.hashsalt": "cospadi",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "path.simplify": False,
}


def blank_figure(size: tuple[float, float] = SIZE) -> Figure:
    """A figure without axes.

    Args:
        size: width and height in inches.

    Raises:
        ResourceError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResourceError("plots need matplotlib, which is not installed: pip install 'cospadi[report]'") from error
    return Figure(figsize=size, dpi=144)


def figure_with_axes(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """A transparent figure with one pair of axes, which leave room for a title above and labels to the right.

    Args:
        size: width and height in inches.

    Raises:
        ResourceError: without matplotlib.
    """
    figure = blank_figure(size)
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


def marker_of(index: int) -> str:
    """The marker of line `index`: a different one for the same colour once the palette starts again."""
    return MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]


def write_title(figure: Figure, title: str, remark: str) -> None:
    """Write a title and a remark above the axes."""
    left = figure.axes[0].get_position().x0
    figure.text(left, 0.955, title, fontsize=11, fontweight="bold", color=INK, va="center", ha="left")
    figure.text(left, 0.885, remark, fontsize=8.5, color=MUTED, va="center", ha="left")


def nothing_to_draw(axes: Axes) -> None:
    """Say in place of a plot that there is no data."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, "nothing to draw", transform=axes.transAxes, ha="center", va="center", color=MUTED)


def layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    """Set whole numbers as ticks of the horizontal axis, about a dozen at most."""
    first, last = min(layers), max(layers)
    steps = (1, 2, 5, 10, 20, 50, 100)
    step = next((step for step in steps if (last - first) / step <= 14), 1 + (last - first) // 14)
    axes.set_xticks(range(first, last + 1, step))


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights in [0, 1] apart until neighbours are `gap` apart, as little as a simple sweep allows.

    Args:
        heights: desired places, in any order.
        gap: least distance; reduced if not all fit.

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


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
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


def percent_axis(axes: Axes) -> None:
    """Label the vertical axis in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


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

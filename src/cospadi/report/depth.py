"""Reports on a pruned model: heat map of all pairs of blocks with the cut, HTML page, model card and summary."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cospadi.errors import ResourceError
from cospadi.io import write_durably
from cospadi.report.figures import MUTED, PALETTE, figure_with_axes, layer_ticks, nothing_to_draw, save, write_title
from cospadi.report.html_parts import (
    html_cards,
    html_code,
    html_document,
    html_facts,
    html_figure,
    html_no_plots,
    html_remark,
    html_section,
    html_table,
    html_warnings,
    yaml_text,
)
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
from cospadi.report.terminal import print_facts, print_heading, print_warnings
from cospadi.report.text import (
    DASH,
    arrow,
    error_text,
    human_bytes,
    human_count,
    human_seconds,
    mapping,
    moment,
    number,
    percent,
    publishable,
    sequence,
)
from cospadi.report.view import (
    Fact,
    calibration_facts,
    model_facts,
    model_name,
    opener,
    perplexity_fact,
    requested,
    warnings_of,
)
from cospadi.report.write import report_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAT_MAP = "distances.png"
_STOCK = """\
from transformers import {kind}, AutoTokenizer

path = "."  # this folder, or its id on the hub
model = {kind}.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
"""
_MEASURES = {"cosine": "mean cosine distance over all tokens", "angular": "angular distance of the last token"}


def removed_text(report: Mapping[str, Any]) -> str:
    """The removed blocks as text: ``4-6, 9``."""
    parts = []
    for run in sequence(mapping(report.get("prune")).get("runs")):
        first, stop = run
        parts.append(str(first) if stop - first == 1 else f"{first}-{stop - 1}")
    return ", ".join(parts)


def depth_headlines(report: Mapping[str, Any]) -> list[Fact]:
    """The headline figures."""
    times = mapping(report.get("seconds"))
    removed = removed_text(report)
    blocks = f"{report.get('blocks_before')} → {report.get('blocks_after')}" if removed else ""
    facts = [
        Fact("Blocks", blocks, f"removed: {removed}, counted from 0"),
        Fact(
            "Blocks' matrices",
            arrow(human_bytes(report.get("bytes_before")), human_bytes(report.get("bytes_after"))),
            "at 16 bits a weight",
        ),
        Fact("Bytes kept", percent(report.get("keep_actual")), requested(report)),
        Fact("Parameters", arrow(human_count(report.get("parameters_before")), human_count(report.get("parameters")))),
        Fact(
            "Whole checkpoint",
            arrow(human_bytes(report.get("file_bytes_before")), human_bytes(report.get("file_bytes"))),
            "files on disk",
        ),
        perplexity_fact(mapping(report.get("evaluation"))),
        Fact("Time", human_seconds(times.get("total")), ""),
    ]
    return [fact for fact in facts if fact.value not in ("", "–")]


def run_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """One row per removed run: blocks, what replaces them, distance, error of the correction."""
    told = mapping(report.get("prune"))
    transforms = {tuple(sequence(item.get("removed"))): item for item in sequence(told.get("transforms"))}
    distances = sequence(mapping(report.get("distances")).get("cosine"))
    rows = []
    for first, stop in sequence(told.get("runs")):
        transform = mapping(transforms.get(tuple(range(first, stop))))
        corrected = bool(transform) and transform.get("corrected", True)
        place = str(transform.get("into") or "a linear block") if corrected else "nothing"
        distance = number(distances[first][stop]) if len(distances) > stop else None
        rows.append(
            [
                str(first) if stop - first == 1 else f"{first}-{stop - 1}",
                place,
                "–" if distance is None else f"{distance:.4f}",
                error_text(transform.get("error")) if corrected else DASH,
            ]
        )
    return rows


def trial_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """One row per run that was tried: blocks, ridge of the correction, held-out error and loss."""
    rows = []
    for trial in map(mapping, sequence(mapping(report.get("prune")).get("trials"))):
        first, stop = sequence(trial.get("run"))
        ridge, loss, error = (number(trial.get(key)) for key in ("ridge", "loss", "error"))
        rows.append(
            [
                str(first) if stop - first == 1 else f"{first}-{stop - 1}",
                "no correction" if not trial.get("corrected") else DASH if ridge is None else f"{ridge:g}",
                DASH if error is None else f"{error:.4g}",
                DASH if loss is None else f"{loss:.4f}",
            ]
        )
    return rows


def heat_map(report: Mapping[str, Any], measure: str = "cosine") -> Figure:
    """Distances between the hidden states of all pairs of depths; the chosen cut is outlined.

    Args:
        report: the content of ``report.json``.
        measure: ``cosine`` or ``angular``.

    Raises:
        ResourceError: without matplotlib.
    """
    figure, axes = figure_with_axes((6.4, 5.4))
    axes.set_position((0.1, 0.1, 0.76, 0.76))
    write_title(figure, "Distance between depths", f"{_MEASURES[measure]}; outlined: the cut")
    distances = sequence(mapping(report.get("distances")).get(measure))
    if len(distances) < 2:
        nothing_to_draw(axes)
        return figure
    from matplotlib.patches import Rectangle

    count = len(distances) - 1
    # rows: first block of a run; columns: its last block; nothing below the diagonal
    values = [[float(value) for value in row[1:]] for row in distances[:-1]]
    cells = [
        [value if column >= row else math.nan for column, value in enumerate(line)] for row, line in enumerate(values)
    ]
    # the embedding is often far from everything and must not set the colour scale
    seen = [value for line in cells[1 if count > 2 else 0 :] for value in line if not math.isnan(value)]
    top = max(seen) or 1.0
    edges = [place - 0.5 for place in range(count + 1)]
    mesh = axes.pcolormesh(edges, edges, cells, cmap="cividis", vmax=top)
    if count <= 12:
        for row, line in enumerate(cells):
            for column, value in enumerate(line[row:], row):
                colour = "#1f2320" if value > 0.55 * top else "#fdfdfd"
                axes.text(column, row, f"{value:.2f}", color=colour, fontsize=7, ha="center", va="center")
    for first, stop in sequence(mapping(report.get("prune")).get("runs")):
        axes.add_patch(Rectangle((stop - 1.5, first - 0.5), 1, 1, fill=False, edgecolor=PALETTE[1], lw=2.5))
    axes.invert_yaxis()
    axes.set_aspect("equal")
    layer_ticks(axes, range(count))
    axes.set_yticks(axes.get_xticks())
    axes.set_xlabel("last block of the run", color=MUTED, fontsize=9)
    axes.set_ylabel("first block of the run", color=MUTED, fontsize=9)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02, extend="max")
    bar.ax.tick_params(colors=MUTED, labelsize=8)
    return figure


def depth_page(report: Mapping[str, Any]) -> str:
    """The HTML report: one self-contained file without scripts."""
    report = publishable(report)
    columns = [("removed blocks", False), ("replaced by", False), ("cosine distance", True), ("error", True)]
    rows = [[escape(cell) for cell in row] for row in run_rows(report)]
    remark = html_remark(
        "Error: squared error of the correction on the text that it was fitted to, against plain removal."
    )
    tried = html_table(
        [("blocks", False), ("ridge", True), ("held-out error", True), ("held-out loss", True)],
        [[escape(cell) for cell in row] for row in trial_rows(report)],
    )
    return html_document(
        f"{model_name(report)}, pruned by cospadi",
        model_name(report),
        ("pruned by cospadi", f"method {report.get('method')}", moment(report.get("created"))),
        [
            html_cards(depth_headlines(report)),
            html_warnings(warnings_of(report)),
            html_section("The cut", remark + html_table(columns, rows) if rows else ""),
            html_section("Runs that were tried", tried),
            html_section("All pairs of blocks", _figures(report)),
            html_section("Recipe", html_code(yaml_text(report.get("recipe")))),
            html_section("Calibration text", html_facts(calibration_facts(report))),
            html_section("Run", html_facts(model_facts(report))),
            html_section("Command", html_code(str(report.get("command") or ""))),
        ],
    )


def _figures(report: Mapping[str, Any]) -> str:
    try:
        return "".join(
            html_figure(heat_map(report, measure), measure, f"{label} of all pairs of depths")
            for measure, label in _MEASURES.items()
        )
    except ResourceError as error:
        return html_no_plots(error)


def depth_card(report: Mapping[str, Any], picture: bool = True) -> str:
    """The model card: Markdown with YAML front matter.

    Args:
        report: the content of ``report.json``.
        picture: whether the heat map lies in ``assets``.
    """
    report = publishable(report)
    name, method = inline(model_name(report)), inline(str(report.get("method")))
    stock = bool(report.get("stock"))
    how = "It is an ordinary checkpoint of its architecture: it needs no other package." if stock else (
        "It has layers that its architecture does not know: loading it needs the package cospadi."
    )  # fmt: skip
    rows = [[fact.label, fact.value, fact.note] for fact in depth_headlines(report)]
    columns = ["removed blocks", "replaced by", "cosine distance", "error against plain removal"]
    image = f"![Distances of all pairs of depths; the cut is outlined]({ASSETS}/{HEAT_MAP})" if picture else ""
    loading = _STOCK.format(kind=opener(report))
    return markdown_document(
        [
            front_matter(report, ("cospadi", "pruning")),
            f"# {name}, pruned by cospadi",
            f"This is {name} made smaller with the method {method}, without retraining. {how}",
            table(["", "", ""], rows),
            section(
                "How to load",
                fenced(loading if stock else f"import cospadi  # registers the format\n{loading}", "python"),
            ),
            section("Warnings", bullets(warnings_of(report))),
            section("The cut", table(columns, run_rows(report), numbers_from=2)),
            image,
            section("Recipe", fenced(yaml_text(report.get("recipe")), "yaml")),
            section("Calibration text", facts_list(calibration_facts(report))),
            section("Run", facts_list(model_facts(report))),
            section("Command", fenced(str(report.get("command") or ""), "bash")),
        ]
    )


def write_depth(report: Mapping[str, Any], out_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``report.json``, ``report.html``, ``README.md`` and the heat map in ``assets/``.

    Without matplotlib the page and the card come without plots.

    Raises:
        OutputError: if a file cannot be written.
    """
    out = Path(out_dir)
    files = {"report.json": write_durably(out / "report.json", report_json(report))}
    with suppress(ResourceError):
        files[f"{ASSETS}/{HEAT_MAP}"] = save(heat_map(report), out / ASSETS / HEAT_MAP)
    files["report.html"] = write_durably(out / "report.html", depth_page(report))
    files["README.md"] = write_durably(out / "README.md", depth_card(report, f"{ASSETS}/{HEAT_MAP}" in files))
    return files


def print_prune(report: Mapping[str, Any], console: Console) -> None:
    """Print the summary at the end of ``cospadi prune``: the cut, sizes and warnings."""
    print_heading(console, model_name(report), report.get("method"))
    print_facts(console, depth_headlines(report))
    corrects = bool(sequence(mapping(report.get("prune")).get("transforms")))
    for removed, place, _, error in run_rows(report):
        if place != "nothing":
            told = f"Blocks {removed}: replaced by {place}, error {error} of plain removal's"
        else:
            told = f"Blocks {removed}: removed without correction; none was better on held-out text" if corrects else ""
        if told:
            console.print(told, style="dim", markup=False)
    print_warnings(console, report)

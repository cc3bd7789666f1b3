import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from cospadi.errors import ResourceError
from cospadi.report import bytes_per_layer, error_per_layer, quality_against_bytes
from cospadi.report.figures import render, save, spread_labels


def texts(figure) -> list[str]:
    return [text.get_text() for text in [*figure.texts, *figure.axes[0].texts]]


def test_errors_are_drawn_one_line_a_kind(report):
    figure = error_per_layer(report)
    lines = figure.axes[0].lines
    assert len(lines) == 4
    for index, line in enumerate(lines):
        errors = [group["error"] for group in report["groups"][index::4]]
        np.testing.assert_array_equal(line.get_xdata(), range(9))
        np.testing.assert_allclose(line.get_ydata(), errors)
    assert {"q+k+v", "o", "gate+up", "down"} <= set(texts(figure))


def test_experts_of_a_layer_are_drawn_as_their_mean():
    errors = {0: [0.1, 0.3], 1: [0.2, 0.4, 0.6]}
    groups = [
        {"modules": [f"model.layers.{layer}.mlp.experts.{i}.up_proj"], "error": error}
        for layer, members in errors.items()
        for i, error in enumerate(members)
    ]
    (line,) = error_per_layer({"groups": groups}).axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.4])


def test_bars_stack_to_the_bytes_of_each_layer(report):
    axes = bytes_per_layer(report).axes[0]
    before, *kinds = axes.containers
    assert len(kinds) == 4
    for layer in range(9):
        members = report["groups"][4 * layer : 4 * layer + 4]
        assert before[layer].get_height() * 1e6 == pytest.approx(sum(group["bytes_before"] for group in members))
        top = kinds[-1][layer].get_y() + kinds[-1][layer].get_height()
        assert top * 1e6 == pytest.approx(sum(group["bytes"] for group in members))


def test_quality_is_drawn_on_a_log_scale_with_dense_and_names(rows):
    figure = quality_against_bytes(rows, {"perplexity": 17.2, "bytes": 212e6})
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    low, high = axes.get_xlim()
    assert low > high  # compression grows to the right
    labels = texts(figure)
    assert {"cospadi", "svd_llm", "gptq", "rtn", "compot", "dense 17.20"} <= set(labels)
    curves = {len(line.get_xdata()) for line in axes.lines}
    assert curves == {4, 3, 2, 1}  # svd_llm lost its diverged point; the dense line and its star
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert len(dashed) == 2
    bottom, top = axes.get_ylim()
    assert bottom < 17.2 and top > max(row["perplexity"] for row in rows if row["perplexity"] == row["perplexity"])
    assert 4 <= len(axes.get_yticks()) <= 12


@pytest.mark.parametrize("span", [1.0, 1.001, 1.2, 3.0, 40.0, 1e5])
def test_log_axes_of_any_span_have_ticks_inside(span):
    rows = [{"method": "a", "keep": 0.8, "perplexity": 11.3}, {"method": "a", "keep": 0.4, "perplexity": 11.3 * span}]
    axes = quality_against_bytes(rows).axes[0]
    low, high = axes.get_ylim()
    ticks = axes.get_yticks()
    assert 2 <= len(ticks) <= 16
    assert all(low <= tick <= high for tick in ticks)
    assert len({text.get_text() for text in axes.get_yticklabels()}) == len(ticks)


@pytest.mark.parametrize("kind", ["svg", "png"])
@pytest.mark.parametrize("make", [error_per_layer, bytes_per_layer, lambda report: None])
def test_the_same_report_gives_the_same_bytes(report, rows, kind, make):
    first, second = (render(make(report) or quality_against_bytes(rows), kind) for _ in range(2))
    assert first == second
    if kind == "svg":
        ElementTree.fromstring(first)
        assert b"dc:date" not in first
    else:
        assert b"tEXt" not in first


def test_files_are_written_by_suffix(report, tmp_path):
    figure = error_per_layer(report)
    assert save(figure, tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    assert save(figure, tmp_path / "deep" / "b.PNG").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="svg"):
        save(figure, tmp_path / "c.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "deep"]


def test_nothing_to_draw_gives_an_empty_figure():
    for figure in (error_per_layer({}), bytes_per_layer({"groups": [{}]}), quality_against_bytes([])):
        assert "nothing to draw" in texts(figure)
        render(figure, "svg")


def test_extreme_reports_are_drawn_without_warnings(report, recwarn):
    for group in report["groups"]:
        group["error"], group["bytes"] = 0.0, 0
    report["groups"][0]["layer"] = 400
    for make in (error_per_layer, bytes_per_layer):
        render(make(report), "png")
    render(quality_against_bytes([{"method": "x$", "keep": 1, "perplexity": 3}], {"perplexity": 3.0}), "png")
    assert [str(warning.message) for warning in recwarn] == []


def test_pyplot_and_its_settings_stay_alone(report):
    import matplotlib

    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    render(error_per_layer(report), "svg")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_without_matplotlib_the_error_says_what_to_install(report, without_matplotlib):
    with pytest.raises(ResourceError, match=r"cospadi\[report\]"):
        error_per_layer(report)


def test_labels_are_spread_but_stay_in_order_and_inside():
    rng = np.random.default_rng(5)
    for count in (1, 2, 5, 13, 40):
        heights = list(rng.random(count) ** 3)
        places = spread_labels(heights, 0.075)
        assert list(np.argsort(places, kind="stable")) == list(np.argsort(heights, kind="stable"))
        assert min(places) >= -1e-9 and max(places) <= 1 + 1e-9
        gaps = np.diff(sorted(places))
        assert count == 1 or gaps.min() >= min(0.075, 1 / (count - 1)) - 1e-9
    assert spread_labels([0.2, 0.9], 0.075) == [0.2, 0.9]

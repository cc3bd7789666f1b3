import csv
import io
import json
import math

import pytest

from cospadi.report import comparison as module
from cospadi.report import plots
from cospadi.report.comparison import all_rows, comparison_csv, comparison_page, write_comparison


def row(method, keep, perplexity, **more):
    figures = {"bytes": int(1e6 * keep), "bytes_before": 10**6, "total_bytes": int(1e6 * keep) + 500, "seconds": 2.5}
    texts = {"a.txt": {"perplexity": perplexity, "bits_per_byte": 1.5}}
    return (
        {"method": method, "keep": keep, "keep_actual": keep, "perplexity": perplexity, "texts": texts} | figures | more
    )


@pytest.fixture
def data():
    return {
        "model": "/somewhere/private/model-x",
        "dense": {
            "perplexity": 10.0,
            "bytes": 10**6,
            "total_bytes": 10**6 + 500,
            "texts": {"a.txt": {"perplexity": 10.0}},
        },
        "rows": [
            row(
                "svd",
                0.6,
                31.25,
                tasks={"quiz": {"acc": 0.25, "acc_stderr": 0.05, "samples": 40, "paradigms": {"p": 1}}},
            ),
            row("<b>mine</b>", 0.8, 12.5),
            {"method": "cospadi", "keep": 0.1, "perplexity": None, "bytes": None, "reason": "least <possible> is 0.2"},
        ],
        "references": [row("rtn", 0.25, 11.0, options={"bits": 4})],
        "measured": "in float32",
        "text": "a.txt",
        "seq_len": 1024,
        "command": "cospadi compare /somewhere/private/model-x --out out",
    }


def test_csv_has_a_line_for_each(data):
    lines = list(csv.DictReader(io.StringIO(comparison_csv(data))))
    assert [line["method"] for line in lines] == ["dense", "svd", "<b>mine</b>", "cospadi", "rtn 4 bit"]
    assert lines[1]["quiz acc"] == "0.25" and lines[2]["quiz acc"] == "" and "quiz paradigms" not in lines[0]
    assert float(lines[1]["perplexity a.txt"]) == 31.25 and lines[3]["perplexity"] == ""
    assert lines[3]["reason"] == "least <possible> is 0.2" and float(lines[0]["keep"]) == 1


def test_page_escapes_orders_and_stands_alone(data):
    page = comparison_page(data)
    assert "&lt;b&gt;mine&lt;/b&gt;" in page and "<b>mine" not in page
    assert "least &lt;possible&gt; is 0.2" in page and "25.0% ± 5.0" in page and "+212.5%" in page
    table = page[page.index("<tbody>") :]
    places = [table.index(name) for name in ("dense", "&lt;b&gt;mine", ">svd<", "rtn 4 bit", ">cospadi<")]
    assert places == sorted(places)
    assert (
        "<svg" in page
        and "<script" not in page
        and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    )


def test_page_tells_warnings(data):
    assert 'class="warnings"' not in comparison_page(data)
    page = comparison_page(data | {"warnings": ["not the <same> layers"]})
    assert "not the &lt;same&gt; layers" in page and 'class="warnings"' in page


def test_files_are_strict_and_tell_no_paths(data, tmp_path):
    data["rows"][0]["perplexity"] = math.inf
    files = write_comparison(data, tmp_path / "new")
    assert {path.name for path in files.values()} == {path.name for path in (tmp_path / "new").iterdir()}
    assert set(files) == {"json", "csv", "html", "png", "svg"}
    kept = json.loads(files["json"].read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert len(kept["rows"]) == 3
    assert all(b"private" not in path.read_bytes() for path in files.values())
    assert files["png"].read_bytes().startswith(b"\x89PNG") and b"<svg" in files["svg"].read_bytes()


def test_without_matplotlib_there_are_no_plots(data, tmp_path, monkeypatch):
    from cospadi.errors import ResourceError

    def missing(*_):
        raise ResourceError("plots need matplotlib")

    monkeypatch.setattr(plots, "quality_against_bytes", missing)
    assert set(write_comparison(data, tmp_path)) == {"json", "csv", "html"}
    assert "plots need matplotlib" in module.comparison_page(data)


def test_an_empty_comparison_is_still_written(tmp_path):
    files = write_comparison({}, tmp_path)
    assert "dense" in files["csv"].read_text() and all_rows({}) == []

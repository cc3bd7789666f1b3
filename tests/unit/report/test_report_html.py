import re
from html.parser import HTMLParser

import pytest

from cospadi.errors import OutputError
from cospadi.report import html, write_html
from cospadi.report.figures import FAINT, INK, MUTED, PALETTE
from cospadi.report.text import human_bytes

VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, ids, attributes and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.tags, self.ids, self.addresses, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words.append(data)


@pytest.fixture(scope="module")
def module_page(tmp_path_factory, module_report):
    path = write_html(module_report, tmp_path_factory.mktemp("page") / "report.html")
    return module_report, path.read_text(encoding="utf-8")


def test_page_parses_and_needs_nothing_from_elsewhere(module_page):
    _, text = module_page
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert len(page.ids) == len(set(page.ids)) > 10
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert "prefers-color-scheme: dark" in text and "viewport" in text
    assert page.tags.count("svg") == 2


def test_page_has_every_group_and_the_numbers(module_page):
    report, text = module_page
    words = Page(text).text
    for group in report["groups"]:
        assert group["name"] in words
        assert human_bytes(group["bytes"]) in words
        assert f"{100 * group['error']:.2f}%" in words
    for expected in ("17.23 → 21.37", "60.0% requested", report["command"], "rho: 2.0", "5.23.0", "262,144"):
        assert expected in words
    assert report["calibration"]["sha256"] in words
    assert report["warnings"][0] in words


def test_plots_take_their_colours_from_the_page(module_page):
    _, text = module_page
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert "var(--c0)" in svg and "var(--ink)" in svg
        assert not set(re.findall(r"#[0-9a-f]{6}\b", svg)) & {INK, MUTED, FAINT, *PALETTE}
        assert re.match(r"<svg[^>]*viewBox", svg) and not re.match(r'<svg[^>]* width="', svg)


@pytest.mark.parametrize("where", ["model", "method", "command", "architecture", "created"])
def test_hostile_texts_are_escaped(report, where, without_matplotlib):
    hostile = "</title></style><script>alert('1')</script>\"><img src=x onerror=y> & {{x}}"
    report[where] = hostile
    report["groups"][0]["name"] = hostile
    report["groups"][1]["method"] = hostile
    report["warnings"] = [hostile]
    report["evaluation"]["text"] = report["calibration"]["source"] = report["versions"][hostile] = hostile
    report["recipe"] = {hostile: hostile}
    page = Page(html.page(report))
    assert "script" not in page.tags and "img" not in page.tags
    assert page.text.count("alert('1')") >= 4


def test_hostile_names_are_escaped_in_plots(report):
    report["groups"] = report["groups"][:2]
    report["groups"][0]["modules"] = ["model.layers.0.<script>x</script>$\\frac{"]
    page = Page(html.page(report))
    assert "svg" in page.tags and "script" not in page.tags


def test_minimal_and_damaged_reports_give_a_page(damaged, without_matplotlib):
    for report in damaged:
        page = Page(html.page(report))
        assert page.tags[0] == "html" and page.text.strip() and "svg" not in page.tags


def test_damaged_reports_with_plots(damaged):
    for report in damaged[1::29]:
        page = Page(html.page(report))
        assert page.tags[0] == "html" and page.text.strip()


def test_without_matplotlib_the_tables_stand_alone(report, tmp_path, without_matplotlib):
    page = Page(write_html(report, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "svg" not in page.tags
    assert "cospadi[report]" in page.text
    assert all(group["name"] in page.text for group in report["groups"])


def test_a_place_that_cannot_be_written_is_named(report, tmp_path, without_matplotlib):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"report\.html"):
        write_html(report, tmp_path / "file" / "report.html")

"""Fenced code blocks of Markdown pages, and how each is checked.

A block's language says what it is: ``console``, ``bash`` and ``python`` blocks run; ``yaml`` is a recipe; ``json`` must
parse; ``text`` is output or a formula. A comment before a block says why the tests cannot run it, and names the log of
its last run::

    <!-- run: gpu log=docs/logs/benchmark.txt -->

A comment ``<!-- given: small -->`` anywhere in a page asks for ready-made files, see ``stand_ins`` in conftest.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = {"console", "bash", "python"}
DATA = {"yaml", "json", "text"}
MARKERS = {"gpu", "vllm", "slow"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<language>[\w-]*) *(?P<rest>.*)$")
_MARK = re.compile(r"^ *<!-- run: (?P<marker>\w+) log=(?P<log>\S+) -->$")
_GIVEN = re.compile(r"<!-- given: (?P<names>[\w ,.-]+) -->")
_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_HEADING = re.compile(r"^#+ +(?P<title>.*?) *$")
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    marker: str | None
    log: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUN and self.marker is None

    @property
    def commands(self) -> list[str]:
        """Shell commands: of a console session the lines after ``$``, with what continues them."""
        if self.language == "bash":
            return [self.text]
        found: list[str] = []
        going_on = False
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append(line[2:])
            elif going_on:
                found[-1] += f"\n{line}"
            going_on = bool(found) and line.endswith("\\") and (line.startswith("$ ") or going_on)
        return found


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    opened: re.Match[str] | None = None
    mark: re.Match[str] | None = None
    start, held = 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if opened is None:
            if fence := _FENCE.match(line):
                opened, start, held = fence, number, []
            elif line.strip():
                mark = _MARK.match(line)
        elif line.strip() == opened["fence"]:
            text = "\n".join(text[len(opened["indent"]) :] for text in held)
            marker, log = (mark["marker"], mark["log"]) if mark else (None, None)
            found.append(Block(page, start, opened["language"], text, marker, log))
            opened = mark = None
        else:
            held.append(line)
    assert opened is None, f"{page}:{start}: a block that does not end"
    return found


def given(page: Path) -> set[str]:
    """Names of the ready-made files a page asks for."""
    return {name.strip() for m in _GIVEN.finditer(page.read_text(encoding="utf-8")) for name in m["names"].split(",")}


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    kept, fence = [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        found = _FENCE.match(line)
        if not fence and found:
            fence = found["fence"]
        elif fence and line.strip() == fence:
            fence = ""
        elif not fence:
            kept.append(line)
    return "\n".join(kept)


def spans(page: Path) -> list[str]:
    """Code in running text, on one line."""
    return [" ".join(m[2].split()) for m in _SPAN.finditer(prose(page))]


def links(page: Path) -> list[str]:
    """Targets of all links and images."""
    return [m["target"] for m in _LINK.finditer(_SPAN.sub("", prose(page)))]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings."""
    titles = (m["title"] for m in map(_HEADING.match, prose(page).splitlines()) if m)
    return {slug(title) for title in titles}


def slug(title: str) -> str:
    """The anchor of a heading, as both GitHub and mkdocs make it for plain words."""
    words = re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()
    return re.sub(r"[\s]+", "-", words)


if __name__ == "__main__":
    every = [block for page in PAGES for block in blocks(page)]
    ran, marked = sum(block.runs for block in every), sum(block.marker is not None for block in every)
    print(
        f"{len(every)} blocks on {len(PAGES)} pages: {ran} run, {marked} marked, {len(every) - ran - marked} are data"
    )

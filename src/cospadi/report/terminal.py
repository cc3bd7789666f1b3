"""What the printed pages share: one-line table rows, facts, headings and warnings, cut to the terminal's width."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from cospadi.report.text import DASH
from cospadi.report.view import Fact, warnings_of

Column = tuple[str, Literal["left", "right"]]
"""A column's title and the side its cells are aligned to."""


class Table:
    """A table of one line per row: texts on the left are cut where room is short, numbers on the right never are.

    Args:
        columns: titles and sides.
    """

    def __init__(self, *columns: Column) -> None:
        self.columns = columns
        self.rows: list[tuple[list[str], str]] = []

    def add(self, *cells: str, style: str = "") -> None:
        """Add a row."""
        self.rows.append(([" ".join(cell.split()) for cell in cells], style))

    def print(self, console: Console) -> None:
        """Print the table; nothing if it has no rows."""
        if not self.rows:
            return
        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold dim")
        for (title, side), width in zip(self.columns, self._widths(console.width), strict=True):
            table.add_column(title, justify=side, no_wrap=True, overflow="ellipsis", width=width)
        for cells, style in self.rows:
            table.add_row(*map(Text, cells), style=style)
        console.print(table)

    def _widths(self, room: int) -> list[int]:
        """Widths of the columns: numbers keep theirs, the widest texts shrink until the line fits."""
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


def print_heading(console: Console, *parts: object) -> None:
    """Print the parts that are not empty on one bold line."""
    console.print(Text(" · ".join(str(part) for part in parts if part), style="bold", overflow="fold"))


def print_facts(console: Console, facts: Sequence[Fact]) -> None:
    """Print names and values in two columns; long values wrap within their column."""
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for fact in facts:
        if fact.value not in ("", DASH):
            value = Text(" ".join(fact.value.split()), style="bold")
            if fact.note:
                value.append(f"  {' '.join(fact.note.split())}", style="not bold dim")
            grid.add_row(fact.label, value)
    console.print(grid)


def print_warnings(console: Console, report: Mapping[str, Any]) -> None:
    """Print the warnings of a report, one paragraph each."""
    for line in warnings_of(report):
        console.print(Text(f"warning: {line}", style="yellow", overflow="fold"))

"""Data and tables of `cospadi methods` and `cospadi doctor`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from cospadi.methods import Method, all_methods, get_method
from cospadi.pruning import PruningMethod, all_pruning_methods


def methods_data(name: str | None) -> dict[str, Any]:
    """All methods, or the one of that name.

    Raises:
        RecipeError: if there is no method of that name.
    """
    pruning = all_pruning_methods()
    if name in pruning:
        return {"methods": [_describe_pruning(pruning[name])]}
    chosen = {name: get_method(name)} if name else all_methods()
    found = [_describe(method) for method in chosen.values()]
    return {"methods": found + ([] if name else [_describe_pruning(method) for method in pruning.values()])}


def _describe_pruning(method: PruningMethod) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": f"Prunes. {method.summary}",
        "paper": method.paper,
        "grouping": "blocks" if method.unit == "blocks" else "width",
        "options": {key: field.default for key, field in method.options.model_fields.items()},
    }


def _describe(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "grouping": method.grouping,
        "options": {key: field.default for key, field in method.options.model_fields.items()},
    }


def method_table(data: dict[str, Any]) -> Table:
    """A table of names, summaries with citations, and options with their defaults."""
    table = Table(box=None, padding=(0, 1, 1, 0))
    table.add_column("method", style="bold", no_wrap=True)
    table.add_column("what it does")
    table.add_column("options (--set KEY=VALUE)")
    for row in data["methods"]:
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        table.add_row(row["name"], f"{row['summary']} [dim]{row['paper']}[/]", options)
    return table


def doctor_table(data: dict[str, Any]) -> Table:
    """A table with one line per check."""
    table = Table(box=None, show_header=False)
    for row in data["checks"]:
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "[dim]--[/]"}[row["ok"]]
        table.add_row(mark, row["name"], row["detail"])
    return table

"""What Python's functions return, at a glance: one line in a console, cards and tables in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cospadi.report.comparison import comparison_rows
from cospadi.report.depth import depth_headlines
from cospadi.report.html import kind_table
from cospadi.report.html_parts import html_cards, html_code, html_folded, html_fragment, html_table, html_warnings
from cospadi.report.measured import contents_facts, estimate_facts, evaluation_facts, task_rows, tensor_rows
from cospadi.report.text import human_bytes, mapping, perplexity_text, publishable, sequence
from cospadi.report.view import (
    Fact,
    by_kind,
    headlines,
    model_name,
    read_groups,
    warnings_of,
)

_WORDS = {
    "Compressed layers": "{}",
    "Blocks": "{} blocks",
    "Blocks' matrices": "{}",
    "Bytes kept": "{} kept",
    "Perplexity": "perplexity {}",
    "Mean output error": "output error {}",
    "Size": "{}",
    "Estimated memory": "memory {}",
    "Estimated time": "time {}",
}
"""Facts that one line has room for."""


def line(kind: str, name: object, *parts: str) -> str:
    """One line: ``<Result small: llama-29m by auto · 49.0 → 9.79 MB · 20.0% kept>``; empty parts are left out."""
    text = " · ".join(part for part in parts if part)
    return " ".join(f"<{kind} {name}: {text}>".split()) if text else f"<{kind} {name}>"


def _numbers(facts: Sequence[Fact]) -> list[str]:
    """The most important facts in few words."""
    return [_WORDS[fact.label].format(fact.value) for fact in facts if fact.label in _WORDS]


def _warned(data: Mapping[str, Any]) -> str:
    count = len(warnings_of(data))
    return "" if not count else f"{count} warning{'s' * (count > 1)}"


def run_line(out: object, report: Mapping[str, Any]) -> str:
    """One line about a run that compressed a model."""
    return _run_line("Result", out, report, headlines(report))


def prune_line(out: object, report: Mapping[str, Any]) -> str:
    """One line about a run that pruned a model."""
    return _run_line("PruneResult", out, report, depth_headlines(report))


def _run_line(kind: str, out: object, report: Mapping[str, Any], facts: Sequence[Fact]) -> str:
    return line(kind, out, f"{model_name(report)} by {report.get('method')}", *_numbers(facts), _warned(report))


def run_fragment(out: object, report: Mapping[str, Any]) -> str:
    """A notebook's view of a run that compressed a model."""
    report = publishable(report)
    return html_fragment(
        f"{model_name(report)} · {report.get('method')}",
        (),
        [
            html_cards(headlines(report)),
            html_warnings(warnings_of(report)),
            html_folded("Projections", kind_table(by_kind(read_groups(report)))),
            _written(out),
        ],
    )


def prune_fragment(out: object, report: Mapping[str, Any]) -> str:
    """A notebook's view of a run that pruned a model."""
    report = publishable(report)
    return html_fragment(
        f"{model_name(report)} · {report.get('method')}",
        (),
        [html_cards(depth_headlines(report)), html_warnings(warnings_of(report)), _written(out)],
    )


def _written(out: object) -> str:
    return f'<p class="remark">Checkpoint and report: <code>{escape(str(out))}</code></p>\n'


def estimate_line(data: Mapping[str, Any]) -> str:
    """One line about an estimate."""
    return line("Estimate", model_name(data), *_numbers(estimate_facts(data)), _warned(data))


def estimate_fragment(data: Mapping[str, Any]) -> str:
    """A notebook's view of an estimate."""
    return html_fragment(
        f"{model_name(data)} · estimate",
        (),
        [
            html_cards(estimate_facts(data)),
            html_warnings(warnings_of(data)),
            html_folded("Projections", kind_table(by_kind(read_groups(data)))),
        ],
    )


class Figures(dict[str, Any]):
    """Plain data under documented keys that can also be read at a glance; ``dict(…)`` of it shows everything."""

    def __repr__(self) -> str:
        return line(type(self).__name__, model_name(self), *_numbers(self._facts()), self._told(), _warned(self))

    def _repr_html_(self) -> str:
        title, body = self._page()
        return html_fragment(title, (), [html_cards(self._facts()), html_warnings(warnings_of(self)), *body])

    def _facts(self) -> list[Fact]:
        return []

    def _told(self) -> str:
        return ""

    def _page(self) -> tuple[str, list[str]]:
        return model_name(self), []


class Evaluation(Figures):
    """Perplexity and task scores; see :func:`cospadi.evaluate`."""

    def _facts(self) -> list[Fact]:
        return evaluation_facts(self)

    def _told(self) -> str:
        return ", ".join(" ".join(row) for row in task_rows(self)[:3])

    def _page(self) -> tuple[str, list[str]]:
        rows = [[escape(cell) for cell in row] for row in task_rows(self)]
        table = html_table([("task", False), ("metric", False), ("value", True)], rows)
        return f"{model_name(self)} · evaluation", [table]


class Contents(Figures):
    """What is in a checkpoint; see :func:`cospadi.inspect`."""

    def _facts(self) -> list[Fact]:
        return contents_facts(self)

    def _told(self) -> str:
        groups = len(sequence(self.get("groups")))
        return f"{self.get('kind')}, {groups} groups" if groups else str(self.get("kind"))

    def _page(self) -> tuple[str, list[str]]:
        columns = [("tensor", False), ("number", True), ("shape", True), ("dtype", False), ("bytes", True)]
        rows = [[escape(cell) for cell in row] for row in tensor_rows(self)]
        return f"{model_name(self)} · {self.get('directory')}", [
            html_folded("Projections", kind_table(by_kind(read_groups(self)))),
            html_folded("Tensors", html_table(columns, rows) if rows else ""),
        ]


class Comparison(Figures):
    """Methods at the same bytes; see :func:`cospadi.compare`."""

    def _told(self) -> str:
        dense = perplexity_text(mapping(self.get("dense")).get("perplexity"))
        rows = [row for row in sequence(self.get("rows")) if not row.get("reason")]
        found = ", ".join(f"{r['method']} {r['keep']:g}: {perplexity_text(r['perplexity'])}" for r in rows[:6])
        return f"dense {dense}, {found}" + (", …" if len(rows) > 6 else "")

    def _page(self) -> tuple[str, list[str]]:
        return f"{model_name(self)}: methods compared", [comparison_rows(self)]


class Continuation(Figures):
    """A prompt and what a model made of it; see :func:`cospadi.generate`."""

    def __repr__(self) -> str:
        return f"<Continuation {self['prompt'] + self['text']!r}, {self['tokens']} tokens>"

    def _page(self) -> tuple[str, list[str]]:
        return "", [f"<pre><b>{escape(self['prompt'])}</b>{escape(self['text'])}</pre>\n"]


class Export(Figures):
    """A stock checkpoint; see :func:`cospadi.export`."""

    def __repr__(self) -> str:
        return f"<Export {self['out']}: {human_bytes(self['file_bytes'])}>"

    def _page(self) -> tuple[str, list[str]]:
        return "", [html_cards([Fact("Stock checkpoint", str(self["out"]), human_bytes(self["file_bytes"]))])]


class Speed(Figures):
    """Times of layers and models; see :func:`cospadi.benchmark`."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self[key])} {key}" for key in ("layers", "models", "loading"))
        return f"<Speed on {self['device']}: {counts}>"

    def _page(self) -> tuple[str, list[str]]:
        from rich.console import Console

        from cospadi.report.speed import print_speed

        console = Console(width=110, no_color=True, force_jupyter=False)
        with console.capture() as captured:
            print_speed(self, console)
        return "", [html_code(captured.get())]


class Diagnosis(Figures):
    """The state of an installation; see :func:`cospadi.doctor`."""

    def __repr__(self) -> str:
        failed = [check["name"] for check in self["checks"] if check["ok"] is False]
        return f"<Diagnosis: {'healthy' if self['healthy'] else 'faults: ' + ', '.join(failed)}>"

    def _page(self) -> tuple[str, list[str]]:
        marks = {True: "ok", False: "no", None: "–"}
        rows = [[marks[c["ok"]], escape(str(c["name"])), escape(str(c["detail"]))] for c in self["checks"]]
        return "", [html_table([("", False), ("check", False), ("found", False)], rows)]

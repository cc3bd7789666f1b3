"""What a report says, read once and safely: every page, card, plot and console table is made from here.

Reports come from finished runs of any version, so no key is taken for granted: what is missing or of the wrong
type reads as None, and never raises.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cospadi.report.text import (
    DASH,
    arrow,
    error_text,
    human_bytes,
    human_count,
    human_seconds,
    integer_text,
    mapping,
    moment,
    number,
    percent,
    perplexity_text,
    sequence,
    whole,
)

_PHASES = ("read", "prune", "calibrate", "plan", "allocate", "factorise", "refine", "save")


@dataclass(frozen=True)
class GroupRow:
    """One group of layers of a report.

    Attributes:
        name: of the group.
        kind: its projections, the same name in all layers: ``q+k+v``, ``o``, ``gate+up`` …
        layer: index of the decoder layer; None outside the layers.
        method: that compressed it.
        atoms: of the dictionary; None without a dictionary.
        nonzeros: stored values per column of the codes; None if the codes are dense.
        pattern: of the codes.
        dictionary_bits: per dictionary value; None without a dictionary.
        value_bits: per stored code value.
        bytes: stored.
        bytes_before: of the same layers at 16 bits per weight.
        error: relative whitened error, 0 to 1.
        seconds: it took.
    """

    name: str
    kind: str
    layer: int | None
    method: str
    atoms: int | None
    nonzeros: int | None
    pattern: str
    dictionary_bits: float | None
    value_bits: float | None
    bytes: float | None
    bytes_before: float | None
    error: float | None
    seconds: float | None

    @property
    def keep(self) -> float | None:
        """Share of bytes kept."""
        return share(self.bytes, self.bytes_before)

    @property
    def bits(self) -> str:
        """Bits of dictionary and codes, ``16 / 4``; a single number without a dictionary."""
        parts = [f"{bits:g}" for bits in (self.dictionary_bits, self.value_bits) if bits is not None]
        return " / ".join(parts) or DASH

    @property
    def sparsity(self) -> str:
        """Non-zeros per column, with the pattern unless it is free: ``256``, ``128 (2:4)``."""
        count = DASH if self.nonzeros is None else f"{self.nonzeros:,}"
        return count if self.pattern in ("", "free", "dense") else f"{count} ({self.pattern})"


@dataclass(frozen=True)
class KindRow:
    """All groups of one kind of projection, combined."""

    kind: str
    groups: int
    methods: str
    atoms: str
    sparsity: str
    bytes: float | None
    bytes_before: float | None
    mean_error: float | None
    worst: GroupRow | None

    @property
    def keep(self) -> float | None:
        """Share of bytes kept."""
        return share(self.bytes, self.bytes_before)


@dataclass(frozen=True)
class Fact:
    """A labelled value with an optional note."""

    label: str
    value: str
    note: str = ""


def share(part: object, of: object) -> float | None:
    """``part / of``, or None if either is unknown or `of` is zero."""
    above, below = number(part), number(of)
    return None if above is None or not below else above / below


def _paths(group: Mapping[str, Any]) -> list[str]:
    """Dotted names of a group's modules, after the first layer number and without any numbers.

    ``model.layers.3.mlp.experts.7.up_proj`` becomes ``mlp.experts.up_proj``; names without a number are kept whole.
    """
    names = [str(name) for name in sequence(group.get("modules"))]
    names = names or [str(group.get("name", "")).split("+")[0]]
    paths = []
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        kept = [part for part in parts[first + 1 :] if not part.isdigit()]
        paths.append(".".join(kept) or name)
    return list(dict.fromkeys(" ".join(path.split()) for path in paths))


def _kinds(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name of each group's kind of projection, lengthened where two kinds would share one."""
    full = [tuple(_paths(group)) for group in groups]

    def short(paths: tuple[str, ...], parts: int) -> str:
        leaves = "+".join(re.sub(r"_proj$", "", path.rsplit(".", 1)[-1]) for path in paths)
        parents = paths[0].split(".")[:-1][-parts:] if parts else []
        return ".".join([*parents, leaves])

    names: dict[tuple[str, ...], str] = {}
    for paths in dict.fromkeys(full):
        depth = 0
        while depth < 4:
            same = Counter(short(other, depth) for other in set(full))
            if same[short(paths, depth)] == 1:
                break
            depth += 1
        names[paths] = short(paths, depth)
    return [names[paths] for paths in full]


def _layer(group: Mapping[str, Any]) -> int | None:
    known = whole(group.get("layer"))
    if known is not None:
        return known
    first = str(next(iter(sequence(group.get("modules"))), group.get("name", "")))
    found = re.search(r"\.(\d+)\.", first)
    return int(found[1]) if found else None


def read_groups(report: Mapping[str, Any]) -> list[GroupRow]:
    """The groups of a report, in its order."""
    groups = [group for group in sequence(report.get("groups")) if isinstance(group, Mapping)]
    rows = []
    for group, kind in zip(groups, _kinds(groups), strict=True):
        bits = group.get("bits")
        known = bits if isinstance(bits, Mapping) else {"values": bits}
        rows.append(
            GroupRow(
                name=str(group.get("name") or "+".join(map(str, sequence(group.get("modules")))) or kind),
                kind=kind,
                layer=_layer(group),
                method=str(group.get("method") or report.get("method") or DASH),
                atoms=whole(group.get("atoms")),
                nonzeros=whole(group.get("nonzeros")),
                pattern=str(group.get("pattern") or ""),
                dictionary_bits=number(known.get("dictionary")),
                value_bits=number(known.get("values")),
                bytes=number(group.get("bytes")),
                bytes_before=number(group.get("bytes_before")),
                error=number(group.get("error")),
                seconds=number(group.get("seconds")),
            )
        )
    return rows


def total(values: Iterable[float | None]) -> float | None:
    """Sum of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def worst(rows: Iterable[GroupRow]) -> GroupRow | None:
    """The group with the largest error."""
    return max((row for row in rows if row.error is not None), key=lambda row: row.error or 0.0, default=None)


def spread(values: Iterable[int | None]) -> str:
    """``512``, or ``384-512`` if the numbers differ."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    low, high = min(known), max(known)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def by_kind(rows: Sequence[GroupRow]) -> list[KindRow]:
    """Groups combined by kind of projection, in order of first appearance."""
    kinds: dict[str, list[GroupRow]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    return [
        KindRow(
            kind=kind,
            groups=len(members),
            methods=", ".join(dict.fromkeys(row.method for row in members)),
            atoms=spread(row.atoms for row in members),
            sparsity=spread(row.nonzeros for row in members),
            bytes=total(row.bytes for row in members),
            bytes_before=total(row.bytes_before for row in members),
            mean_error=mean(row.error for row in members),
            worst=worst(members),
        )
        for kind, members in kinds.items()
    ]


def opener(report: Mapping[str, Any]) -> str:
    """The class of transformers that opens the result: the automatic one for causal language models."""
    kind = report.get("architecture")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z]\w*", kind) or kind.endswith("ForCausalLM"):
        return "AutoModelForCausalLM"
    return kind


def model_name(report: Mapping[str, Any]) -> str:
    """Name of the model; ``"unnamed model"`` where the report has none."""
    return str(report.get("model") or "unnamed model")


def stated(facts: Iterable[Fact]) -> list[Fact]:
    """The facts that have a value."""
    return [fact for fact in facts if fact.value not in ("", DASH)]


def perplexity_fact(evaluation: Mapping[str, Any]) -> Fact:
    """Perplexity before and after compression, and the relative increase."""
    after, before = evaluation.get("perplexity"), evaluation.get("dense_perplexity")
    rise = share(after, before)
    notes = [] if rise is None else [f"{100 * (rise - 1):+.1f}%"]
    if evaluation.get("text"):
        notes.append(f"on {evaluation['text']}")
    if number(evaluation.get("tokens")) is not None:
        notes.append(f"{integer_text(evaluation['tokens'])} tokens")
    value = "" if after is None else arrow(perplexity_text(before), perplexity_text(after))
    return Fact("Perplexity", value, ", ".join(notes))


def requested(report: Mapping[str, Any]) -> str:
    """The note beside the bytes kept: the share that was requested, if known."""
    share_requested = percent(report.get("keep_requested"))
    return "" if share_requested == DASH else f"{share_requested} requested"


def headlines(report: Mapping[str, Any]) -> list[Fact]:
    """The numbers at the top of a report."""
    rows = read_groups(report)
    before, after = report.get("bytes_before"), report.get("bytes_after")
    keep = report.get("keep_actual")
    keep = share(after, before) if number(keep) is None else keep
    most = worst(rows)
    where = "" if most is None else f"worst: {error_text(most.error)} in {_place(most)}"
    times = report.get("seconds")
    seconds = times.get("total") if isinstance(times, Mapping) else times
    sizes = arrow(human_bytes(before), human_bytes(after))
    return stated(
        [
            Fact("Compressed layers", sizes, "originally 16 bits per weight"),
            Fact("Bytes kept", percent(keep), requested(report)),
            Fact(
                "Whole checkpoint",
                arrow(human_bytes(report.get("file_bytes_before")), human_bytes(report.get("file_bytes"))),
                "files on disk",
            ),
            perplexity_fact(mapping(report.get("evaluation"))),
            Fact("Mean output error", error_text(mean(row.error for row in rows)), where),
            Fact("Time", human_seconds(seconds), ""),
            Fact("Peak memory", human_bytes(report.get("peak_memory_bytes")), ""),
        ]
    )


def _place(row: GroupRow) -> str:
    return row.kind if row.layer is None else f"layer {row.layer} {row.kind}"


def model_facts(report: Mapping[str, Any]) -> list[Fact]:
    """Facts about the run: model, method, device, times and versions."""
    times = mapping(report.get("seconds"))
    order = [*(phase for phase in _PHASES if phase in times), *(phase for phase in times if phase not in _PHASES)]
    steps = [f"{phase} {human_seconds(times[phase])}" for phase in order if phase != "total" and number(times[phase])]
    versions = mapping(report.get("versions"))

    def text(key: str) -> str:
        return "" if report.get(key) is None else str(report[key])

    return stated(
        [
            Fact("Model", model_name(report)),
            Fact("Architecture", text("architecture")),
            Fact("Parameters", human_count(report.get("parameters"))),
            Fact("Method", text("method")),
            Fact("Seed", text("seed")),
            Fact("Device", text("device")),
            Fact("Threads", text("threads")),
            Fact("Time by phase", ", ".join(steps)),
            Fact("Created", moment(report.get("created"))),
            Fact("cospadi", text("cospadi_version")),
            *(Fact(str(name), str(version)) for name, version in versions.items() if name != "cospadi"),
        ]
    )


def calibration_facts(report: Mapping[str, Any]) -> list[Fact]:
    """Facts about the calibration text."""
    facts = mapping(report.get("calibration"))
    length = number(facts.get("seq_len"))
    of = "" if length is None else f"of {length:,.0f} tokens"
    longest = facts.get("longest_document", facts.get("longest_document_tokens"))
    return stated(
        [
            Fact("Text", str(facts.get("source") or "")),
            Fact("Fields", ", ".join(map(str, sequence(facts.get("fields"))))),
            Fact("Chat template, SHA-256", str(facts.get("chat_template") or "")),
            Fact("Documents", integer_text(facts.get("documents"))),
            Fact("Samples", integer_text(facts.get("samples_used", facts.get("samples"))), of),
            Fact("Samples begin with", str(facts.get("begins_with") or "")),
            Fact("Tokens", integer_text(facts.get("tokens_used", facts.get("tokens")))),
            Fact("Tokens not used", integer_text(facts.get("truncated_tokens"))),
            Fact("Longest document", integer_text(longest), "tokens"),
            Fact("SHA-256", str(facts.get("sha256") or "")),
        ]
    )


def error_meaning(report: Mapping[str, Any]) -> str:
    """What the errors of a report's groups are; without a calibration text they are those of the weights."""
    if "calibration" in report and report["calibration"] is None:
        return "relative error of the weights (no calibration text was used)"
    return "relative output error on the calibration text"


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """The warnings of the run, each on one line."""
    return [" ".join(str(text).split()) for text in sequence(report.get("warnings"))]

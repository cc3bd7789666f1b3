"""The facts of an estimate, of an evaluation and of a checkpoint, for consoles and notebooks."""

from collections.abc import Mapping
from typing import Any

from cospadi.report.depth import depth_headlines
from cospadi.report.text import (
    DASH,
    arrow,
    human_bytes,
    human_count,
    human_seconds,
    integer_text,
    mapping,
    number,
    percent,
    perplexity_text,
    sequence,
)
from cospadi.report.view import Fact, headlines, perplexity_fact, read_groups, requested, share, stated, total


def estimate_facts(estimate: Mapping[str, Any]) -> list[Fact]:
    """The numbers of a dry run: sizes, memory and time."""
    rows = read_groups(estimate)
    before = estimate.get("bytes_before", total(row.bytes_before for row in rows))
    after = estimate.get("bytes_after", total(row.bytes for row in rows))
    keep = estimate.get("keep_actual", share(after, before))
    times = estimate.get("seconds")
    seconds = times.get("total") if isinstance(times, Mapping) else times
    device = f"on {estimate['device']}" if estimate.get("device") else ""
    process = mapping(estimate.get("memory")).get("process")
    own = f"including {human_bytes(process)} for Python and its libraries" if process else device
    took = human_seconds(seconds)
    if isinstance(times, Mapping) and seconds is None and times.get("calibrate") is not None:
        took = f"{DASH} (calibration alone takes {human_seconds(times['calibrate'])})"
    whole_size = arrow(human_bytes(estimate.get("file_bytes_before")), human_bytes(estimate.get("file_bytes")))
    return stated(
        [
            Fact("Architecture", str(estimate.get("architecture") or "")),
            Fact("Parameters", human_count(estimate.get("parameters"))),
            Fact("Compressed layers", arrow(human_bytes(before), human_bytes(after))),
            Fact("Bytes kept", percent(keep), requested(estimate)),
            Fact("Whole checkpoint", whole_size),
            Fact("Estimated memory", human_bytes(estimate.get("peak_memory_bytes")), own),
            Fact("Estimated time", took, device),
        ]
    )


def evaluation_facts(result: Mapping[str, Any]) -> list[Fact]:
    """The numbers of an evaluation, without those of tasks."""
    bits = number(result.get("bits_per_byte"))
    kept = share(result.get("bytes"), result.get("dense_bytes"))
    return stated(
        [
            perplexity_fact(result),
            Fact("Bits per byte", DASH if bits is None else f"{bits:.4f}"),
            Fact("Word perplexity", perplexity_text(result.get("word_perplexity"))),
            Fact(
                "Size",
                arrow(human_bytes(result.get("dense_bytes")), human_bytes(result.get("bytes"))),
                "" if kept is None else percent(kept),
            ),
            Fact("Time", human_seconds(result.get("seconds"))),
        ]
    )


def task_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Scores of tasks: task, metric, value."""
    found = []
    for task, metrics in mapping(result.get("tasks")).items():
        for metric, value in (metrics if isinstance(metrics, Mapping) else {"": metrics}).items():
            real = number(value)
            if real is not None:
                found.append((str(task), str(metric), f"{real:.4f}"))
    return found


def contents_facts(contents: Mapping[str, Any]) -> list[Fact]:
    """What is in a checkpoint, and what was verified; see :func:`cospadi.inspect`."""
    pruned = contents.get("prune") and contents.get("kind") == "pruned"
    facts = depth_headlines(contents) if pruned else headlines(contents)
    if not any(fact.label == "Parameters" for fact in facts):
        facts = [Fact("Parameters", human_count(contents.get("parameters"))), *facts]
    hashes = "and its hash in SHA256SUMS" if contents.get("checksums") else "there are no hashes"
    return [*facts, Fact("Verified", "every file", hashes)]


def tensor_rows(contents: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Name, number, shape, dtype and bytes of the kinds of tensors in a checkpoint without groups."""
    return [
        (
            str(row.get("name")),
            integer_text(row.get("count")),
            " × ".join(map(str, sequence(row.get("shape")))),
            str(row.get("dtype")),
            human_bytes(row.get("bytes")),
        )
        for row in map(mapping, sequence(contents.get("tensors")))
    ]

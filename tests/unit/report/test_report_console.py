import io
import random

import pytest
from rich.cells import cell_len
from rich.console import Console

from cospadi.report import (
    ProgressDisplay,
    print_comparison,
    print_estimate,
    print_evaluation,
    print_inspect,
    print_summary,
)
from cospadi.report.text import DASH


def printed(show, *args, width=80, **kwargs) -> str:
    file = io.StringIO()
    show(*args, Console(file=file, width=width), **kwargs)
    return file.getvalue()


def fits(text: str, width: int = 80) -> bool:
    return all(cell_len(line) <= width for line in text.splitlines())


RESULT = {
    "perplexity": 21.374, "dense_perplexity": 17.226, "tokens": 245_760, "bytes": 97_300_000, "dense_bytes": 120e6,
    "bits_per_byte": 0.98765, "word_perplexity": 33.1, "text": "held_out.txt", "seconds": 75,
    "tasks": {"arc_easy": {"acc": 0.512, "acc_stderr": "N/A"}, "piqa": 0.7}, "warnings": ["short text"],
}  # fmt: skip


def test_summary_tells_the_numbers_in_80_columns(report):
    text = printed(print_summary, report)
    assert fits(text)
    for word in ("63.7 → 40.7 MB", "17.23 → 21.37", "q+k+v", "gate+up", "warning: calibration", "3 min 50 s"):
        assert word in text
    assert "…" not in text


def test_estimate_adds_up_what_is_not_given(report):
    estimate = {"model": "m", "groups": report["groups"], "seconds": 90, "peak_memory_bytes": 3e9, "device": "cpu"}
    text = printed(print_estimate, estimate)
    assert fits(text) and "…" not in text
    for word in ("63.7 → 40.7 MB", "1 min 30 s", "on cpu", "3.00 GB", "non-zeros", "svd_llm", "502"):
        assert word in text


def test_estimate_says_what_is_unknown_and_what_python_takes(report):
    estimate = {
        "model": "m", "groups": report["groups"], "device": "cpu", "peak_memory_bytes": 1.1e9,
        "memory": {"process": 450e6, "model": 650e6}, "seconds": {"calibrate": 182.0, "factorise": None, "total": None},
    }  # fmt: skip
    text = printed(print_estimate, estimate)
    assert fits(text) and f"{DASH} (calibration alone takes 3 min 02 s)" in text
    assert "including 450 MB for Python" in text and "1.10 GB" in text
    estimate["seconds"] = {"calibrate": None, "total": None}
    assert "Time" not in printed(print_estimate, estimate)
    estimate["seconds"] = {"calibrate": 10.0, "total": 31.0}
    assert "31.0 s" in printed(print_estimate, estimate)


def test_inspect_has_a_line_for_every_group(report):
    text = printed(print_inspect, report)
    assert fits(text) and "…" not in text
    for group in report["groups"]:
        assert any(
            line.split()[:1] == [str(group["layer"])] and f"{100 * group['error']:.2f}%" in line
            for line in text.splitlines()
        )


def test_evaluation(report):
    text = printed(print_evaluation, RESULT)
    assert fits(text)
    for word in ("17.23 → 21.37", "+24.1%", "0.9877", "33.10", "120 → 97.3 MB", "0.5120", "0.7000", "short text"):
        assert word in text
    assert "N/A" not in text
    assert "5.50" in printed(print_evaluation, {"perplexity": 5.5})


def test_comparison_puts_the_best_first_within_each_keep(rows):
    text = printed(print_comparison, rows, dense={"perplexity": 17.2, "bytes": 212_000_000})
    assert fits(text)
    lines = [line.split() for line in text.splitlines() if "%" in line]
    assert lines[0][1] == "dense"
    assert [line[0] for line in lines[1:]] == ["80.0%"] * 5 + ["60.0%"] * 5 + ["40.0%"] * 5 + ["30.0%"] * 5
    assert [line[1] for line in lines[1:6]] == ["gptq", "compot", "cospadi", "rtn", "svd_llm"]
    assert lines[-1][1:3] == ["svd_llm", "diverged"]
    for line in lines[1:-1]:
        row = next(r for r in rows if r["method"] == line[1] and f"{100 * r['keep']:.1f}%" == line[0])
        assert float(line[2]) == pytest.approx(row["perplexity"], abs=0.005)


def test_long_and_hostile_names_never_break_lines(report):
    name = "[red]weird[/] " + "x" * 120 + "\n漢字" * 30
    report.update(model=name, method=name, architecture=name, warnings=[name])
    for group in report["groups"]:
        group.update(method=name, modules=[f"model.layers.{group['layer']}.{name}"])
    for show in (print_summary, print_estimate, print_inspect):
        text = printed(show, report)
        assert fits(text)
        assert "[red]weird[/]" in text
    rows = [line for line in printed(print_inspect, report).splitlines() if "MB" in line or "kB" in line]
    assert len([line for line in rows if " / " in line]) == len(report["groups"])
    assert "16 / 16" in rows[-1] and rows[-1].split()[0] == "8"
    assert fits(printed(print_comparison, [{"method": name, "keep": 0.5, "perplexity": 9.0}]))
    assert fits(printed(print_evaluation, {**RESULT, "text": name, "tasks": {name: {name: 0.5}}}))


def test_damaged_reports_are_printed(damaged):
    rng = random.Random(11)
    for report in damaged:
        show = rng.choice((print_summary, print_estimate, print_inspect, print_evaluation))
        assert fits(printed(show, report))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_display(steps: int, seconds: float) -> list[str]:
    file, clock = io.StringIO(), Clock()
    with ProgressDisplay(Console(file=file, width=80), clock=clock) as display:
        for done in range(steps + 1):
            display.update("factorise", done, steps, f"layer {done} [q+k+v]", 0.03)
            clock.now += seconds
    return file.getvalue().splitlines()


def test_plain_lines_come_with_every_tenth_of_a_fast_run():
    lines = run_display(1000, 0.1)
    assert 11 <= len(lines) <= 12
    assert lines[0].startswith("factorise:  0%  0/1000")
    assert "error 3.00%" in lines[5] and "[q+k+v]" in lines[5] and "left 50.0 s" in lines[5]
    assert lines[-1].startswith("factorise:  100%  1000/1000") and "took 1 min 40 s" in lines[-1]


def test_plain_lines_come_every_ten_seconds_of_a_slow_run():
    assert len(run_display(36, 60.0)) == 37
    assert 60 <= len(run_display(600, 1.0)) <= 72


def test_a_run_of_a_blink_prints_its_beginning_and_end_only():
    lines = run_display(50, 0.001)
    assert len(lines) == 2


def test_a_resumed_run_does_not_count_old_work_into_the_time_left():
    file, clock = io.StringIO(), Clock()
    display = ProgressDisplay(Console(file=file, width=80), clock=clock)
    with display:
        display.update("factorise", 80, 100)
        clock.now += 20
        display.update("factorise", 90, 100)
    assert "left 20.0 s" in file.getvalue()


def test_unknown_totals_and_errors_that_are_none():
    file, clock = io.StringIO(), Clock()
    with ProgressDisplay(Console(file=file, width=80), clock=clock) as display:
        display.update("calibrate", 3, 0, "", None)
        clock.now += 11
        display.update("calibrate", 4, 0, "", float("nan"))
        display.update("plan", 1, 1)
    assert file.getvalue().splitlines() == ["calibrate:  3", "calibrate:  4", "plan:  100%  1/1"]


def terminal(file: io.StringIO) -> Console:
    return Console(file=file, width=80, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})


def test_on_a_terminal_one_bar_a_phase_fits_the_width(capsys):
    file = io.StringIO()
    with ProgressDisplay(terminal(file)) as display:
        display.update("calibrate", 0, 4, "block 1")
        display.update("calibrate", 4, 4)
        display.update("factorise", 1, 36, "model.layers.3.self_attn.q_proj+k_proj+v_proj", 0.0341)
        display.update("factorise", 2, 36, "[red]layer", 0.0341)
        print("a result")
    frames = file.getvalue().replace("\x1b[1A", "\n").replace("\r", "\n").replace("\x1b[2K", "\n")
    last = [line for line in frames.split("\n") if line.strip() and "\x1b" not in line][-2:]
    assert fits("\n".join(last))
    assert last[0].startswith("calibrate") and "4/4" in last[0] and "took" in last[0]
    assert last[1].startswith("factorise") and "2/36" in last[1] and "[red]layer" in last[1]
    assert "error 3.41%" in last[1] and "left" in last[1]
    assert capsys.readouterr().out == "a result\n"


def test_the_cursor_comes_back_after_an_error():
    file = io.StringIO()
    with pytest.raises(RuntimeError, match="boom"), ProgressDisplay(terminal(file)) as display:
        display.update("factorise", 1, 2)
        raise RuntimeError("boom")
    assert file.getvalue().rstrip().endswith("\x1b[?25h")


def test_progress_goes_to_stderr(capsys):
    with ProgressDisplay() as display:
        display.update("plan", 0, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and "plan" in captured.err

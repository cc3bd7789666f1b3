import json
import math

import numpy
import pytest

from cospadi.report.text import (
    arrow,
    error_text,
    human_bytes,
    human_count,
    human_seconds,
    moment,
    number,
    perplexity_text,
    publishable,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (57_400_000, "57.4 MB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (99_960_000, "100 MB"),
        (1.2e9, "1.20 GB"),
        (3e18, "3000 PB"),
        (-2500, "-2.50 kB"),
        (None, "–"),
        (math.nan, "–"),
        ("12", "–"),
        (True, "–"),
    ],
)
def test_sizes_have_three_digits_and_a_unit(value, expected):
    assert human_bytes(value) == expected


def test_other_numbers_read_well():
    assert human_count(134_515_008) == "135 M"
    assert human_count(812) == "812"
    seconds = (0.44, 59.96, 75, 3599.9, 7500)
    assert [human_seconds(s) for s in seconds] == ["0.4 s", "1 min 00 s", "1 min 15 s", "1 h 00 min", "2 h 05 min"]
    assert human_seconds(-1) == "–"
    assert [error_text(e) for e in (0.0, 0.0341, 1.5, 6e-5, 2e-7, None)] == [
        "0.00%", "3.41%", "150.00%", "0.006%", "2e-05%", "–",
    ]  # fmt: skip
    assert [perplexity_text(p) for p in (17.2264, 12_345.6, 3.2e9)] == ["17.23", "12,346", "3.2e+09"]
    assert perplexity_text(math.inf) == "diverged"
    assert perplexity_text(None) == "–"


def test_arrow_writes_a_shared_unit_once():
    assert arrow("63.7 MB", "40.7 MB") == "63.7 → 40.7 MB"
    assert arrow("1.20 GB", "900 MB") == "1.20 GB → 900 MB"
    assert arrow("17.23", "21.37") == "17.23 → 21.37"
    assert arrow("–", "5 MB") == "5 MB"
    assert arrow("5 MB", "–") == "5 MB"


def test_moments():
    assert moment("2025-11-22T20:14:03+00:00") == "2025-11-22 20:14 UTC"
    assert moment("2025-11-22T20:14:03") == "2025-11-22 20:14"
    assert moment("yesterday") == "yesterday"
    assert moment(None) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/someone/models/tiny", "tiny"),
        ("/data/with space/tiny/", "tiny"),
        ("~/models/tiny", "tiny"),
        ("C:\\models\\tiny", "tiny"),
        ("example-org/tiny", "example-org/tiny"),
        ("./models/tiny", "./models/tiny"),
        ("../models/tiny", "../models/tiny"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("1/2 of all, and/or more", "1/2 of all, and/or more"),
        ("", ""),
        ("/", "/"),
    ],
)
def test_absolute_paths_are_cut_and_others_stay(text, expected):
    assert publishable(text) == expected


def test_commands_and_warnings_lose_paths_but_keep_the_rest():
    report = {
        "command": "cospadi compress '/home/some one/m' out --keep 0.6 --calibration=/data/x/notes.jsonl",
        "warnings": ["skipped '/data/x/bad.txt': not 1/2 as long as /data/y/good.txt"],
        "recipe": {"texts": ["/data/x/notes.jsonl", "org/set"]},
    }
    clean = publishable(report)
    assert clean["command"] == "cospadi compress m out --keep 0.6 --calibration=notes.jsonl"
    assert clean["warnings"] == ["skipped 'bad.txt': not 1/2 as long as good.txt"]
    assert clean["recipe"]["texts"] == ["notes.jsonl", "org/set"]
    assert publishable(clean) == clean


def test_values_become_strict_json():
    value = {"a": math.nan, 3: {1.5, 2.5}, "n": numpy.float32(0.5), "i": numpy.int64(7), "o": object, "t": (1, None)}
    clean = publishable(value)
    assert json.loads(json.dumps(clean, allow_nan=False)) == clean
    assert clean["a"] is None
    assert clean["3"] == [1.5, 2.5]
    assert (clean["n"], clean["i"], clean["t"]) == (0.5, 7, [1, None])
    assert number(numpy.float32(0.25)) == 0.25

"""Merging the parts of the benchmark that ran in processes of their own."""

import importlib.util
import json
from pathlib import Path

import pytest

from cospadi.pruning import get_pruning_method

PATH = Path(__file__).parents[3] / "benchmarks/depth.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_depth", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def part(path, keeps, perplexity=20.0, **changes):
    rows = [{"method": path.stem, "keep": keep} for keep in keeps]
    path.write_text(json.dumps({"model": "m", "seed": 0, "dense": {"perplexity": perplexity}, "rows": rows} | changes))
    return path


def test_parts_become_one_table_whatever_the_last_digit(benchmark, tmp_path):
    a = part(tmp_path / "a.json", [0.9, 0.8], command="one", seconds={"read": 1})
    b = part(tmp_path / "b.json", [0.9, 0.7], perplexity=20.0 * (1 + 5e-5), command="two")
    found = benchmark.merged([a, b])
    assert [(row["keep"], row["method"]) for row in found["rows"]] == [(0.9, "a"), (0.9, "b"), (0.8, "a"), (0.7, "b")]
    assert found["command"] == ["one", "two"] and found["dense"]["perplexity"] == 20.0


@pytest.mark.parametrize(("changes", "said"), [({"perplexity": 20.01}, "dense perplexity"), ({"seed": 1}, "'seed'")])
def test_parts_of_different_measurements_are_refused(benchmark, tmp_path, changes, said):
    with pytest.raises(SystemExit, match=said):
        benchmark.merged([part(tmp_path / "a.json", [0.9]), part(tmp_path / "b.json", [0.8], **changes)])


def test_every_variant_has_options_that_exist(benchmark):
    method = get_pruning_method("replaceme")
    for options in benchmark.VARIANTS.values():
        assert options.items() <= method.check(options).items()
    assert [benchmark.share(blocks, 9) for blocks in (1, 2, 3)] == [0.8889, 0.7778, 0.6667]

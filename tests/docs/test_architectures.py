"""The page of architectures says what its measurement found."""

import importlib.util
import json
from types import ModuleType

import pytest
from blocks import ROOT

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_architectures", ROOT / "benchmarks/architectures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_result_file(benchmark: ModuleType) -> None:
    rows = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))["rows"]
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert {row["name"] for row in rows} == set(benchmark.NAMES)
    assert page.partition(benchmark.BEGIN)[2].partition(benchmark.END)[0].strip() == benchmark.tables(rows).strip()


def test_no_stage_failed_otherwise_than_with_a_message(benchmark: ModuleType) -> None:
    rows = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))["rows"]
    through = [row for row in rows if "largest_difference" in row]
    assert len(through) >= 30
    assert not [row["name"] for row in rows if any(str(value).startswith("fault") for value in row.values())]
    assert all(row["largest_difference"] <= 1e-4 * max(1, row["largest_logit"]) for row in through)
    assert all(row["same_class"] and row.get("same_tokens", True) for row in through)
    assert all(row.get("pruned_difference", 0) == 0 for row in rows)


def test_a_table_says_what_a_row_holds(benchmark: ModuleType) -> None:
    fine = {"name": "llama", "class": "LlamaForCausalLM", "compressed_layers": 28, "largest_difference": 2.1e-6}
    fine |= {"largest_logit": 3.6, "same_tokens": False, "prune": "ok", "pruned_difference": 0.0, "compress": "ok"}
    refused = {
        "name": "mamba",
        "make": "ok",
        "class": "MambaForCausalLM",
        "compress": "refused: MambaForCausalLM: no",
        "prune": "ok",
    }
    page = benchmark.tables([refused, fine])
    assert "| llama | LlamaForCausalLM | 28 | 2.1e-06 | 3.6 | differ | 0 |" in page
    assert "| mamba | `no` | ok |" in page and page.count("llama") == 1

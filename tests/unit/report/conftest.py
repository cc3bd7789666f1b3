import copy
import random

import pytest

D_IN, D_FF, KV = 576, 1536, 192
SHAPES = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): (D_IN, D_IN + 2 * KV),
    ("self_attn.o_proj",): (D_IN, D_IN),
    ("mlp.gate_proj", "mlp.up_proj"): (D_IN, 2 * D_FF),
    ("mlp.down_proj",): (D_FF, D_IN),
}


def build_report(layers: int = 9, seed: int = 3) -> dict:
    """A report as a run over a small model writes it: 4 groups a layer, numbers that hang together."""
    rng = random.Random(seed)
    groups = []
    for layer in range(layers):
        for index, (paths, (d_in, d_out)) in enumerate(SHAPES.items()):
            modules = [f"model.layers.{layer}.{path}" for path in paths]
            before = 2 * d_in * d_out
            atoms = int(0.6 * before / (2 * d_in + d_out))
            after = 2 * d_in * atoms + d_out * (atoms // 2 * 2 + 4 * -(-atoms // 32))
            groups.append(
                {
                    "name": "+".join([modules[0], *(m.rsplit(".", 1)[-1] for m in modules[1:])]),
                    "layer": layer,
                    "modules": modules,
                    "method": "cospadi" if index else "svd_llm",
                    "atoms": atoms,
                    "nonzeros": atoms // 2 if index else None,
                    "pattern": "free" if index else "dense",
                    "bits": {"dictionary": 16, "values": 16},
                    "bytes": after,
                    "bytes_before": before,
                    "error": (0.02, 0.05, 0.08, 0.11)[index] * (1 + 0.12 * layer) * rng.uniform(0.85, 1.15),
                    "seconds": rng.uniform(2, 9),
                }
            )
    before, after = (sum(group[key] for group in groups) for key in ("bytes_before", "bytes"))
    return {
        "cospadi_version": "0.1.0",
        "created": "2025-11-22T20:14:03+00:00",
        "command": "cospadi compress example-org/tiny-135m out --keep 0.6 --calibration notes.jsonl --seed 7",
        "model": "example-org/tiny-135m",
        "architecture": "LlamaForCausalLM",
        "parameters": 134_515_008,
        "method": "cospadi",
        "keep_requested": 0.6,
        "keep_actual": after / before,
        "bytes_before": before,
        "bytes_after": after,
        "file_bytes": after + 56_623_104,
        "file_bytes_before": before + 56_623_104,
        "seconds": {"calibrate": 41.2, "plan": 0.3, "factorise": 187.5, "save": 1.1, "total": 230.1},
        "peak_memory_bytes": 1_473_000_000,
        "device": "cpu",
        "threads": 2,
        "versions": {"python": "3.12.3", "torch": "2.13.0", "transformers": "5.23.0"},
        "seed": 7,
        "recipe": {"method": "cospadi", "keep": 0.6, "options": {"rho": 2.0, "iterations": 60}},
        "calibration": {
            "source": "notes.jsonl",
            "documents": 412,
            "samples": 256,
            "seq_len": 1024,
            "tokens": 262_144,
            "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "truncated_tokens": 18_211,
            "longest_document_tokens": 7_310,
        },
        "groups": groups,
        "evaluation": {
            "text": "held_out.txt",
            "perplexity": 21.374,
            "dense_perplexity": 17.226,
            "tokens": 245_760,
        },
        "warnings": ["calibration text is short: 262,144 tokens for inputs of up to 1,536 dimensions"],
    }


def build_rows() -> list[dict]:
    """Rows of a comparison in which two methods, plain quantisation and one diverged run take part."""
    start = {"cospadi": 0.35, "svd_llm": 0.9, "gptq": 0.2, "rtn": 0.45, "compot": 0.3}
    rows = [
        {
            "method": method,
            "keep": keep,
            "perplexity": 17.2 * (1 + slope * (1 - keep) ** 2 * 4),
            "bytes": int(212e6 * keep),
            "seconds": 100 * keep,
        }
        for method, slope in start.items()
        for keep in (0.8, 0.6, 0.4, 0.3)
    ]
    next(row for row in rows if row["method"] == "svd_llm" and row["keep"] == 0.3)["perplexity"] = float("nan")
    return rows


@pytest.fixture
def report() -> dict:
    return build_report()


@pytest.fixture
def rows() -> list[dict]:
    return build_rows()


@pytest.fixture
def without_matplotlib(monkeypatch):
    """An interpreter in which no import of matplotlib succeeds, even where it is already loaded."""
    import builtins

    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def damaged_reports() -> list[dict]:
    """Reports with missing keys, wrong types and numbers that are none."""
    whole = build_report(layers=1)
    reports: list[dict] = [{}, {"groups": []}, {"groups": [{}]}, {"groups": [{"name": "lm_head"}]}, {"groups": None}]
    reports += [{key: value for key, value in whole.items() if key != gone} for gone in whole]
    for key in whole:
        for wrong in (None, "text", 3, float("nan"), [], {}, [None], {"x": None}):
            reports.append({**copy.deepcopy(whole), key: wrong})
    for key in whole["groups"][0]:
        for wrong in (None, "text", -1, float("inf"), [], {"values": None}, ["a", 1]):
            changed = copy.deepcopy(whole)
            changed["groups"][1][key] = wrong
            reports.append(changed)
    return reports


@pytest.fixture
def damaged() -> list[dict]:
    return damaged_reports()


@pytest.fixture(scope="module")
def module_report() -> dict:
    """One report for a whole file of tests; not to be changed."""
    return build_report()

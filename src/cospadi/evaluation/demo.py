"""`cospadi demo`: the whole way on the embedded model, without a network, in a few minutes on two cores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cospadi.embedded import model_path, stdlib_texts
from cospadi.engine.compress import compress
from cospadi.engine.journal import check_output
from cospadi.evaluation.models import load, stored_bytes
from cospadi.evaluation.perplexity import perplexity
from cospadi.io import write_durably
from cospadi.progress import Progress, labelled
from cospadi.recipe import DEFAULT_METHOD, Calibration, Recipe

SAMPLES, LENGTH, BLOCKS = 64, 512, 24
KEEPS = (0.4, 0.2)
METHODS = (DEFAULT_METHOD, "rtn", "svd")
"""The default, and beside it rounding to the nearest integers and truncated SVD, the textbook ways."""


class _Yardstick:
    """Perplexity on modules that the model never saw, always the same."""

    def __init__(self, progress: Progress) -> None:
        self.texts, self.progress = stdlib_texts("heldout"), progress
        content = json.dumps([self.texts, LENGTH, BLOCKS]).encode()
        self.sha256 = hashlib.sha256(content).hexdigest()

    def measure(self, source: Path, name: str) -> dict[str, Any]:
        model, tokenizer = load(source)
        found = perplexity(
            model,
            tokenizer,
            self.texts,
            seq_len=LENGTH,
            max_blocks=BLOCKS,
            progress=partial(labelled(self.progress, name), "evaluate"),
        )
        return {
            "text": "standard library modules that the model never saw",
            "text_sha256": self.sha256,
            "perplexity": found.perplexity,
            "tokens": found.tokens,
            "bytes": stored_bytes(source, model),
        }


def run_demo(
    out: Path, *, progress: Progress, keeps: Sequence[float] = KEEPS, methods: Sequence[str] = METHODS
) -> dict[str, Any]:
    """Compress the embedded model at several sizes, by several methods at the same bytes.

    Calibration text: modules of the running Python's standard library that the model was trained on; perplexity: on
    modules that it never saw. Run again, it takes over whatever is finished.

    Args:
        out: output directory; one checkpoint per method and size below it.
        progress: called as progress(phase, done, total, detail, error); the detail begins with the run's name.
        keeps: shares of bytes to keep.
        methods: by name.

    Returns:
        ``dense`` (``perplexity, bytes, tokens``), ``rows`` (``method, keep, keep_actual, perplexity, bytes, seconds,
        directory``), ``model``, ``parameters``, ``calibration_tokens``; ``reports`` of the runs with their
        ``directory`` below `out`, and ``changed``: the directories that were not finished before.

    Raises:
        CospadiError: if a share is impossible or `out` cannot be used.
    """
    calibration = Calibration(samples=SAMPLES, seq_len=LENGTH)
    recipes = [
        Recipe(method=name, keep=keep, calibration=calibration)
        for keep in sorted(set(keeps), reverse=True)
        for name in methods
    ]
    for recipe in recipes:
        check_output(out / _folder(recipe))
    yardstick, texts = _Yardstick(progress), stdlib_texts("calibration")
    dense = yardstick.measure(model_path(), "dense")
    rows, reports, changed = [], [], []
    for recipe in recipes:
        name = f"{recipe.method} {recipe.keep:g}"
        folder = out / _folder(recipe)
        result = compress(
            model_path(),
            folder,
            calibration=texts,
            recipe=recipe,
            progress=labelled(progress, name),
            command="cospadi demo",
        )
        found: dict[str, Any] = (result.report.get("evaluation") if result.complete else None) or {}
        if found.get("text_sha256") != yardstick.sha256:
            changed.append(folder.name)
            found = yardstick.measure(folder, name) | {"dense_perplexity": dense["perplexity"]}
            write_durably(
                folder / "report.json",
                (json.dumps(result.report | {"evaluation": found}, indent=2, sort_keys=True) + "\n").encode(),
            )
        report = result.report | {"evaluation": found}
        reports.append(report | {"directory": folder.name})
        rows.append(
            {
                "method": recipe.method,
                "keep": recipe.keep,
                "keep_actual": report["keep_actual"],
                "perplexity": found["perplexity"],
                "bytes": found["bytes"],
                "seconds": report["seconds"]["total"],
                "directory": folder.name,
            }
        )
    data = {
        "model": "embedded model",
        "parameters": reports[0]["parameters"],
        "calibration_tokens": reports[0]["calibration"]["tokens_used"],
        "dense": {key: dense[key] for key in ("perplexity", "bytes", "tokens")},
        "rows": rows,
    }
    write_durably(out / "demo.json", (json.dumps(data, indent=2) + "\n").encode())
    return data | {"reports": reports, "changed": changed}


def _folder(recipe: Recipe) -> str:
    return f"{recipe.method}-{recipe.keep:g}"

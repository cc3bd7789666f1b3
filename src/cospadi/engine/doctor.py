"""`cospadi doctor`: is everything here that a run needs, and does a tiny one work?"""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cospadi.checkpoint import register
from cospadi.engine.factorise import output_error
from cospadi.methods import GroupShape, Problem, get_method
from cospadi.runtime.devices import device_name
from cospadi.runtime.fingerprints import versions

OPTIONAL = {
    "matplotlib": "plots in reports: pip install 'cospadi[report]'",
    "lm_eval": "tasks in `evaluate --tasks`: pip install 'cospadi[eval]'",
    "triton": "GPU kernels; comes with CUDA builds of torch",
}


def _check(name: str, ok: bool | None, detail: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": detail}


def _optional(module: str, use: str) -> dict[str, Any]:
    if importlib.util.find_spec(module) is None:
        return _check(module, None, f"not installed; {use}")
    try:
        return _check(module, True, version(module.replace("_", "-")))
    except PackageNotFoundError:
        return _check(module, True, "installed")


def _registration() -> dict[str, Any]:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    register()
    automatic = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "0"
    return _check(
        "loading by transformers",
        "cospadi" in AUTO_QUANTIZER_MAPPING,
        "from_pretrained needs no import of cospadi" if automatic else "automatic loading is off: import cospadi first",
    )


def _tiny_run() -> dict[str, Any]:
    """Factorise one random matrix, pack it, read it back, and compare the error with that of a zero weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    tokens = torch.randn(256, 48, generator=generator).double()
    gram = tokens.T @ tokens / len(tokens)
    method, shape = get_method("pursuit"), GroupShape(("tiny",), 48, (64,))
    spec = method.spec(shape, int(0.8 * shape.dense_bytes), {})
    factors = method.factorise(Problem("tiny", (weight,), (gram,)), spec, {"rounds": 5})
    missed, energy = output_error(weight, spec.weight(factors.pack(spec, torch.bfloat16)), gram)
    return _check(
        "a tiny factorisation", missed < 0.5 * energy, f"relative squared error {missed / energy:.4f} at keep 0.8"
    )


def examine() -> dict[str, Any]:
    """All checks.

    Returns:
        ``{"healthy": bool, "checks": [{"name", "ok" (None: optional and absent), "detail"}]}``.
    """
    checks = [_check(name, True, number) for name, number in versions().items()]
    count = torch.cuda.device_count()
    devices = ", ".join(device_name(torch.device("cuda", i)) for i in range(count))
    checks.append(_check("GPU", True if count else None, devices or "none: runs on the CPU"))
    checks.append(_check("threads", True, str(torch.get_num_threads())))
    free = shutil.disk_usage(Path.cwd()).free
    checks.append(_check("free disk", free > 1 << 30, f"{free / 1e9:.1f} GB in the current directory"))
    checks += [_optional(module, use) for module, use in OPTIONAL.items()]
    checks += [_registration(), _tiny_run()]
    return {"healthy": all(c["ok"] is not False for c in checks), "checks": checks}

"""One group: from statistics to packed tensors and the numbers that describe them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cospadi.calibration import Statistics
from cospadi.errors import NumericalError
from cospadi.format import Factors, GroupSpec, Packed, pack, unpack
from cospadi.methods import Method, Problem
from cospadi.runtime.fingerprints import derived_seed


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> tuple[float, float]:
    """Squared output error and output energy per token: tr(EᵀGE) and tr(WᵀGW), in float64.

    Args:
        weight: W (d_in, d_out).
        approximation: Ŵ (d_in, d_out).
        gram: G (d_in, d_in).
    """
    weight, gram = weight.double(), gram.double()
    miss = weight - approximation.double()
    return float((miss * (gram @ miss)).sum()), float((weight * (gram @ weight)).sum())


def pack_factors(factors: Factors, spec: GroupSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Packed tensors of a group, keyed ``dictionary.values``, ``codes.mask`` and so on."""
    tensors = {f"codes.{role}": t for role, t in pack(factors.codes, spec.codes, dtype).items()}
    if spec.dictionary is not None and factors.dictionary is not None:
        tensors |= {f"dictionary.{role}": t for role, t in pack(factors.dictionary, spec.dictionary, dtype).items()}
    return tensors


def split_packed(tensors: dict[str, Tensor]) -> tuple[Packed | None, Packed]:
    """Dictionary and codes of :func:`pack_factors`."""
    parts: dict[str, Packed] = {"dictionary": {}, "codes": {}}
    for key, tensor in tensors.items():
        side, role = key.split(".", 1)
        parts[side][role] = tensor
    return parts["dictionary"] or None, parts["codes"]


def rebuild(tensors: dict[str, Tensor], spec: GroupSpec) -> Tensor:
    """The weight that the packed tensors stand for, (d_in, sum of d_out) float64."""
    dictionary, codes = split_packed(tensors)
    rows = unpack(codes, spec.codes, torch.float64)
    if spec.dictionary is None or dictionary is None:
        return rows.T
    return unpack(dictionary, spec.dictionary, torch.float64).T @ rows.T


def solve(
    method: Method, options: dict[str, Any], spec: GroupSpec, problem: Problem, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Packed tensors of the method's factors, where the problem lies."""
    try:
        factors = method.factorise(problem, spec, options)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(f"{spec.name}: method {method.name!r} failed: {error}") from None
    return pack_factors(factors, spec, dtype)


def measure(
    weights: Sequence[Tensor], tensors: dict[str, Tensor], spec: GroupSpec, grams: Sequence[Tensor]
) -> dict[str, float]:
    """What was stored, against the weights it stands for.

    Args:
        weights: W (d_in, d_out) of every module.
        tensors: packed, on the device of the weights.
        spec: of the group.
        grams: of the input in the original model (d_in, d_in): one for all modules, or one for each.

    Returns:
        ``missed`` and ``energy``: squared output error and output energy per token; ``error``: their quotient.
    """
    found = rebuild(tensors, spec)
    if len(grams) == 1:
        missed, energy = output_error(torch.cat(list(weights), 1), found, grams[0])
    else:
        parts = zip(weights, torch.split(found, list(spec.d_out), 1), grams, strict=True)
        errors = [output_error(weight, part, gram) for weight, part, gram in parts]
        missed, energy = sum(error for error, _ in errors), sum(energy for _, energy in errors)
    return {"error": missed / energy if energy else 0.0, "missed": missed, "energy": energy}


def factorise_group(
    method: Method,
    options: dict[str, Any],
    spec: GroupSpec,
    weights: list[Tensor],
    statistics: Sequence[Statistics],
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    fisher: Sequence[Tensor] = (),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Factorise, pack, and measure what was stored (after rounding to the stored bits).

    Args:
        method: who solves.
        options: its options.
        spec: what to reach.
        weights: W (d_in, d_out) of every module.
        statistics: of their common input, or of the input of each.
        seed: of the run.
        device: where to solve.
        dtype: the model's 16-bit float.
        fisher: mean squared gradient of every weight, for methods that need it.

    Returns:
        packed tensors on the CPU; ``{"error", "seconds", …}`` where `error` is ‖X(W−Ŵ)‖² / ‖XW‖².
    """
    begun = time.perf_counter()
    grams = tuple(item.mean_gram.to(device) for item in statistics)
    problem = Problem(
        name=spec.name,
        weights=tuple(w.to(device).float() for w in weights),
        grams=grams,
        mean_abs=tuple(item.mean_abs.to(device) for item in statistics),
        fisher=tuple(item.to(device) for item in fisher),
        seed=derived_seed(seed, spec.name),
    )
    tensors = solve(method, options, spec, problem, dtype)
    info = measure(problem.weights, tensors, spec, grams)
    return {key: tensor.cpu() for key, tensor in tensors.items()}, info | {"seconds": time.perf_counter() - begun}

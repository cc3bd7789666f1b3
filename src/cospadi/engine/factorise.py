"""One group: from a problem to packed tensors and the numbers that describe them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cospadi.engine.context import RunContext, shares_nothing
from cospadi.engine.plan.plan import PlannedGroup
from cospadi.errors import NumericalError
from cospadi.format import PackedGroup, Spec
from cospadi.methods import Problem, get_method


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


def solve(spec: Spec, options: dict[str, Any], problem: Problem) -> PackedGroup:
    """Packed tensors of what the spec's method finds, on the problem's device.

    Raises:
        NumericalError: if the method fails or returns NaN or Inf.
    """
    try:
        found = get_method(spec.method).factorise(problem, spec, options)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(f"{spec.name}: method {spec.method!r} failed: {error}") from None
    return found.pack(spec, problem.dtype)


def measure(weights: Sequence[Tensor], packed: PackedGroup, spec: Spec, grams: Sequence[Tensor]) -> dict[str, float]:
    """What was stored, against the weights it stands for.

    Args:
        weights: W (d_in, d_out) of every module.
        packed: tensors, on the device of the weights.
        spec: of the group.
        grams: of the input in the original model (d_in, d_in): one for all modules, or one for each; none without
            calibration text.

    Returns:
        ``missed`` and ``energy``: squared output error and output energy per token, or without Grams those of the
        weights themselves; ``error``: their quotient.
    """
    if not grams:
        original, stored = torch.cat(list(weights), 1).double(), torch.cat(list(spec.rebuild(packed)), 1).double()
        missed, energy = float((original - stored).square().sum()), float(original.square().sum())
    elif len(grams) == 1:
        missed, energy = output_error(torch.cat(list(weights), 1), spec.weight(packed), grams[0])
    else:
        errors = [output_error(*part) for part in zip(weights, spec.rebuild(packed), grams, strict=True)]
        missed, energy = sum(error for error, _ in errors), sum(energy for _, energy in errors)
    return {"error": missed / energy if energy else 0.0, "missed": missed, "energy": energy}


def factorise_group(context: RunContext, group: PlannedGroup) -> tuple[PackedGroup, dict[str, Any]]:
    """Factorise, pack, and measure what was stored (after rounding to the stored bits).

    Returns:
        packed tensors on the CPU; ``{"error", "missed", "energy", "seconds"}`` where `error` is ‖X(W−Ŵ)‖² / ‖XW‖².
    """
    begun = time.perf_counter()
    spec = group.spec
    statistics = context.statistics(spec.modules, group.sources)
    problem = context.problem_of(spec.modules, statistics, spec.name)
    plain = problem.grams if context.weights is None else tuple(s.mean_gram.to(context.device) for s in statistics)
    if len(statistics) == 1 and shares_nothing(spec):
        problem = context.apart(problem, spec.modules, plain[0], statistics[0].loss)
    packed = solve(spec, group.options, problem)
    info = measure(problem.weights, packed, spec, plain)
    return {key: tensor.cpu() for key, tensor in packed.items()}, info | {"seconds": time.perf_counter() - begun}

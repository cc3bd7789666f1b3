"""The work of every method's solver on one group, from its spec and options.

Counts follow the code of `cospadi.solvers`, leading terms only. Runs on a CPU set what shapes do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cospadi.engine.estimate.effort import Work
from cospadi.format import GroupSpec
from cospadi.methods import get_method
from cospadi.methods.auto import solved_by
from cospadi.solvers.rescale import MEMORY


@dataclass(frozen=True)
class _Sizes:
    """Of one group: inputs d, outputs n, atoms k, non-zeros s per column, values of codes per scale."""

    d: int
    n: int
    k: int
    s: int
    modules: int
    integer: bool
    codes_integer: bool
    group: int

    @classmethod
    def of(cls, spec: GroupSpec) -> _Sizes:
        nonzeros = spec.codes.nonzeros if spec.codes.sparse else spec.atoms
        integer = spec.codes.integer or (spec.dictionary is not None and spec.dictionary.integer)
        return cls(
            d=spec.d_in,
            n=spec.codes.rows,
            k=spec.atoms,
            s=nonzeros,
            modules=len(spec.modules),
            integer=integer,
            codes_integer=spec.codes.integer,
            group=spec.codes.group,
        )


def _numbers(options: Mapping[str, Any], *names: str) -> tuple[int, ...]:
    return tuple(int(options[name]) for name in names)


def _eigen(size: int) -> Work:
    """Eigenvectors of a symmetric matrix in float64, whose reduction works row by row."""
    return Work(products=40.0 * size**3, kernels=10 * size)


def _product(*sizes: int, wide: bool = False) -> Work:
    """One matrix product of the given three sizes; `wide`: in float64."""
    a, b, c = sizes
    return Work(products=2.0 * a * b * c * (2 if wide else 1), kernels=1)


def _whitening(z: _Sizes) -> Work:
    return Work(products=4.0 * z.d**3 / 3) + _product(z.d, z.d, z.n, wide=True) + _product(z.d, z.d, z.k, wide=True)


_PACKING = 150.0
"""Bytes of memory traffic per code: to pack it and to read it back in float64; assumed."""


def _measuring(z: _Sizes) -> Work:
    """The stored weight and its error under the Gram, in float64, as every run takes it of every group."""
    packing = Work(moved=_PACKING * z.n * z.k, kernels=100)
    return 2 * _product(z.d, z.d, z.n, wide=True) + _product(z.d, z.k, z.n, wide=True) + packing


_CHOOSING = 480.0
"""Bytes of memory traffic that choosing the largest codes and moving all of them is worth, per code and gradient step
(measured: 22 ns on one CPU thread)."""

_SMALL_PASSES = 1.8
"""The same for K-SVD's many short passes, against one long one (measured)."""


def _pursuit(z: _Sizes, options: Mapping[str, Any]) -> Work:
    rounds, steps, refits = _numbers(options, "rounds", "steps", "refits")
    step = _product(z.n, z.k, z.k) + Work(moved=_CHOOSING * z.n * z.k, kernels=15)
    update = _product(z.n, z.k, z.k) + Work(products=4.0 * z.d * z.k**2 + 2.0 * z.k**3 / 3, kernels=60)
    each = step * steps + update + 3 * _product(z.d, z.n, z.k) + _product(z.d, z.k, z.k) + Work(kernels=60)
    work = _whitening(z) + _eigen(min(z.d, z.n)) + each * rounds + 8 * step
    if not z.integer:
        return work + step * (2 * steps)
    fit = step * (4 * steps) + _grid(z.k, z.d, options["clip_search"]) + _feedback(z.k, z.d)
    if z.codes_integer:
        fit = fit + _rounded_codes(z)
    return work + (fit + update) * (1 + refits)


def _rounded_codes(z: _Sizes) -> Work:
    """Codes to a grid, atom after atom: once in eight parts with least squares in between, and in two sweeps."""
    descent = _product(z.n, z.k, z.k) + z.k * Work(moved=1000.0 * z.n, kernels=15)
    return 3 * descent + 49 * (_product(z.n, z.k, z.k) + Work(moved=60.0 * z.n * z.k, kernels=12))


def _ksvd(z: _Sizes, options: Mapping[str, Any]) -> Work:
    rounds, iterations = _numbers(options, "rounds", "power_iterations")
    # orthogonal matching pursuit: every step reads all correlations of the atoms chosen before
    code = (
        Work(moved=_SMALL_PASSES * 2.0 * z.n * z.k * z.s**2, kernels=15 * z.s)
        + _product(z.d, z.n, z.k)
        + _product(z.d, z.k, z.k)
    )
    if options["update"] == "ksvd":  # every atom passes over the residual: twice an iteration, and to be put back
        passes = 2 * iterations + 5
        sweep = Work(moved=_SMALL_PASSES * 4.0 * z.k * z.d * z.n * passes, kernels=40 * z.k)
    else:
        sweep = 2 * _product(z.n, z.k, z.k) + 2 * _product(z.d, z.n, z.k) + Work(products=z.k**3, kernels=60)
    return _whitening(z) + (code + sweep) * rounds


def _low_rank(z: _Sizes, options: Mapping[str, Any]) -> Work:
    work = 2 * _whitening(z) + _product(z.d, z.d, z.n, wide=True) + _eigen(min(z.d, z.n))
    if options.get("update") or options.get("sequential_update"):
        work = work + z.modules * _product(z.k, z.d, z.d, wide=True) + _product(z.k, z.d, z.n, wide=True)
    return work + 4 * _product(z.k, z.d, z.d, wide=True)


def _compot(z: _Sizes, options: Mapping[str, Any]) -> Work:
    (rounds,) = _numbers(options, "rounds")
    each = 2 * _product(z.d, z.n, z.k) + _eigen(z.k) + 6 * _product(z.d, z.k, z.k, wide=True)
    each = each + Work(moved=_CHOOSING * z.n * z.k, kernels=40)
    return _whitening(z) + _product(z.d, z.d, z.n, wide=True) + _eigen(z.d) + each * rounds


def _rocket(z: _Sizes, options: Mapping[str, Any]) -> Work:
    (steps,) = _numbers(options, "refine_steps")
    refit = 3 * _product(z.d, z.n, z.k) + _product(z.n, z.k, z.k) + Work(moved=_CHOOSING * z.n * z.k)
    adam = 3 * _product(z.d, z.n, z.k) + _product(z.d, z.d, z.n) + Work(moved=60.0 * (z.n + z.d) * z.k, kernels=40)
    return _whitening(z) + _product(z.d, z.d, z.n, wide=True) + _eigen(z.d) + refit + adam * steps


def _geopair(z: _Sizes, options: Mapping[str, Any]) -> Work:
    rounds, steps, iterations = _numbers(options, "rounds", "htp_steps", "cg_iterations")
    inside = steps * (1 + iterations)
    code = (_product(z.k, z.k, z.n) + Work(moved=60.0 * z.n * z.k, kernels=12)) * inside
    code = code + _product(z.d, z.d, z.k, wide=True) + 3 * _product(z.d, z.k, z.n, wide=True)
    update = 2 * _product(z.n, z.k, z.k, wide=True) + 2 * _eigen(z.k) + 4 * _product(z.d, z.d, z.k, wide=True)
    return 2 * _eigen(z.d) + (code + update + _product(z.d, z.d, z.n, wide=True)) * (1 + rounds)


def _grid(rows: int, columns: int, search: int, shifts: int = 0) -> Work:
    """Scales of groups, the best of a few clipping ranges."""
    trials = 1 + search * (1 + 2 * shifts)
    return Work(moved=100.0 * rows * columns * trials, kernels=20 * trials)


def _feedback(rows: int, columns: int, sweeps: int = 0, block: int = 128, gridded: bool = True) -> Work:
    """One input after the other, those to come making good for the error; then sweeps of coordinate descent.

    `gridded`: every input goes to the nearest value of a grid, which a GPU does for a block of inputs in one kernel.
    """
    factors = Work(products=6.0 * columns**3, kernels=100)
    step = Work(moved=(2.0 * block + 20) * rows) + _singly(block, gridded)
    return factors + _product(rows, columns, columns) + columns * step + sweeps * _sweep(rows, columns, block, gridded)


def _sweep(rows: int, columns: int, block: int, gridded: bool = True) -> Work:
    """Coordinate descent over all inputs."""
    step = Work(moved=(6.0 * block / 2 + 40) * rows) + _singly(block, gridded)
    return _product(rows, columns, columns) + columns * step


def _singly(block: int, gridded: bool) -> Work:
    """What is launched for one input, by itself or as one of a block."""
    return Work(cpu_kernels=22, kernels=15 / block) if gridded else Work(kernels=15)


def _own_support(z: _Sizes, sweeps: int = 0) -> Work:
    """Rounding with error feedback where every column has a Hessian of its own, on its own support."""
    return Work(products=(4.0 + 2 * sweeps) * z.n * z.s**3, moved=16.0 * z.n * z.s**2, kernels=10 * z.s)


def _rtn(z: _Sizes, options: Mapping[str, Any]) -> Work:
    return _grid(z.n, z.d, options["search"])


def _gptq(z: _Sizes, options: Mapping[str, Any]) -> Work:
    (rescalings,) = _numbers(options, "rescale")
    rounding = _feedback(z.n, z.d, options["sweeps"])
    return _grid(z.n, z.d, options["search"], options["shifts"]) + rounding + _rescaling(z) * rescalings


def _rescaling(z: _Sizes) -> Work:
    """Scales of a row from a system of equations over its groups, then a sweep of coordinate descent."""
    groups = z.d / (z.group or z.d)
    system = Work(moved=12.0 * z.n * z.d * groups + 60.0 * z.n * groups**2, products=4.0 * z.n * groups**3 / 3)
    batches = max(1.0, z.n * (8 * groups**2 + 16 * z.d) / MEMORY)
    fit = system + batches * Work(kernels=10 * groups + 60)
    return 5 * _product(z.n, z.d, z.d) + fit + _sweep(z.n, z.d, 128)


def _survivors(z: _Sizes, hessian: bool) -> Work:
    """Rounding what pruning left; with a Hessian on each row's own support."""
    if not z.codes_integer:
        return Work()
    return _grid(z.n, z.d, 30) + (_own_support(z, sweeps=2) if hessian else Work())


def _wanda(z: _Sizes, _options: Mapping[str, Any]) -> Work:
    return Work(moved=_CHOOSING * z.n * z.d, kernels=20) + _survivors(z, hessian=False)


def _sparsegpt(z: _Sizes, options: Mapping[str, Any]) -> Work:
    return _feedback(z.n, z.d, options["sweeps"], block=32, gridded=False) + _survivors(z, hessian=True)


SOLVERS: dict[str, Callable[[_Sizes, Mapping[str, Any]], Work]] = {
    "pursuit": _pursuit,
    "cospadi": _ksvd,
    "compot": _compot,
    "rocket": _rocket,
    "geopair": _geopair,
    **dict.fromkeys(("svd", "fwsvd", "asvd", "svd_llm", "svd_llm_v2", "basis_sharing"), _low_rank),
    "rtn": _rtn,
    "gptq": _gptq,
    "wanda": _wanda,
    "sparsegpt": _sparsegpt,
}
"""Work by method. Not here: methods that try several representations, or whose search ends when it has found enough."""


def solver_work(spec: GroupSpec, options: Mapping[str, Any]) -> Work | None:
    """What it takes to factorise one group and to measure what was stored; None: unknown.

    Args:
        spec: of the group; one that shapes suggest to `auto` counts as solved by the method that such specs stand for.
        options: of its method; defaults are filled in.
    """
    name = spec.method
    if name == "auto":
        name, options = solved_by(spec)
    if name not in SOLVERS:
        return None
    sizes = _Sizes.of(spec)
    return SOLVERS[name](sizes, get_method(name).check(dict(options))) + _measuring(sizes)

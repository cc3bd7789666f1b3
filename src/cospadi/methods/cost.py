"""What a solve costs, counted from shapes alone; the parts that several methods share.

Work is of several kinds, since no single one explains both a processor and a large GPU: operations of matrix products,
the same in the model's own float type (the forward pass), bytes that pass through memory, kernels that are started one
after another, and bytes between host and device. Counts follow the code of `cospadi.solvers`, leading terms only. Runs
on a CPU set what shapes do not tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cospadi.format import GroupSpec


@dataclass(frozen=True)
class Work:
    """An amount of work; amounts add up and scale.

    Attributes:
        products: floating-point operations of float32 matrix products; float64 counts twice.
        forward: floating-point operations of matrix products in the model's own float type.
        moved: bytes read and written by operations that memory limits.
        kernels: operations started one after another.
        transferred: bytes between the host and the device, where these are two.
        cpu_kernels: operations started one after another on a processor only; a GPU has one kernel for many of them.
    """

    products: float = 0.0
    forward: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0
    transferred: float = 0.0
    cpu_kernels: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(
            self.products + other.products,
            self.forward + other.forward,
            self.moved + other.moved,
            self.kernels + other.kernels,
            self.transferred + other.transferred,
            self.cpu_kernels + other.cpu_kernels,
        )

    def __mul__(self, times: float) -> Work:
        """The same so many times."""
        return Work(
            times * self.products,
            times * self.forward,
            times * self.moved,
            times * self.kernels,
            times * self.transferred,
            times * self.cpu_kernels,
        )

    def __rmul__(self, times: float) -> Work:
        """The same so many times."""
        return self * times

    @property
    def operations(self) -> float:
        """Floating-point operations of all matrix products."""
        return self.products + self.forward


@dataclass(frozen=True)
class Sizes:
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
    def of(cls, spec: GroupSpec) -> Sizes:
        """Of a spec."""
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


def numbers(options: Mapping[str, Any], *names: str) -> tuple[int, ...]:
    """Options as whole numbers."""
    return tuple(int(options[name]) for name in names)


def eigen(size: int) -> Work:
    """Eigenvectors of a symmetric matrix in float64, whose reduction works row by row."""
    return Work(products=40.0 * size**3, kernels=10 * size)


def product(*sizes: int, wide: bool = False) -> Work:
    """One matrix product of the given three sizes; `wide`: in float64."""
    a, b, c = sizes
    return Work(products=2.0 * a * b * c * (2 if wide else 1), kernels=1)


def whitening(z: Sizes) -> Work:
    """A Cholesky factor, applied to the weights and undone on the dictionary."""
    return Work(products=4.0 * z.d**3 / 3) + product(z.d, z.d, z.n, wide=True) + product(z.d, z.d, z.k, wide=True)


_PACKING = 150.0
"""Bytes of memory traffic per code: to pack it and to read it back in float64; assumed."""

CHOOSING = 480.0
"""Bytes of memory traffic that choosing the largest codes and moving all of them is worth, per code and gradient step
(measured: 22 ns on one CPU thread)."""


def measuring(z: Sizes) -> Work:
    """The stored weight and its error under the Gram, in float64, as every run takes it of every group."""
    packing = Work(moved=_PACKING * z.n * z.k, kernels=100)
    return 2 * product(z.d, z.d, z.n, wide=True) + product(z.d, z.k, z.n, wide=True) + packing


def grid(rows: int, columns: int, search: int, shifts: int = 0) -> Work:
    """Scales of groups, the best of a few clipping ranges."""
    trials = 1 + search * (1 + 2 * shifts)
    return Work(moved=100.0 * rows * columns * trials, kernels=20 * trials)


def feedback(rows: int, columns: int, sweeps: int = 0, block: int = 128, gridded: bool = True) -> Work:
    """One input after the other, those to come making good for the error; then sweeps of coordinate descent.

    `gridded`: every input goes to the nearest value of a grid, which a GPU does for a block of inputs in one kernel.
    """
    factors = Work(products=6.0 * columns**3, kernels=100)
    step = Work(moved=(2.0 * block + 20) * rows) + _singly(block, gridded)
    return factors + product(rows, columns, columns) + columns * step + sweeps * sweep(rows, columns, block, gridded)


def sweep(rows: int, columns: int, block: int, gridded: bool = True) -> Work:
    """Coordinate descent over all inputs."""
    step = Work(moved=(6.0 * block / 2 + 40) * rows) + _singly(block, gridded)
    return product(rows, columns, columns) + columns * step


def _singly(block: int, gridded: bool) -> Work:
    """What is launched for one input, by itself or as one of a block."""
    return Work(cpu_kernels=22, kernels=15 / block) if gridded else Work(kernels=15)


def own_support(z: Sizes, sweeps: int = 0) -> Work:
    """Rounding with error feedback where every column has a Hessian of its own, on its own support."""
    return Work(products=(4.0 + 2 * sweeps) * z.n * z.s**3, moved=16.0 * z.n * z.s**2, kernels=10 * z.s)


def factored_memory(spec: GroupSpec) -> float:
    """Bytes that a solve of dictionary and codes holds, in float32."""
    return 4.0 * (9 * spec.atoms * spec.codes.rows + 6 * spec.d_in * spec.codes.rows)

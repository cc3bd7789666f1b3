"""Random stored matrices of any spec, created on their device, for tests, benchmarks and speed estimates."""

from dataclasses import replace

import torch
from torch import Tensor

from cospadi.format import GroupSpec, MatrixSpec, Packed
from cospadi.format.pack import integer_range, pack_bits, pack_mask
from cospadi.format.patterns import keep_largest
from cospadi.format.trellis import LEVEL_SIZE

_CHUNK = 1 << 24  # matrix entries created at a time


def random_packed(
    spec: MatrixSpec,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Packed:
    """Stored tensors of a random matrix whose products have about the norm of their input.

    Args:
        spec: how the matrix is stored.
        dtype: of 16-bit values and scales.
        device: of the tensors.
        seed: of the random numbers.

    Returns:
        Tensors by role, as `cospadi.format.pack` returns them.
    """
    generator = torch.Generator(device).manual_seed(seed)
    whole = 1 if spec.trellis is None else spec.trellis.outputs
    step = max(1, _CHUNK // spec.columns // whole) * whole
    parts = [_random_rows(spec, min(step, spec.rows - start), dtype, generator) for start in range(0, spec.rows, step)]
    return {role: torch.cat([part[role] for part in parts]) for role in parts[0]}


def _random_rows(spec: MatrixSpec, rows: int, dtype: torch.dtype, generator: torch.Generator) -> Packed:
    device = generator.device
    size = spec.nonzeros**-0.5
    packed: Packed = {}
    if spec.sparse:
        scores = torch.rand(spec.columns, rows, generator=generator, device=device)
        packed["mask"] = pack_mask(keep_largest(scores, spec.nonzeros, spec.pattern).T)
    if not spec.integer:
        normal = torch.randn(rows, spec.nonzeros, generator=generator, device=device) * size
        packed["values"] = normal.to(dtype) if spec.bits == 16 else _fourteen(normal)
        return packed
    spread = 0.5 + torch.rand(rows, spec.groups, generator=generator, device=device)
    if spec.trellis is not None:
        shape = replace(spec, rows=rows).tensors()["values"][0]
        words = torch.randint(-(2**31), 2**31, shape, generator=generator, device=device)
        return {"values": words.to(torch.int32), "scales": (spread * size / LEVEL_SIZE).to(dtype)}
    low, high = integer_range(spec.bits, spec.symmetric, spec.half)
    levels = torch.randint(low, high + 1, (rows, spec.nonzeros), generator=generator, device=device)
    packed["values"] = levels.to(torch.int8) if spec.signed_bytes else pack_bits(levels - low, spec.bits)
    packed["scales"] = (spread * size * 2 / max(1, high - low)).to(dtype)
    if not spec.symmetric:
        most = 2 * high if spec.half else high
        zeros = torch.randint(low, most + 1, (rows, spec.groups), generator=generator, device=device)
        packed["zeros"] = pack_bits(zeros, spec.zero_bits)
    return packed


def random_codes(
    spec: GroupSpec, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", seed: int = 0
) -> Packed:
    """Random codes of all modules of a group, one below the other. Arguments as for :func:`random_packed`."""
    if spec.stacked:
        return random_packed(spec.codes, dtype, device, seed)
    parts = [random_packed(spec.module_codes(i), dtype, device, seed + i) for i in range(len(spec.modules))]
    return {role: torch.cat([part[role] for part in parts]) for role in parts[0]}


def random_rotation(
    spec: GroupSpec, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", seed: int = 0
) -> Packed | None:
    """The random rotation of a group that has one. Arguments as for :func:`random_packed`."""
    if spec.rotation is None:
        return None
    generator = torch.Generator(device).manual_seed(seed)
    signs = torch.randint(0, 2, (1, spec.d_in), generator=generator, device=device)
    packed = {"signs": pack_mask(signs.bool())[0]}
    if spec.rotation.scales:
        packed["scales"] = (0.5 + torch.rand(spec.d_in, generator=generator, device=device)).to(dtype)
    return packed


def _fourteen(values: Tensor) -> Tensor:
    pattern = values.to(torch.bfloat16).view(torch.int16).to(torch.int32)
    return pack_bits((pattern >> 2) & 0x3FFF, 14)

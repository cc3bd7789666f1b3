"""Random stored matrices of any spec, created on their device, for tests, benchmarks and speed estimates."""

import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.format.pack import integer_range, pack_bits, pack_mask
from cospadi.format.patterns import keep_largest

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
    step = max(1, _CHUNK // spec.columns)
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
    low, high = integer_range(spec.bits, spec.symmetric)
    levels = torch.randint(low, high + 1, (rows, spec.nonzeros), generator=generator, device=device)
    bytes_ = spec.bits == 8 and spec.symmetric
    packed["values"] = levels.to(torch.int8) if bytes_ else pack_bits(levels - low, spec.bits)
    spread = 0.5 + torch.rand(rows, spec.groups, generator=generator, device=device)
    packed["scales"] = (spread * size * 2 / max(1, high - low)).to(dtype)
    if not spec.symmetric:
        zeros = torch.randint(low, high + 1, (rows, spec.groups), generator=generator, device=device)
        packed["zeros"] = pack_bits(zeros, spec.bits)
    return packed


def _fourteen(values: Tensor) -> Tensor:
    pattern = values.to(torch.bfloat16).view(torch.int16).to(torch.int32)
    return pack_bits((pattern >> 2) & 0x3FFF, 14)

"""A reader written from docs/format.md alone, in plain Python, on the stored checkpoints: the page is sufficient."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[2] / "checkpoints"


def bits_of(words: list[int]) -> int:
    return sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))


def items(words: list[int], bits: int, count: int) -> list[int]:
    stream = bits_of(words)
    return [stream >> (bits * i) & (2**bits - 1) for i in range(count)]


def from_bfloat16(pattern: int) -> float:
    return torch.tensor(pattern - 2**16 if pattern >= 2**15 else pattern, dtype=torch.int16).view(torch.bfloat16).item()


def hash_level(state: int) -> int:
    return sum((0x83DCD12D * state % 2**32).to_bytes(4, "little")) - 510


def trellis_rows(tensors: dict, spec: dict, rows: int, columns: int) -> list[list[float]]:
    bits, state = spec["bits"], spec["trellis"]["state"]
    inputs, outputs = spec["trellis"]["inputs"], spec["trellis"]["outputs"]
    count, tiles = inputs * outputs, tensors["values"].tolist()
    out = []
    for r in range(rows):
        row = []
        for c in range(columns):
            stream = bits_of(tiles[r // outputs][c // inputs])
            t = r % outputs * inputs + c % inputs
            twice = stream | stream << (count * bits)  # circular
            row.append(hash_level(twice >> (t * bits) & (2**state - 1)) * tensors["scales"][r, 0].item())
        out.append(row)
    return out


def matrix_rows(tensors: dict, spec: dict, rows: int, columns: int) -> list[list[float]]:
    if "trellis" in spec:
        return trellis_rows(tensors, spec, rows, columns)
    bits, count = spec["bits"], spec.get("nonzeros", columns)
    group, symmetric, half = spec.get("group") or count, spec.get("symmetric", True), spec.get("half", False)
    out = []
    for r in range(rows):
        stored = tensors["values"][r].tolist()
        if bits == 14:
            values = [from_bfloat16(item << 2) for item in items(stored, 14, count)]
        elif bits == 16:
            values = stored
        else:
            levels = stored if bits == 8 and symmetric and not half else items(stored, bits, count)
            zero_bits = bits + 1 if half else bits
            if not symmetric:
                zeros = items(tensors["zeros"][r].tolist(), zero_bits, math.ceil(count / group))
                zeros = [zero / 2 for zero in zeros] if half else zeros
            else:
                middle = (2**bits - 1) / 2 if half else 0 if bits == 8 else 2 ** (bits - 1) - 1
                zeros = [middle] * math.ceil(count / group)
            scales = tensors["scales"][r].tolist()
            values = [(level - zeros[i // group]) * scales[i // group] for i, level in enumerate(levels)]
        if "pattern" in spec:
            left = iter(values)
            values = [next(left) if bit else 0.0 for bit in items(tensors["mask"][r].tolist(), 1, columns)]
        out.append(values)
    return out


def unrotated(rows: torch.Tensor, tensors: dict, rotation: dict) -> torch.Tensor:
    """diag(σ ε) B times the weight that reads z; `rows` holds its transpose."""
    d_in, sizes = rows.shape[1], []
    sizes += [rotation["block"]] * (d_in // rotation["block"])
    rest = d_in % rotation["block"]
    sizes += [2**i for i in range(10, -1, -1) if rest >> i & 1]
    blocks = [
        torch.tensor([[(-1.0) ** (i & j).bit_count() / math.sqrt(n) for j in range(n)] for i in range(n)]).double()
        for n in sizes
    ]
    signs = [1 - 2 * bit for bit in items(tensors["rotation_signs"].tolist(), 1, d_in)]
    scales = tensors["rotation_scales"].tolist() if rotation.get("scales", True) else [1.0] * d_in
    factors = torch.tensor([sign * scale for sign, scale in zip(signs, scales, strict=True)]).double()
    return (factors.diag() @ torch.block_diag(*blocks) @ rows.T).T


@pytest.mark.parametrize("name", ["v1/every_kind", "v1/tied_float16", "v2/every_kind", "v2/tied_float16"])
def test_the_page_is_sufficient(name: str) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in (ROOT / name).glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            tensors |= {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    groups = json.loads((ROOT / name / "config.json").read_text())["quantization_config"]["groups"]
    expected = json.loads((ROOT / name / "expected.json").read_text())["layers"]
    for group in groups:
        first = group["modules"][0]
        of_first = {key.removeprefix(f"{first}."): t for key, t in tensors.items() if key.startswith(f"{first}.")}
        for module, d_out in zip(group["modules"], group["d_out"], strict=True):
            held = {
                role: tensors[f"{module}.{leaf}"]
                for role, leaf in (
                    ("values", "values"), ("mask", "mask"), ("scales", "values_scales"), ("zeros", "values_zeros")
                )
                if f"{module}.{leaf}" in tensors
            }  # fmt: skip
            weight = torch.tensor(matrix_rows(held, group["codes"], d_out, group["atoms"])).double()
            if group["dictionary"] is not None:
                names = {"values": "dictionary", "scales": "dictionary_scales", "zeros": "dictionary_zeros"}
                atoms = {role: of_first[leaf] for role, leaf in names.items() if leaf in of_first}
                weight = (
                    weight
                    @ torch.tensor(matrix_rows(atoms, group["dictionary"], group["atoms"], group["d_in"])).double()
                )
            if "rotation" in group:
                weight = unrotated(weight, of_first, group["rotation"])
            probe = torch.linspace(-1, 1, group["d_in"], dtype=torch.float64)
            wanted = torch.tensor(expected[module]["product"], dtype=torch.float64)
            torch.testing.assert_close(
                weight @ probe, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, at=module: f"{at}: {m}"
            )

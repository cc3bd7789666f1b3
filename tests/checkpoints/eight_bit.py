"""A checkpoint format as another package would add it: plain 8-bit integers, one scale per output."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from cospadi.checkpoint import FORMATS, GroupedFormat


@dataclass(frozen=True)
class EightBit:
    modules: tuple[str, ...]
    d_in: int
    d_out: int

    def tensors(self, index, dtype=torch.bfloat16):
        return {"levels": ((self.d_out, self.d_in), torch.int8), "scales": ((self.d_out, 1), dtype)}

    def row(self, layer=None):
        after, before = self.d_out * (self.d_in + 2), 2 * self.d_out * self.d_in
        return {"name": self.modules[0], "method": "eight_bit", "bytes": after, "bytes_before": before}

    def to_dict(self):
        return asdict(self) | {"modules": list(self.modules)}

    @classmethod
    def from_dict(cls, data):
        return cls(tuple(data["modules"]), data["d_in"], data["d_out"])


class EightBitLinear(nn.Module):
    def __init__(self, spec, index, device, dtype):
        super().__init__()
        self.spec, self.index, self.in_features, self.out_features = spec, index, spec.d_in, spec.d_out
        for name, (shape, kind) in spec.tensors(index, dtype).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=kind), False))
        self.register_parameter("bias", None)

    def dense_weight(self, dtype=None):
        return (self.levels * self.scales.float()).to(dtype or self.scales.dtype)

    def forward(self, x):
        return nn.functional.linear(x, self.dense_weight(), self.bias)


class EightBitFormat(GroupedFormat):
    name, spec_type, layer_type = "eight_bit", EightBit, EightBitLinear


FORMATS.add("eight_bit", EightBitFormat())

"""The stored tensors of a compressed linear layer: what it holds, in which state, and the dense weight they make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from cospadi.format import GroupSpec, MatrixSpec, Packed, unpack
from cospadi.format.leaves import codes_name, dictionary_name, rotation_name
from cospadi.format.rotation import folded, rotated
from cospadi.kernels import _torch_private as hooks
from cospadi.layers.computed_linear import ComputedLinear
from cospadi.layers.tensors import GUARD, Roles, codes_roles, dictionary_roles, rotation_roles

State = tuple[Any, ...]
"""Identities and versions of tensors: equal only as long as none was replaced or changed."""


class FactorTensors(ComputedLinear):
    """The tensors of one module of a group: its codes, and in the group's first module dictionary and rotation.

    Parameters: ``values`` and, depending on the spec, ``mask``, ``values_scales``, ``values_zeros``; in the first
    module also ``dictionary``, ``dictionary_scales``, ``dictionary_zeros``, ``rotation_signs``, ``rotation_scales``.
    All are frozen when built. The floating-point ones may be trained after `requires_grad_`.
    """

    values: Tensor

    def __init__(
        self, group: GroupSpec, index: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__(group.d_in, group.d_out[index])
        self.describe(group, index)
        self._built_dtype = dtype
        for name, (shape, kind) in group.tensors(index, dtype).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=kind, device=device), False))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)

    def describe(self, group: GroupSpec, index: int) -> None:
        """Take over how the stored tensors are to be read; they are set separately."""
        self.group = group
        self.index = index
        self.codes_spec: MatrixSpec = group.module_codes(index)
        self.dictionary_spec: MatrixSpec | None = group.dictionary
        # computed once, because every call needs them several times
        self._codes_roles = codes_roles(self.codes_spec)
        self._dictionary_roles = () if group.dictionary is None else dictionary_roles(group.dictionary)
        self._rotation_roles = rotation_roles(group)

    @property
    def name(self) -> str:
        """Dotted name of the module in the model."""
        return self.group.modules[self.index]

    def packed_codes(self) -> Packed:
        """Stored tensors of the codes by role."""
        held = cast(dict[str, Tensor], self._parameters)
        return {role: held[name] for role, name in self._codes_roles}

    def own_dictionary(self) -> Packed | None:
        """Stored tensors of the dictionary by role, in the module that holds it; None for an identity dictionary."""
        if self.dictionary_spec is None:
            return None
        held = cast(dict[str, Tensor], self._parameters)
        return {role: held[name] for role, name in self._dictionary_roles}

    def own_rotation(self) -> Packed | None:
        """Stored tensors of the rotation by role, in the module that holds it; None without a rotation."""
        if self.group.rotation is None:
            return None
        held = cast(dict[str, Tensor], self._parameters)
        return {role: held[name] for role, name in self._rotation_roles}

    def rotated(self, x: Tensor) -> Tensor:
        """The input as the dictionary reads it, in the module that holds the rotation; x itself without one."""
        packed, rotation = self.own_rotation(), self.group.rotation
        return x if packed is None or rotation is None else rotated(x, packed, rotation)

    @property
    def reads_x(self) -> bool:
        """Whether the codes read x itself: the dictionary is the identity and there is no rotation."""
        return self.dictionary_spec is None and self.group.rotation is None

    def dictionary_device(self) -> torch.device:
        """Device of the dictionary or rotation that this module holds; without either, that of the codes."""
        name = codes_name("values") if self.dictionary_spec is None else dictionary_name("values")
        if self.dictionary_spec is None and self.group.rotation is not None:
            name = rotation_name("signs")
        return cast(Tensor, self._parameters[name]).device

    def dictionary_state(self) -> State | None:
        """Identities and versions of dictionary and rotation held here; None while they are offloaded."""
        return self._state(self._dictionary_roles + self._rotation_roles)

    def codes_state(self) -> State | None:
        """Identities and versions of the tensors of the codes; None while they are offloaded."""
        return self._state(self._codes_roles)

    def _state(self, roles: Roles) -> State | None:
        state: list[tuple[int, object]] = []
        for _, name in roles:
            tensor = cast(Tensor, self._parameters[name])
            if tensor.is_meta:
                return None
            state.append((id(tensor), None if tensor.is_inference() else hooks.tensor_version(tensor)))
        return tuple(state)

    def code_tensor(self, role: str) -> Tensor:
        """One stored tensor of the codes."""
        return cast(Tensor, self._parameters[codes_name(role)])

    def factor_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of dictionary and codes: all but bias and guard."""
        for name, parameter in self._parameters.items():
            if parameter is not None and name not in ("bias", GUARD):
                yield parameter

    @torch.no_grad()
    def dense_from(self, dictionary: Packed | None, rotation: Packed | None, dtype: torch.dtype | None) -> Tensor:
        """The dense weight that the codes make with a dictionary and a rotation.

        Args:
            dictionary: stored tensors by role; None for the identity.
            rotation: stored tensors by role; None for none.
            dtype: of the result; None for that of the floating-point parameters. Computed in at least float32.

        Returns:
            (d_out, d_in), on the device of the codes.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = unpack(self.packed_codes(), self.codes_spec, wide)
        if dictionary is not None and self.dictionary_spec is not None:
            weight = weight @ unpack(dictionary, self.dictionary_spec, wide).to(weight.device)
        if rotation is not None and self.group.rotation is not None:
            weight = folded(weight, rotation, self.group.rotation)
        return weight.to(dtype or self.float_dtype)

    @property
    def float_dtype(self) -> torch.dtype:
        """Dtype of the floating-point parameters; without any, the dtype for which the layer was built."""
        for parameter in self.parameters(recurse=False):
            if parameter.is_floating_point():
                return parameter.dtype
        return self._built_dtype

    @property
    def weight_like(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of the computed weight."""
        return self.float_dtype, self.code_tensor("values").device

    def extra_repr(self) -> str:
        """Sizes and storage in one line."""
        codes = self.codes_spec
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        if self.dictionary_spec is not None:
            held = "" if self.index == 0 else f" in {self.group.modules[0]}"
            parts.append(f"dictionary={self.group.atoms} atoms of {self.dictionary_spec.bits} bits{held}")
        sparsity = f"{codes.nonzeros} of {codes.columns} ({codes.pattern})" if codes.sparse else "dense"
        scales = f" per {codes.group or codes.nonzeros}" if codes.integer else ""
        if codes.trellis is not None:
            scales += f", trellis of {codes.trellis.state} state bits"
        if self.group.rotation is not None:
            held = "" if self.index == 0 else f" in {self.group.modules[0]}"
            parts.append(f"rotation=blocks of {self.group.rotation.block}{held}")
        parts.append(f"codes={sparsity}, {codes.bits} bits{scales}")
        return ", ".join(parts)

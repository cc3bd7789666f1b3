"""A linear layer as dictionary and sparse codes, on the tensors as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.errors import ModelError
from cospadi.format import GroupSpec, MatrixSpec, Packed, unpack
from cospadi.kernels import factored_group, factored_linear
from cospadi.layers.siblings import Siblings, State
from cospadi.layers.tensors import (
    GUARD,
    GUARD_DTYPE,
    GUARD_SHAPE,
    Roles,
    codes_name,
    codes_roles,
    dictionary_name,
    dictionary_roles,
    module_tensors,
)


class FactoredLinear(nn.Module):
    """``y = (x D) S + b`` for one module of a group.

    Parameters carry the stored tensors: ``values`` and, by what the spec asks for, ``mask``, ``values_scales``,
    ``values_zeros``; the group's first module also ``dictionary``, ``dictionary_scales``, ``dictionary_zeros``. All are
    frozen when built; the floating-point ones may be trained after `requires_grad_`.
    """

    values: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        group: GroupSpec,
        index: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Build a layer with unset tensors. Layers of a group must then be joined by :meth:`link`.

        Args:
            group: how the group is stored.
            index: which of its modules this is.
            bias: whether there is a bias (d_out,).
            device: of the parameters, ``"meta"`` included.
            dtype: of the floating-point parameters.
        """
        super().__init__()
        self.group = group
        self.index = index
        self.in_features = group.d_in
        self.out_features = group.d_out[index]
        self.codes_spec: MatrixSpec = group.module_codes(index)
        self.dictionary_spec: MatrixSpec | None = group.dictionary
        # worked out here because every call asks for them, several times
        self._codes_roles = codes_roles(self.codes_spec)
        self._dictionary_roles = () if group.dictionary is None else dictionary_roles(group.dictionary)
        self.siblings: Siblings | None = None
        self._built_dtype = dtype
        for name, (shape, kind) in module_tensors(group, index, dtype).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=kind, device=device), False))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        if len(group.modules) == 1:
            self.link([self])

    @staticmethod
    def link(members: Sequence[FactoredLinear]) -> None:
        """Join the layers of a group, in the order of `group.modules`.

        Raises:
            ValueError: if they are not the members of one group in order.
        """
        group = members[0].group
        if [m.index for m in members] != list(range(len(group.modules))) or any(m.group != group for m in members):
            raise ValueError(f"{group.name}: the layers given are not its {len(group.modules)} modules in order")
        shared = Siblings(members)
        for member in members:
            member.siblings = shared

    @property
    def name(self) -> str:
        """Dotted name of the module in the model."""
        return self.group.modules[self.index]

    def add_guard(self) -> None:
        """Hold the one-byte tensor that makes a reader without this package stop (see `layers.tensors.GUARD`)."""
        if GUARD not in self._parameters:
            guard = torch.zeros(GUARD_SHAPE, dtype=GUARD_DTYPE, device=self.values.device)
            self.register_parameter(GUARD, nn.Parameter(guard, False))

    def drop_guard(self) -> None:
        """Inverse of :meth:`add_guard`."""
        self._parameters.pop(GUARD, None)

    def packed_codes(self) -> Packed:
        """Stored tensors of the codes by role."""
        return {role: self._parameter(name) for role, name in self._codes_roles}

    def packed_dictionary(self) -> Packed | None:
        """Stored tensors of the group's dictionary by role; None for an identity dictionary."""
        if self.dictionary_spec is None:
            return None
        owner = self._group_owner()
        return {role: owner._parameter(name) for role, name in self._dictionary_roles}

    def dictionary_device(self) -> torch.device:
        """Where the dictionary of this (owning) layer lies; for the identity, where the codes lie."""
        name = codes_name("values") if self.dictionary_spec is None else dictionary_name("values")
        return self._parameter(name).device

    def dictionary_state(self) -> State | None:
        """Identities and versions of the dictionary's tensors in this (owning) layer; None while it is offloaded."""
        return self._group_owner()._state(self._dictionary_roles)

    def codes_state(self) -> State | None:
        """Identities and versions of the codes' tensors; None while they are offloaded."""
        return self._state(self._codes_roles)

    def code_tensor(self, role: str) -> Tensor:
        """One stored tensor of the codes."""
        return self._parameter(codes_name(role))

    def factor_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of dictionary and codes: all but bias and guard."""
        for name, parameter in self._parameters.items():
            if parameter is not None and name not in ("bias", GUARD):
                yield parameter

    def project(self, x: Tensor) -> Tensor:
        """Coordinates x D (…, atoms) of this (owning) layer's dictionary, x on the dictionary's device."""
        if self.dictionary_spec is None:
            return x
        packed = self.packed_dictionary()
        assert packed is not None
        return factored_linear(x, None, None, packed, self.dictionary_spec)

    def group_output(self, x: Tensor, codes: Packed) -> Tensor:
        """Outputs of all modules side by side (…, sum of d_out), from this (owning) layer and all codes in one."""
        return factored_linear(x, self.packed_dictionary(), self.dictionary_spec, codes, self.group.codes)

    def all_outputs(self, x: Tensor, members: Sequence[FactoredLinear]) -> Tensor:
        """The same for a compiler: from this (owning) layer and the codes of every member."""
        codes = [member.packed_codes() for member in members]
        return factored_group(x, self.packed_dictionary(), self.dictionary_spec, codes, self.group.codes)

    def forward(self, x: Tensor, *, coordinates_only: bool = False) -> Tensor:
        """Apply the layer.

        Args:
            x: (…, d_in), of the dtype of the floating-point parameters, as for ``nn.Linear``.
            coordinates_only: give x D instead; siblings ask an offloaded owner for it.

        Returns:
            (…, d_out), or (…, atoms).

        Raises:
            ModelError: if the layer holds no data, or belongs to a group and was not joined to it.
        """
        if self.values.device.type == "meta" and x.device.type != "meta":
            raise ModelError(f"{self.name}: the layer holds no data yet; load a checkpoint into the model first")
        if coordinates_only:
            return self.project(x)
        if self.siblings is None:
            raise ModelError(f"{self.name}: the layer is not joined to its group {self.group.name}")
        if len(self.siblings.members) == 1:
            dictionary, spec = self.packed_dictionary(), self.dictionary_spec
            y, finished = factored_linear(x, dictionary, spec, self.packed_codes(), self.codes_spec), True
        else:
            y, finished = self.siblings.shared(x, self.index)
        if not finished:
            y = factored_linear(y, None, None, self.packed_codes(), self.codes_spec)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight as ``nn.Linear`` would hold it.

        Args:
            dtype: of the result; None for that of the floating-point parameters. Computed in at least float32.

        Returns:
            (d_out, d_in), on the device of the codes.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = unpack(self.packed_codes(), self.codes_spec, wide)
        packed = self.packed_dictionary()
        if packed is not None and self.dictionary_spec is not None:
            weight = weight @ unpack(packed, self.dictionary_spec, wide).to(weight.device)
        return weight.to(dtype or self.float_dtype)

    @property
    def float_dtype(self) -> torch.dtype:
        """Dtype of the floating-point parameters; without any, that for which the layer was built."""
        for parameter in self.parameters(recurse=False):
            if parameter.is_floating_point():
                return parameter.dtype
        return self._built_dtype

    def extra_repr(self) -> str:
        """Sizes and storage in one line."""
        codes = self.codes_spec
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        if self.dictionary_spec is not None:
            held = "" if self.index == 0 else f" in {self.group.modules[0]}"
            parts.append(f"dictionary={self.group.atoms} atoms of {self.dictionary_spec.bits} bits{held}")
        sparsity = f"{codes.nonzeros} of {codes.columns} ({codes.pattern})" if codes.sparse else "dense"
        scales = f" per {codes.group or codes.nonzeros}" if codes.integer else ""
        parts.append(f"codes={sparsity}, {codes.bits} bits{scales}")
        return ", ".join(parts)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FactoredLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.siblings is not None:
            self.siblings.placed_anew()
        return self

    def _state(self, roles: Roles) -> State | None:
        """Identities and versions of parameters; None if one holds no data. Asked for several times a call."""
        state: list[tuple[int, int | None]] = []
        for _, name in roles:
            tensor = self._parameter(name)
            if tensor.is_meta:
                return None
            state.append((id(tensor), None if tensor.is_inference() else tensor._version))
        return tuple(state)

    def _parameter(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def _group_owner(self) -> FactoredLinear:
        if self.index == 0:
            return self
        if self.siblings is None:
            raise ModelError(f"{self.name}: the layer is not joined to its group {self.group.name}")
        return self.siblings.owner

"""What makes a compressed layer an ``nn.Linear``: its ``weight`` is computed from the stored tensors when it is used.

Code that was written for ``nn.Linear`` then needs no exception for compressed layers: initialisers of architectures,
forward passes that hand ``layer.weight`` to a function instead of calling the layer, and PEFT. The weight is no
parameter and no entry of the state dict, nothing is stored twice, and it cannot be changed: a change would be lost
with the computed numbers, so that every attempt raises.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cospadi.errors import ModelError
from cospadi.layers.stored_layer import StoredLayer
from cospadi.layers.tensors import GUARD, GUARD_DTYPE, GUARD_SHAPE


class ComputedLinear(StoredLayer, nn.Linear):
    """Base of the linear layers that store something else than their weight.

    Attributes:
        guarded: whether the state dict gets the guard tensor (docs/format.md). While a checkpoint is being loaded the
            guard is an ordinary parameter instead, because readers look tensors up by attribute.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which would make a weight
        self.in_features, self.out_features = in_features, out_features
        self.guarded = False

    @abstractmethod
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (d_out, d_in); None for the dtype of the floating-point parameters."""

    @property
    @abstractmethod
    def weight_like(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of the computed weight."""

    @property
    def weight(self) -> Tensor:
        """The dense weight (d_out, d_in), computed whenever an operation reads its numbers; it cannot be changed.

        It has no gradient: train the stored parameters through calls of the layer.
        """
        held = self._parameters.get(GUARD)
        if held is not None:
            return held
        # compilers trace the computation itself
        return self.dense_weight() if torch.compiler.is_compiling() else ComputedWeight.of(self)

    @weight.setter
    def weight(self, value: Any) -> None:
        if not (isinstance(value, ComputedWeight) and value.layer is self):  # PEFT sets what it read
            refuse_change(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter; `weight` is refused."""
        if name == GUARD and GUARD not in self._parameters:
            refuse_change(self)
        super().register_parameter(name, param)

    def add_guard(self, device: torch.device | str | None = None) -> None:
        """Let the state dict hold the guard; a layer without data, which is about to be loaded, gets the parameter.

        Args:
            device: of that parameter; None for that of the stored tensors.
        """
        where = torch.device(device) if device is not None else self.weight_like[1]
        if where.type == "meta" and GUARD not in self._parameters:
            self._parameters[GUARD] = _guard(where)
        self.guarded = True

    def drop_guard(self) -> None:
        """Inverse of :meth:`add_guard`."""
        self.end_loading()
        self.guarded = False

    def end_loading(self) -> None:
        """From now on `weight` is the computed weight, in a guarded layer too."""
        self._parameters.pop(GUARD, None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.guarded and GUARD not in self._parameters:
            device = self.weight_like[1]
            destination[prefix + GUARD] = _guard(torch.device("cpu") if device.type == "meta" else device).data

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, strict, missing, unexpected, _ = args
        if not self.guarded or GUARD in self._parameters:
            return
        name = prefix + GUARD
        found = state_dict.get(name)
        if found is None and strict:
            missing.append(name)
        elif found is not None and tuple(found.shape) == GUARD_SHAPE and name in unexpected:
            unexpected.remove(name)


class ComputedWeight(Tensor):
    """The weight of a compressed layer: size, dtype and device are known, numbers are computed by every operation.

    A tensor without storage. Operations get the dense weight of that moment and return ordinary tensors, except that a
    view of it is of this class too; an operation that would write into it raises a ModelError. Raw addresses
    (`data_ptr`) do not exist, which PyTorch says too.
    """

    layer: ComputedLinear
    compute: Callable[[], Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, layer: ComputedLinear, like: Tensor, compute: Callable[[], Tensor]) -> ComputedWeight:
        """The weight of a layer, or a view of it.

        Args:
            layer: whose weight it is.
            like: of the same size, strides and dtype, on ``meta``.
            compute: the numbers, as an ordinary tensor like that on the layer's device.
        """
        made: Any = Tensor._make_wrapper_subclass(
            cls, like.size(), strides=like.stride(), dtype=like.dtype, device=layer.weight_like[1]
        )
        made.layer, made.compute = layer, compute
        made._is_hf_initialized = True  # the initialisers of transformers leave it alone
        found: ComputedWeight = made
        return found

    @classmethod
    def of(cls, layer: ComputedLinear) -> ComputedWeight:
        """The weight of a layer as it is now and will be."""
        dtype = layer.weight_like[0]
        like = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")
        return cls(layer, like, lambda: like if layer.weight_like[1].type == "meta" else layer.dense_weight())

    def computed(self) -> Tensor:
        """The numbers as an ordinary tensor."""
        with torch.no_grad():
            return self.compute()

    @property
    def data(self) -> Tensor:
        """The same weight."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        refuse_change(self.layer)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema.arguments
        given = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for item in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(item, cls):
                        refuse_change(item.layer)
        returns = func._schema.returns
        viewed = schema[0].alias_info is not None and len(returns) == 1 and str(returns[0].type) == "Tensor"
        if viewed and isinstance(args[0], cls):
            whole: ComputedWeight = args[0]
            meta = torch.empty_strided(whole.size(), whole.stride(), dtype=whole.dtype, device="meta")
            return cls(
                whole.layer, func(meta, *args[1:], **kwargs), lambda: func(whole.computed(), *args[1:], **kwargs)
            )
        args, kwargs = tree_map_only(cls, cls.computed, (args, kwargs))
        return func(*args, **kwargs)

    def numpy(self, *, force: bool = False) -> Any:
        """The numbers as a NumPy array."""
        return self.computed().numpy(force=force)

    def tolist(self) -> Any:
        """The numbers as lists."""
        return self.computed().tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.computed()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.computed().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"ComputedWeight({self.computed()!r})"


def is_dense_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module is an ``nn.Linear`` that holds its weight, unlike compressed layers."""
    return isinstance(module, nn.Linear) and not isinstance(module, ComputedLinear)


def refuse_change(layer: ComputedLinear) -> NoReturn:
    """Refuse to change the weight of a compressed layer.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        f"{layer.name}: the weight of a compressed layer is computed from its stored factors and cannot be changed; "
        "to merge an adapter or to edit weights, write the dense model with `cospadi export` and use that"
    )


def _guard(device: torch.device) -> nn.Parameter:
    guard = nn.Parameter(torch.zeros(GUARD_SHAPE, dtype=GUARD_DTYPE, device=device), False)
    guard._is_hf_initialized = True  # type: ignore[attr-defined]
    return guard

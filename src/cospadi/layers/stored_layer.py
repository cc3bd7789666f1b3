"""What all modules of compressed and pruned models have in common: frozen integers, and the guard tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from cospadi.layers.tensors import GUARD, GUARD_DTYPE, GUARD_SHAPE


class IntegerParameter(nn.Parameter):
    """A parameter of integers, which never has a gradient.

    PyTorch has no gradients of integers, and ``model.requires_grad_(True)`` raises on a plain integer parameter; here
    `requires_grad_` does nothing. Buffers would not do instead: ``DistributedDataParallel`` broadcasts them at every
    forward pass. Pickles hold a plain parameter, so that reading one needs no class of this package.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Self:
        """Wrap integers; `requires_grad`, which `nn.Parameter` takes, is ignored."""
        # of any parameter class, `.data` is a plain tensor
        return super().__new__(cls, data.data, False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Do nothing: integers have no gradient."""
        return self


def frozen_if_integers(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself, or, of integers, an `IntegerParameter` on the same memory with the same attributes."""
    if parameter.is_floating_point() or parameter.is_complex() or isinstance(parameter, IntegerParameter):
        return parameter
    frozen = IntegerParameter(parameter)
    frozen.__dict__.update(parameter.__dict__)  # such as the note of transformers that it is initialised
    return frozen


class StoredLayer(nn.Module):
    """A module whose integer parameters stay `IntegerParameter`s, however they are set, moved, loaded or unpickled."""

    def add_guard(self, device: torch.device | str | None = None) -> None:
        """Hold the one-byte tensor that makes readers without this package stop (see `cospadi.layers.tensors.GUARD`).

        Args:
            device: where; None for the device of the layer's other parameters, or the default one without any.
        """
        if self._parameters.get(GUARD) is not None:
            return
        if device is None:
            device = next((p.device for p in self.parameters(recurse=False)), None)
        self.register_parameter(GUARD, nn.Parameter(torch.zeros(GUARD_SHAPE, dtype=GUARD_DTYPE, device=device), False))

    def drop_guard(self) -> None:
        """Inverse of :meth:`add_guard`."""
        self._parameters.pop(GUARD, None)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter; of integers it becomes an `IntegerParameter`. Setting an attribute comes here too."""
        super().register_parameter(name, None if param is None else frozen_if_integers(param))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._freeze_integers()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._freeze_integers()

    def _freeze_integers(self) -> None:
        """Restore the class of parameters that PyTorch replaced by plain ones."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = frozen_if_integers(parameter)

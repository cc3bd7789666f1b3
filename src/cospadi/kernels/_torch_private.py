"""Every private hook of PyTorch that the package uses, each with a public fallback.

A hook is probed once, when this module is imported. Where it is missing or raises, its fallback is used, which is
always correct, but slower, as the table says. Others use the names below and never a private name of torch.

======================  ==============================================  ==========================================
name here               private hook                                    public fallback
======================  ==============================================  ==========================================
`tracing_state`         ``torch._C._get_tracing_state``                 `torch.jit.is_tracing`: one more call
`dispatch_modes`        ``torch._C._len_torch_dispatch_stack``          assume one: 35 µs a product (dispatcher)
`functorch_active`      ``torch._C._are_functorch_transforms_active``   assume so: 35 µs a product (dispatcher)
`tensor_version`        ``torch.Tensor._version``                       never the same: siblings compute x D apart
`is_exporting`          ``torch.compiler._is_exporting_flag``           `torch.compiler.is_exporting`, which in some
                                                                        versions is true in `torch.compile` too:
                                                                        compiled siblings compute x D apart
`at_top_level`          ``torch._dynamo.symbolic_convert``              assume not: compiled siblings compute x D
                        ``.InstructionTranslator.current_tx``           apart
======================  ==============================================  ==========================================

Tested with PyTorch 2.13.
"""

import logging
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def resolve(path: str, fallback: Callable[..., Any], *probe: Any) -> Callable[..., Any]:
    """A private function of torch, or the fallback where the function is missing or raises.

    Args:
        path: of the function, below ``torch``.
        fallback: takes the same arguments.
        probe: arguments to try the function with.
    """
    try:
        found: Callable[..., Any] = attrgetter(path)(torch)
        found(*probe)
    except Exception as error:
        logger.debug("torch.%s cannot be used (%s): using a public fallback", path, error)
        return fallback
    return found


def tracing_by_jit() -> bool | None:
    """Fallback of `tracing_state`."""
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return traced or None


def one_mode() -> int:
    """Fallback of `dispatch_modes`."""
    return 1


def always() -> bool:
    """Fallback of `functorch_active`."""
    return True


def no_version(tensor: Tensor) -> object:
    """Fallback of `tensor_version`."""
    return object()


def exporting_or_compiling() -> bool:
    """Fallback of `is_exporting`."""
    return torch.compiler.is_exporting()


def never() -> bool:
    """Fallback of `at_top_level`."""
    return False


tracing_state = resolve("_C._get_tracing_state", tracing_by_jit)
"""() → the state of `torch.jit.trace`, None where nothing is traced."""

dispatch_modes = resolve("_C._len_torch_dispatch_stack", one_mode)
"""() → how many `TorchDispatchMode`s are active."""

functorch_active = resolve("_C._are_functorch_transforms_active", always)
"""() → whether a transform of `torch.func` is active."""

_version_of = attrgetter("_version")
try:
    _version_of(torch.empty(0))
    tensor_version: Callable[[Tensor], object] = _version_of
    """(tensor) → a number that changes with every change in place."""
except AttributeError:
    tensor_version = no_version


def is_exporting() -> bool:
    """Whether `torch.export` is tracing, strictly or not."""
    # not `torch.compiler.is_exporting`, which in PyTorch 2.11 is true in `torch.compile` too
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return exporting_or_compiling() if flag is None else flag


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def at_top_level() -> bool:
    """Whether Dynamo is tracing outside any operator that takes functions, such as `torch.cond`."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.current_tracer.parent is None
    except (ImportError, AttributeError, AssertionError, TypeError):  # these internals changed, or nothing is traced
        return never()


FALLBACKS: dict[str, Callable[..., Any]] = {
    "tracing_state": tracing_by_jit,
    "dispatch_modes": one_mode,
    "functorch_active": always,
    "tensor_version": no_version,
    "is_exporting": exporting_or_compiling,
    "at_top_level": never,
}
"""The public fallback of every name of this module that stands for a private hook."""

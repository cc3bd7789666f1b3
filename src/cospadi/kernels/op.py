"""The operation of one layer, ``torch.ops.cospadi.factored_linear``, for eager, compiled and exported programs.

An operator takes only tensors, numbers and strings, so a `MatrixSpec` is passed as a short string (:func:`describe`,
:func:`parse`). It is a custom op with one kernel per device, not a `triton_op`, which cannot be compiled or exported
without a GPU driver.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed, Trellis
from cospadi.kernels import _torch_private as hooks
from cospadi.kernels.cpu import cpu_forward
from cospadi.kernels.gradients import backward as stored_backward

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROLES = ("values", "mask", "scales", "zeros")
"""Roles of stored tensors, in the order in which the operators take them."""
_GRADIENTS = ("x", "dictionary_values", "dictionary_scales", "codes_values", "codes_scales")


def describe(spec: MatrixSpec | None) -> str:
    """A spec as a short string, empty for None; :func:`parse` reads it."""
    if spec is None:
        return ""
    # Dynamo traces through the cache, but warns about it
    return _description(spec) if torch.compiler.is_compiling() else _described(spec)


def _description(spec: MatrixSpec) -> str:
    kind = ("half-" if spec.half else "") + ("symmetric" if spec.symmetric else "zeros")
    text = f"{spec.rows} {spec.columns} {spec.pattern} {spec.nonzeros} {spec.bits} {spec.group} {kind}"
    code = spec.trellis
    return text if code is None else f"{text} {code.state}-{code.inputs}x{code.outputs}"


_described = lru_cache(maxsize=4096)(_description)


@lru_cache(maxsize=4096)
def parse(text: str) -> MatrixSpec:
    """Inverse of :func:`describe` for a spec that is not None."""
    rows, columns, pattern, nonzeros, bits, group, kind, *code = text.split(" ")
    trellis = Trellis(*map(int, code[0].replace("x", "-").split("-"))) if code else None
    half, symmetric = kind.startswith("half-"), kind.endswith("symmetric")
    sizes = int(rows), int(columns), pattern, int(nonzeros), int(bits), int(group)
    return MatrixSpec(*sizes, symmetric=symmetric, half=half, trellis=trellis)


def optional_spec(text: str) -> MatrixSpec | None:
    """Inverse of :func:`describe`."""
    return parse(text) if text else None


def factored_linear(
    x: Tensor,
    dictionary: Packed | None,
    dictionary_spec: MatrixSpec | None,
    codes: Packed,
    codes_spec: MatrixSpec,
) -> Tensor:
    """``y = (x D) S`` straight from the stored tensors, without a bias.

    Differentiable in x, in 16-bit values and in scales. Under autocast x is cast to the dtype of the stored floats.

    Args:
        x: (..., d_in) float, of the dtype of the stored floats (values or scales); any strides, also empty.
        dictionary: stored tensors of Dᵀ (atoms, d_in) by role, as `cospadi.format.pack` returns them; None: identity.
        dictionary_spec: how Dᵀ is stored; None with `dictionary`.
        codes: stored tensors of Sᵀ (rows, atoms).
        codes_spec: how Sᵀ is stored.

    Returns:
        (..., rows) in the dtype of x.

    Raises:
        ValueError: if the sizes of x, dictionary and codes do not fit each other.
        TypeError: if x is not a float tensor of the stored floats' dtype.
    """
    x = checked(x, dictionary, dictionary_spec, [codes], codes_spec)
    atoms = dictionary or {}
    if x.device.type in FORWARDS and not _observed(x, atoms, codes):
        return _run(x, dictionary, dictionary_spec, codes, codes_spec)
    y: Tensor = torch.ops.cospadi.factored_linear(
        x,
        *(atoms.get(role) for role in ROLES),
        *(codes.get(role) for role in ROLES),
        describe(dictionary_spec),
        describe(codes_spec),
    )
    return y


def checked(
    x: Tensor,
    dictionary: Packed | None,
    dictionary_spec: MatrixSpec | None,
    codes: Sequence[Packed],
    codes_spec: MatrixSpec,
) -> Tensor:
    """The input x as the operators take it, cast if autocast is on. Raises the errors of `factored_linear`."""
    if (dictionary is None) != (dictionary_spec is None):
        raise ValueError("a dictionary needs its spec, and a spec its dictionary: give both or neither")
    first = codes_spec if dictionary_spec is None else dictionary_spec
    if x.shape[-1] != first.columns:
        raise ValueError(f"x has {x.shape[-1]} features, the layer reads {first.columns}")
    if dictionary_spec is not None and codes_spec.columns != dictionary_spec.rows:
        raise ValueError(f"codes read {codes_spec.columns} atoms, the dictionary has {dictionary_spec.rows}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x is {x.dtype}; a compressed layer reads a float tensor")
    for packed in (dictionary or {}, *codes):
        for role in ("values", "scales"):
            stored = packed.get(role)
            if stored is None or not stored.is_floating_point() or stored.dtype == x.dtype:
                continue
            if not torch.is_autocast_enabled(x.device.type):
                raise TypeError(
                    f"x is {x.dtype}, the layer's {role} are {stored.dtype}: cast one of them, as in model.to(x.dtype)"
                )
            x = x.to(stored.dtype)
    return x


def by_role(*tensors: Tensor | None) -> Packed | None:
    """Stored tensors, given in the order of `ROLES`, by role; None if there are no values."""
    if tensors[0] is None:
        return None
    return {role: stored for role, stored in zip(ROLES, tensors, strict=True) if stored is not None}


def _flat(x: Tensor) -> Tensor:
    # not reshape(-1, d): that is ambiguous for an empty batch
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


@torch.library.custom_op("cospadi::factored_linear", mutates_args=())
def _op(
    x: Tensor,
    dictionary_values: Tensor | None,
    dictionary_mask: Tensor | None,
    dictionary_scales: Tensor | None,
    dictionary_zeros: Tensor | None,
    codes_values: Tensor,
    codes_mask: Tensor | None,
    codes_scales: Tensor | None,
    codes_zeros: Tensor | None,
    dictionary_spec: str,
    codes_spec: str,
) -> Tensor:
    tensors = (dictionary_values, dictionary_mask, dictionary_scales, dictionary_zeros)
    stored = (codes_values, codes_mask, codes_scales, codes_zeros)
    return _owned(_run(x, by_role(*tensors), optional_spec(dictionary_spec), by_role(*stored), parse(codes_spec)))


def _run(
    x: Tensor,
    dictionary: Packed | None,
    dictionary_spec: MatrixSpec | None,
    codes: Packed | None,
    codes_spec: MatrixSpec,
) -> Tensor:
    y = FORWARDS[x.device.type](_flat(x), dictionary, dictionary_spec, codes, codes_spec)
    return y.view(*x.shape[:-1], y.shape[-1])


def _owned(y: Tensor) -> Tensor:
    """The same tensor, but no view for autograd, which forbids changes in place of views that an operator returns."""
    owned: Tensor = torch.ops.aten._unsafe_view.default(y, y.shape)
    return owned


def _cuda_forward(*arguments: Any) -> Tensor:
    from cospadi.kernels.cuda import cuda_forward  # imports Triton, which is not needed on CPU

    return cuda_forward(*arguments)


FORWARDS: dict[str, Callable[..., Tensor]] = {"cpu": cpu_forward, "cuda": _cuda_forward}
"""The implementation by device type."""


def is_traced() -> bool:
    """Whether `torch.compile`, `torch.export` or `torch.jit.trace` is tracing."""
    return torch.compiler.is_compiling() or hooks.tracing_state() is not None


def _observed(x: Tensor, dictionary: Packed, codes: Packed) -> bool:
    """Whether autograd, a compiler, an exporter, a transform or a dispatch mode has to see the operation.

    If not, it bypasses PyTorch's dispatcher, which costs about 35 µs per call.
    """
    if is_traced() or type(x) not in (Tensor, torch.nn.Parameter):
        return True
    if hooks.dispatch_modes() or hooks.functorch_active():
        return True
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(t.requires_grad for packed in (dictionary, codes) for t in packed.values())


@_op.register_kernel("cuda")
def _cuda(x: Tensor, *stored: Tensor | str | None) -> Tensor:
    tensors, (dictionary_spec, codes_spec) = cast("tuple[Tensor | None, ...]", stored[:8]), stored[8:]
    dictionary, codes = by_role(*tensors[:4]), by_role(*tensors[4:])
    return _owned(_run(x, dictionary, optional_spec(str(dictionary_spec)), codes, parse(str(codes_spec))))


@_op.register_fake
def _fake(x: Tensor, *rest: Tensor | str | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], parse(str(rest[-1])).rows))


@torch.library.custom_op("cospadi::factored_linear_backward", mutates_args=())
def _backward_op(
    gradient: Tensor,
    x: Tensor,
    dictionary_values: Tensor | None,
    dictionary_mask: Tensor | None,
    dictionary_scales: Tensor | None,
    dictionary_zeros: Tensor | None,
    codes_values: Tensor,
    codes_mask: Tensor | None,
    codes_scales: Tensor | None,
    codes_zeros: Tensor | None,
    dictionary_spec: str,
    codes_spec: str,
    needs: str,
) -> list[Tensor]:
    dictionary = by_role(dictionary_values, dictionary_mask, dictionary_scales, dictionary_zeros)
    codes = by_role(codes_values, codes_mask, codes_scales, codes_zeros)
    assert codes is not None
    spec = optional_spec(dictionary_spec)
    names = needs.split(" ")
    found = stored_backward(_flat(gradient), _flat(x), dictionary, spec, codes, parse(codes_spec), frozenset(names))
    found |= {"x": found["x"].view(x.shape)} if "x" in found else {}
    return [found[name].contiguous() for name in names]


@_backward_op.register_fake
def _backward_fake(gradient: Tensor, x: Tensor, *rest: Tensor | str | None) -> list[Tensor]:
    sources = {
        "x": x,
        "dictionary_values": rest[0],
        "dictionary_scales": rest[2],
        "codes_values": rest[4],
        "codes_scales": rest[6],
    }
    out = []
    for name in str(rest[-1]).split(" "):
        source = sources[name]
        assert isinstance(source, Tensor)
        out.append(source.new_empty(source.shape))
    return out


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-2])
    ctx.specs = inputs[-2:]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    places = (0, 1, 3, 5, 7)  # of the differentiable inputs among those of the operator
    needs = [n for n, place in zip(_GRADIENTS, places, strict=True) if ctx.needs_input_grad[place]]  # type: ignore[attr-defined]
    out: list[Tensor | None] = [None] * 11
    if needs:
        saved, specs = ctx.saved_tensors, ctx.specs  # type: ignore[attr-defined]
        found = torch.ops.cospadi.factored_linear_backward(gradient, *saved, *specs, " ".join(needs))
        for name, value in zip(needs, found, strict=True):
            out[places[_GRADIENTS.index(name)]] = value
    return tuple(out)


_op.register_autograd(_autograd, setup_context=_setup_context)

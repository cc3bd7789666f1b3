"""The base of formats that store groups of linear layers, each in a layer class of its own.

Such a format puts a module in the place of every ``nn.Linear`` of a group. The module's parameters are the stored
tensors, under the same names. A subclass of :class:`GroupedFormat` names the spec class and the layer class, and
overrides what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cospadi.checkpoint.checks import FLOATS, FileTensors, check_entry, check_finite, entry_of
from cospadi.checkpoint.formats.base import Format, S
from cospadi.checkpoint.headers import Entry
from cospadi.errors import CheckpointError, ModelError
from cospadi.format.leaves import TensorTable
from cospadi.layers import count_weights
from cospadi.layers.computed_linear import ComputedLinear, is_dense_linear
from cospadi.layers.tensors import GUARD, GUARD_DTYPE, GUARD_SHAPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def storage_dtype(model: PreTrainedModel) -> torch.dtype:
    """The 16-bit float in which a model's factors are stored: float16 for float16 models, else bfloat16."""
    return torch.float16 if model.dtype == torch.float16 else torch.bfloat16


class GroupedFormat(Format[S]):
    """A format whose description is a list of groups of linear layers.

    The spec class is a frozen dataclass with ``modules``, ``d_in``, ``d_out``, ``name``, ``bytes``, ``dense_bytes``,
    ``tensors(index, dtype)``, ``row()``, ``to_dict()`` and ``from_dict(data)``. The layer class is built by
    ``layer_type(spec, index, device=, dtype=)``, registers the tensors of ``spec.tensors(index, dtype)`` as parameters
    and ``bias`` as None, and has ``in_features``, ``out_features`` and ``dense_weight(dtype)`` (d_out, d_in). If it has
    a static method ``link``, that gets the layers of each group in order.

    Attributes:
        layer_type: the layer class.
    """

    layer_type: ClassVar[type[Any]]
    keys: ClassVar[frozenset[str]] = frozenset({"groups"})

    # What a subclass may override

    def read_group(self, data: dict[str, Any]) -> S:
        """One group of the description.

        Raises:
            ValueError: if it is impossible; KeyError, TypeError and AttributeError count as the same.
        """
        spec: S = self.spec_type.from_dict(data)
        return spec

    def tensors(self, spec: S, index: int, dtype: torch.dtype = torch.bfloat16) -> TensorTable:
        """Shape and dtype of the stored tensors of one module by parameter name, bias and guard excluded."""
        known: Any = spec
        table: TensorTable = known.tensors(index, dtype)
        return table

    def shape(self, spec: S, index: int) -> tuple[int, int]:
        """Shape (d_out, d_in) of one module's weight."""
        known: Any = spec
        return known.d_out, known.d_in

    def placed(self, layer: Any) -> tuple[S, int]:
        """Group and index of a layer."""
        return layer.spec, layer.index

    def split(self, spec: S, tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, str, Tensor]]:
        """Index, parameter name and tensor of all that the journal keeps of a group, as ``"{index}.{parameter}"``.

        Raises:
            ValueError: if a key is of another form.
        """
        for key, tensor in tensors.items():
            index, _, leaf = key.partition(".")
            yield int(index), leaf, tensor

    def check_module(self, spec: S, index: int, held: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> None:
        """Check the numbers of one module that steer reading other numbers. Checks nothing by default.

        Args:
            spec: its group, under the names on disk.
            index: of the module.
            held: tensors by parameter name.
            entries: tensors on disk by full name, to name the file; may be empty.

        Raises:
            CheckpointError: naming file (where known) and tensor.
        """

    # The description

    def read_body(self, data: Mapping[str, Any], where: str) -> tuple[S, ...]:
        """See :meth:`Format.read_body`."""
        items = data.get("groups")
        if not isinstance(items, list) or not items:
            raise CheckpointError(f"{where}: quantization_config has no groups")
        specs = []
        for number, item in enumerate(items):
            try:
                specs.append(self.read_group(item))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{where}: group {number} of quantization_config is wrong: {error}; copy the checkpoint again, or "
                    "upgrade cospadi if a later version wrote it"
                ) from None
        names = [name for spec in specs for name in spec.modules]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{where}: module {twice} belongs to two groups")
        return tuple(specs)

    def body(self, specs: Sequence[S]) -> dict[str, Any]:
        """See :meth:`Format.body`."""
        known: Sequence[Any] = specs
        return {"groups": [spec.to_dict() for spec in known]}

    def rows(self, specs: Sequence[S]) -> list[dict[str, Any]]:
        """See :meth:`Format.rows`."""
        known: Sequence[Any] = specs
        return [spec.row() for spec in known]

    # The files

    def names(self, specs: Sequence[S]) -> list[str]:
        """See :meth:`Format.names`."""
        return [
            f"{name}.{leaf}" for spec in specs for i, name in enumerate(spec.modules) for leaf in self.tensors(spec, i)
        ]

    def check_headers(self, entries: Mapping[str, Entry], specs: Sequence[S], where: Path) -> None:
        """Check that every tensor of the groups is there with its shape and dtype, and no other.

        See :meth:`Format.check_headers`.
        """
        owned: dict[str, dict[str, Entry]] = {}
        for name, entry in entries.items():
            module, _, leaf = name.rpartition(".")
            owned.setdefault(module, {})[leaf] = entry
        for number, spec in enumerate(specs):
            for index, module in enumerate(spec.modules):
                found = owned.get(module, {})
                wanted = self._wanted(spec, index, "bias" in found, number == index == 0)
                for leaf, (shape, dtypes) in wanted.items():
                    name = f"{module}.{leaf}"
                    check_entry(entry_of(entries, name, where), name, shape, dtypes, " by config.json")
                for leaf in (leaf for leaf in found if leaf not in wanted):
                    raise CheckpointError(
                        f"{found[leaf].file}: tensor {module}.{leaf} does not belong to a compressed layer"
                    )

    def _wanted(
        self, spec: S, index: int, bias: bool, guard: bool
    ) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        wanted: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            leaf: (shape, FLOATS if dtype.is_floating_point else (dtype,))
            for leaf, (shape, dtype) in self.tensors(spec, index).items()
        }
        if bias:
            wanted["bias"] = ((self.shape(spec, index)[0],), FLOATS)
        if guard:
            wanted[GUARD] = (GUARD_SHAPE, (GUARD_DTYPE,))
        return wanted

    def check_data(self, entries: Mapping[str, Entry], specs: Sequence[S]) -> None:
        """See :meth:`Format.check_data`."""
        for spec in specs:
            for index, module in enumerate(spec.modules):
                self.check_module(spec, index, FileTensors(entries, module), entries)
                check_finite(entries, module)

    # The model

    def layers(self, model: nn.Module) -> list[tuple[str, Any]]:
        """Every layer of the format with its name, in the order of the model's modules."""
        return [(name, module) for name, module in model.named_modules() if isinstance(module, self.layer_type)]

    def factors(self, layer: Any) -> dict[str, nn.Parameter]:
        """The stored tensors that a layer holds by parameter name, bias and guard excluded."""
        return {leaf: layer._parameters[leaf] for leaf in self.tensors(*self.placed(layer))}

    def replace(self, model: PreTrainedModel, specs: Sequence[S], dtype: torch.dtype | None = None) -> None:
        """Swap the groups' ``nn.Linear`` modules; biases are kept, and a group that is in place is left alone.

        The first module of the first group gets the guard tensor, so pass all groups in one call. See
        :meth:`Format.replace`.
        """
        for spec in specs:
            self._swap(model, spec, dtype or model.dtype)
        self.place_guard(model, specs)

    def _swap(self, model: PreTrainedModel, spec: S, dtype: torch.dtype) -> None:
        old = [module_of(model, name) for name in spec.modules]
        if all(isinstance(module, self.layer_type) and self.placed(module)[0] == spec for module in old):
            return
        layers = [self._built(spec, index, module, dtype) for index, module in enumerate(old)]
        link = getattr(self.layer_type, "link", None)
        if link is not None:
            link(layers)
        for name, layer in zip(spec.modules, layers, strict=True):
            _untie(model, name)
            model.set_submodule(name, layer)
        count_weights(model)
        _keep_from_casting(model)

    def _built(self, spec: S, index: int, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        name, expected = spec.modules[index], self.shape(spec, index)
        if not is_dense_linear(module):
            raise ModelError(f"{name}: a {type(module).__name__} cannot be compressed, only nn.Linear")
        if tuple(module.weight.shape) != expected:
            raise ModelError(f"{name}: the layer is {tuple(module.weight.shape)}, its group says {expected}")
        layer: nn.Module = self.layer_type(spec, index, device=module.weight.device, dtype=dtype)
        if module.bias is not None:
            layer.bias = module.bias
        return layer.train(module.training)

    def place_guard(self, model: nn.Module, specs: Sequence[S]) -> None:
        """Put the guard tensor into the first module of the first group, and into no other."""
        first = model.get_submodule(specs[0].modules[0])
        for _, layer in self.layers(model):
            if layer is not first:
                _drop_guard(layer)
        if isinstance(first, ComputedLinear):
            first.add_guard()
        elif GUARD not in first._parameters:
            guard = torch.zeros(GUARD_SHAPE, dtype=GUARD_DTYPE, device=next(first.parameters()).device)
            first.register_parameter(GUARD, nn.Parameter(guard, False))

    @torch.no_grad()
    def install(self, model: PreTrainedModel, spec: S, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`Format.install`."""
        self._swap(model, spec, model.dtype)
        layers = [module_of(model, name) for name in spec.modules]
        missing = {(i, leaf) for i, layer in enumerate(layers) for leaf in self.factors(layer)}
        for index, leaf, tensor in self.split(spec, tensors):
            if not 0 <= index < len(layers):
                raise ValueError(f"{spec.modules[0]}: {leaf} is for module {index} of {len(layers)}")
            _fill(layers[index], leaf, tensor)
            missing.discard((index, leaf))
        for index, leaf in sorted(missing):
            raise ValueError(f"{spec.modules[index]}.{leaf} is missing")

    def finish(
        self, model: PreTrainedModel, stored: Sequence[S], here: Sequence[S], entries: Mapping[str, Entry]
    ) -> None:
        """Freeze the stored tensors and check them. See :meth:`Format.finish`."""
        for old, new in zip(stored, here, strict=True):
            for index, name in enumerate(new.modules):
                layer = model.get_submodule(name)
                if isinstance(layer, ComputedLinear):
                    layer.end_loading()
                held: Mapping[str, Tensor] = self.factors(layer)
                for tensor in held.values():
                    tensor.requires_grad_(False)  # transformers 5 makes every floating-point parameter trainable
                if any(tensor.device.type == "meta" for tensor in held.values()):
                    if not entries:
                        continue
                    held = FileTensors(entries, old.modules[index])
                self.check_module(old, index, held, entries)

    def dense(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """See :meth:`Format.dense`."""
        layers = self.layers(model)
        for name, layer in layers:
            if any(parameter.device.type == "meta" for parameter in self.factors(layer).values()):
                raise ModelError(f"{name}: offloaded layers cannot be made dense; load the model without offloading")
        made = {name: _dense(layer, dtype) for name, layer in layers}
        for name, linear in made.items():
            model.set_submodule(name, linear)
        vars(model).pop(_NOT_CAST, None)

    @contextmanager
    def stored_dtypes(self, model: PreTrainedModel) -> Iterator[None]:
        """Hold the floating-point factors in the 16-bit float of the model for a while."""
        dtype = storage_dtype(model)
        kept: list[tuple[nn.Module, str, nn.Parameter]] = []
        for _, layer in self.layers(model):
            for leaf, parameter in self.factors(layer).items():
                # offloaded tensors come from their file, in the dtype they have there
                if parameter.is_floating_point() and parameter.dtype != dtype and parameter.device.type != "meta":
                    kept.append((layer, leaf, parameter))
        try:
            for layer, leaf, parameter in kept:
                layer._parameters[leaf] = nn.Parameter(parameter.detach().to(dtype), False)
            yield
        finally:
            for layer, leaf, parameter in kept:
                layer._parameters[leaf] = parameter


def module_of(model: nn.Module, name: str, kind: type[nn.Module] = nn.Module) -> Any:
    """A module by name.

    Raises:
        ModelError: if it is missing or of another kind.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{name}: the model {type(model).__name__} has no such module") from None
    if not isinstance(module, kind):
        raise ModelError(f"{name}: is a {type(module).__name__}, expected {kind.__name__}")
    return module


_NOT_CAST = "hqq_quantized"
"""What `peft.prepare_model_for_kbit_training` asks of a model that is no transformers quantizer's: with it PEFT leaves
the stored numbers in their dtype, instead of casting all of them to float32. Nothing else reads the attribute."""


def _keep_from_casting(model: nn.Module) -> None:
    setattr(model, _NOT_CAST, True)


def _drop_guard(layer: nn.Module) -> None:
    if isinstance(layer, ComputedLinear):
        layer.drop_guard()
    else:
        layer._parameters.pop(GUARD, None)


def _untie(model: PreTrainedModel, name: str) -> None:
    """A compressed head or embedding no longer shares the other's weight."""
    ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shares = [key for key, other in ties.items() if name in (key.rpartition(".")[0], other.rpartition(".")[0])]
    if not shares:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {key: other for key, other in ties.items() if key not in shares}


def _fill(layer: nn.Module, name: str, tensor: Tensor) -> None:
    parameter = layer._parameters.get(name)
    if (
        parameter is None
        or parameter.shape != tensor.shape
        or parameter.is_floating_point() != tensor.is_floating_point()
    ):
        raise ValueError(f"{name}: a tensor {tensor.dtype} {list(tensor.shape)} does not fit {layer}")
    value = tensor.to(parameter.dtype) if parameter.is_floating_point() else tensor
    if parameter.device.type == "meta":
        setattr(layer, name, nn.Parameter(value.clone(), False))
    else:
        parameter.copy_(value)


def _dense(layer: Any, dtype: torch.dtype | None) -> nn.Linear:
    weight = layer.dense_weight(dtype)
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
    linear.train(layer.training)
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None:  # a model spread over devices: the hook brings inputs to the layer's device
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(layer)
        add_hook_to_module(linear, hook)
    return linear

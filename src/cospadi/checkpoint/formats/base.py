"""What a checkpoint format is, and the registry of all formats.

A format is identified by the ``quant_method`` of its ``quantization_config``. It knows how to read and write that
description, which tensors must be on disk, how to build the modules before transformers reads the weights, and how to
turn them back into dense layers. Everything else (loading, saving, exporting, inspecting, the hooks of transformers) is
written once and asks the format.

Another package adds a format by registering it in a module that an entry point of the group ``cospadi.formats`` names:

    FORMATS.add("my_format", MyFormat())

Registration may happen while transformers is half imported. Modules of formats must therefore not import its model
classes, nor anything else of transformers, at module level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cospadi.checkpoint.headers import Entry
from cospadi.errors import CheckpointError, ModelError
from cospadi.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredPart(Protocol):
    """Description of a stored part of a model: a dataclass that names its modules."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names in the model."""
        ...


S = TypeVar("S", bound=StoredPart)


class Format(ABC, Generic[S]):
    """One stored format. Subclasses are stateless; one instance is registered.

    Attributes:
        name: the ``quant_method``, and the name in the registry.
        spec_type: class of the format's specs.
        version: the newest ``format_version``. Readers of all earlier ones stay.
        keys: keys of the description beside ``quant_method`` and ``format_version``.
        not_stock: why no stock checkpoint computes the same; empty if :meth:`dense` leaves a stock model.
    """

    name: ClassVar[str]
    spec_type: ClassVar[type[Any]]
    version: ClassVar[int] = 1
    keys: ClassVar[frozenset[str]]
    not_stock: ClassVar[str] = ""

    # The description: `quantization_config` in config.json

    def parse(self, data: Any, where: str = "config.json") -> tuple[S, ...]:
        """Specs of a ``quantization_config``.

        Args:
            data: the JSON object.
            where: file, for messages.

        Raises:
            CheckpointError: if it is of another format, of an unknown version, or impossible.
        """
        if not isinstance(data, Mapping) or data.get("quant_method") != self.name:
            raise CheckpointError(f"{where}: quantization_config is not of format {self.name}")
        version = data.get("format_version")
        if type(version) is not int or version < 1:
            raise CheckpointError(f"{where}: format_version is {version!r}")
        if version > self.version:
            raise CheckpointError(
                f"{where}: format version {version} is unknown (known: up to {self.version}); upgrade cospadi"
            )
        unknown = set(data) - {"quant_method", "format_version"} - self.keys
        if unknown:
            raise CheckpointError(f"{where}: unknown keys {sorted(unknown)} in quantization_config")
        return self.read_body(data, where)

    def describe(self, specs: Sequence[S]) -> dict[str, Any]:
        """The ``quantization_config`` of a checkpoint: all that is needed to read the tensors, and nothing else."""
        return {"quant_method": self.name, "format_version": self.version_of(specs)} | self.body(specs)

    def version_of(self, specs: Sequence[S]) -> int:
        """The ``format_version`` that is written: the oldest whose readers know everything that the specs use."""
        return self.version

    @abstractmethod
    def read_body(self, data: Mapping[str, Any], where: str) -> tuple[S, ...]:
        """The part of :meth:`parse` that differs between formats.

        Args:
            data: the description; name, version and keys are checked already.
            where: file, for messages.

        Raises:
            CheckpointError: if a value is wrong or missing.
        """

    @abstractmethod
    def body(self, specs: Sequence[S]) -> dict[str, Any]:
        """The part of :meth:`describe` that differs between formats."""

    def normalised(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """A valid description as it is kept in memory and saved again."""
        return dict(data)

    def bound(self, specs: Sequence[S]) -> dict[str, Any]:
        """The longest description that any plan of such specs may still get; for size estimates."""
        return self.describe(specs)

    def bound_names(self, specs: Sequence[S]) -> list[str]:
        """Names of all tensors that any plan of such specs may still store; for size estimates."""
        return self.names(specs)

    @abstractmethod
    def rows(self, specs: Sequence[S]) -> list[dict[str, Any]]:
        """The specs as ``cospadi inspect`` lists them: a dictionary for each, as in ``report.json``."""

    def renamed(self, spec: S, rename: Callable[[str], str]) -> S:
        """A spec under other module names."""
        changed: Any = spec
        renamed: S = replace(changed, modules=tuple(map(rename, spec.modules)))
        return renamed

    def named_as_in(self, model: PreTrainedModel, specs: tuple[S, ...]) -> tuple[S, ...]:
        """Specs under the module names of a model.

        A checkpoint of a language model may be loaded as its bare decoder (``AutoModel``), and the other way round;
        names then lack, or gain, the prefix of the decoder.

        Returns:
            the specs themselves where no such renaming helps; :meth:`replace` then names the missing module.
        """
        known = {name for name, _ in model.named_modules()}
        prefix = f"{model.base_model_prefix}."
        renamings: tuple[Callable[[str], str], ...] = (
            lambda name: name,
            lambda name: name.removeprefix(prefix),
            lambda name: prefix + name,
        )
        for rename in renamings:
            renamed = tuple(self.renamed(spec, rename) for spec in specs)
            if all(name in known or beyond(model, name) for spec in renamed for name in spec.modules):
                return renamed
        return specs

    def within(
        self, model: PreTrainedModel, stored: Sequence[S], here: Sequence[S]
    ) -> tuple[tuple[S, ...], tuple[S, ...]]:
        """Leave out what belongs to layers that a model does not have, because it was asked for fewer.

        Args:
            model: perhaps shorter than the checkpoint, as by ``from_pretrained(…, num_hidden_layers=3)``.
            stored: all specs, under the names on disk.
            here: the same under the names in the model.

        Returns:
            both, as far as the model reaches.

        Raises:
            ModelError: if nothing is left, or a spec cannot be cut.
        """
        kept: list[tuple[S, S]] = []
        for old, new in zip(stored, here, strict=True):
            inside = [index for index, name in enumerate(new.modules) if not beyond(model, name)]
            if len(inside) == len(new.modules):
                kept.append((old, new))
            elif inside:
                kept.append((self.part(old, inside), self.part(new, inside)))
        if not kept:
            raise ModelError("all compressed layers lie beyond the layers that the model was asked for: ask for more")
        return tuple(old for old, _ in kept), tuple(new for _, new in kept)

    def part(self, spec: S, kept: Sequence[int]) -> S:
        """A spec of some of its modules, where the others lie beyond the layers of the model.

        Args:
            spec: of several modules.
            kept: indices of those that stay; at least one, and not all.

        Raises:
            ModelError: if the others cannot be left out; so by default.
        """
        raise ModelError(
            f"{spec.modules[0]} is stored together with layers that the model was not asked for; format {self.name} "
            "cannot leave them out: load all layers"
        )

    # The files

    @abstractmethod
    def names(self, specs: Sequence[S]) -> list[str]:
        """Full names of the tensors that hold the format's numbers; biases of grouped layers and guards excluded."""

    @abstractmethod
    def check_headers(self, entries: Mapping[str, Entry], specs: Sequence[S], where: Path) -> None:
        """Check that every tensor of the specs is on disk with its shape and dtype.

        Args:
            entries: tensors on disk, by full name.
            specs: the description.
            where: the directory, for messages.

        Raises:
            CheckpointError: naming file and tensor.
        """

    def check_data(self, entries: Mapping[str, Entry], specs: Sequence[S]) -> None:
        """Check the numbers on disk; the headers are checked already. Checks nothing by default.

        Raises:
            CheckpointError: naming file and tensor.
        """

    # The model

    @abstractmethod
    def replace(self, model: PreTrainedModel, specs: Sequence[S], dtype: torch.dtype | None = None) -> None:
        """Swap modules for those of the format, with unset tensors, where the old ones were (``meta`` included).

        Args:
            model: changed in place.
            specs: all of them.
            dtype: of the new floating-point tensors; None for that of the model.

        Raises:
            ModelError: if a module is missing or of another kind or shape.
        """

    def install(self, model: PreTrainedModel, spec: S, tensors: Mapping[str, Tensor]) -> None:
        """Fill the modules of one spec with tensors as the journal of a run keeps them.

        Args:
            model: its modules of the spec are swapped first where they are still dense.
            spec: which modules, and how they are stored.
            tensors: by the format's own keys.

        Raises:
            ModelError: if a module does not fit the spec.
            ValueError: if a tensor is missing, unknown, or of another shape or dtype than the spec says.
        """
        raise ModelError(f"format {self.name} is not filled group by group")

    def place_guard(self, model: nn.Module, specs: Sequence[S]) -> None:
        """Put the guard tensor (docs/format.md) into a model whose modules were changed by hand. Optional."""

    def finish(
        self, model: PreTrainedModel, stored: Sequence[S], here: Sequence[S], entries: Mapping[str, Entry]
    ) -> None:
        """Do what is left once transformers has read the weights: freeze parameters, check numbers. Optional.

        Args:
            model: loaded, changed in place.
            stored: the specs under the names on disk.
            here: the same under the names in the model.
            entries: tensors on disk by full name; empty where transformers does not say which files it reads.

        Raises:
            CheckpointError: naming file (where known) and tensor.
        """

    def dense(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Swap the format's modules for ``nn.Linear`` of the weights that they stand for.

        Args:
            model: changed in place.
            dtype: of weights and biases; None for that of the stored floating-point tensors.

        Raises:
            ModelError: if a layer is offloaded to disk or to the CPU by hooks.
        """

    @contextmanager
    def stored_dtypes(self, model: PreTrainedModel) -> Iterator[None]:
        """Hold the tensors in the dtype in which they are saved for a while. Does nothing by default."""
        yield


def beyond(model: nn.Module, name: str) -> bool:
    """Whether a name belongs to a layer past the end of a model's list of layers."""
    module: Any = model
    for step in name.split("."):
        if isinstance(module, nn.ModuleList) and step.isdigit() and int(step) >= len(module):
            return True
        module = getattr(module, step, None)
    return False


FORMATS: Registry[Format[Any]] = Registry("checkpoint format", "cospadi.checkpoint.formats", "cospadi.formats")
"""Every known format by its ``quant_method``."""


def format_of(description: Any) -> Format[Any] | None:
    """The format of a ``quantization_config``.

    Args:
        description: the JSON object, the same as transformers holds it, or None.

    Returns:
        None for a stock checkpoint, and for one that another package quantised.
    """
    if isinstance(description, Mapping):
        name = description.get("quant_method")
    else:
        name = getattr(description, "quant_method", None)
    return FORMATS.all().get(name) if isinstance(name, str) else None


def format_for(specs: Any) -> Format[Any]:
    """The format that stores a spec, or a sequence of specs.

    Raises:
        ValueError: if there is no spec, no format for its type, or more than one type.
    """
    types = {type(spec) for spec in (specs if isinstance(specs, Sequence) else [specs])}
    if len(types) != 1:
        names = ", ".join(sorted(kind.__name__ for kind in types)) or "none"
        raise ValueError(f"one checkpoint stores specs of one type, not of {names}")
    (kind,) = types
    for found in FORMATS.all().values():
        if found.spec_type is kind:
            return found
    raise ValueError(f"no checkpoint format stores a {kind.__name__} (known: {', '.join(FORMATS.all())})")


def is_compressed(config: Any) -> bool:
    """Whether a configuration of transformers belongs to a checkpoint of one of the registered formats."""
    return format_of(getattr(config, "quantization_config", None)) is not None

"""Let transformers read cospadi checkpoints without ``import cospadi``.

transformers has no entry points for quantization methods: someone must register the checkpoint formats. PyTorch loads
the entry points of the group ``torch.backends`` at the end of ``import torch``; the group is meant for device back
ends. This module uses it to wait until transformers is imported, and then registers every format of the registry,
those of installed plug-ins included. Once PEFT is imported, it is taught to merge adapters into compressed layers, see
``cospadi.integrations.peft``. This module imports nothing itself and does nothing in a program without the two.

An exception in such an entry point would make ``import torch`` fail, so every step here catches all exceptions.

Off switches: ``COSPADI_AUTOLOAD=0`` for this hook alone, ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` for all hooks of the
group (``import cospadi`` then still does the same). ``import cospadi.integrations.transformers`` always registers.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The first holds the tables to fill. If it is what imported torch, it is half executed when this hook is set; the
# second is then imported later. In every case it is imported before any model is built.
_AWAITED = ("transformers.quantizers", "transformers.modeling_utils")
# The first holds the table of model types; while the second is half executed no configuration can be defined. Either
# may be what imported torch, and may be the last module that is imported.
_MODEL_TYPES = ("transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto")
_PEFT = "peft"


def autoload() -> None:
    """Register now, or as soon as transformers is imported. Never raises; may be called any number of times."""
    try:
        if os.environ.get("COSPADI_AUTOLOAD", "1") == "0" or any(isinstance(f, _Finder) for f in sys.meta_path):
            return
        quantizers, models = (sys.modules.get(name) for name in _AWAITED)
        for name in (*_MODEL_TYPES, _PEFT):
            module = sys.modules.get(name)
            if _ready(module):
                _executed(name)
            elif module is not None and module.__spec__ is not None:
                module.__spec__.__class__ = _WatchedSpec
        if _PEFT not in sys.modules:
            sys.meta_path.insert(0, _Finder((_PEFT,)))
        if not (_ready(quantizers) and _register(last_chance=_ready(models))):
            sys.meta_path.insert(0, _Finder((*_AWAITED, *_MODEL_TYPES)))
    except Exception as error:
        _complain(error)


def _ready(module: ModuleType | None) -> bool:
    """Whether a module has been executed completely."""
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _register(last_chance: bool = False) -> bool:
    """Register all formats; False if some could not be, and a later attempt may succeed."""
    try:
        from cospadi.checkpoint import FORMATS, register

        faults = FORMATS.retry()  # plug-ins of other packages, which may need more of transformers than is there yet
        register()
    except Exception as error:
        if last_chance:
            _complain(error)
        return False
    if last_chance:
        for name, why in faults.items():
            _complain(f"plug-in {name}: {why}")
    return last_chance or not faults


def _executed(name: str) -> None:
    """Do what was to be done once a module had been executed, other than registering formats."""
    if name == _PEFT:
        _extend_peft()
    else:
        _register_configurations()


def _extend_peft() -> None:
    try:
        import cospadi.integrations.peft  # noqa: F401
    except Exception as error:
        # adapters still train; merging them into compressed layers is refused, layer by layer
        logging.getLogger("cospadi").warning("adapters cannot be merged into compressed layers: %s", error)


def _register_configurations() -> None:
    try:
        from cospadi.masa.models.registration import register_configurations

        register_configurations()
    except Exception as error:
        # expected while the other module of the two is half executed; its end is another chance
        logging.getLogger("cospadi").debug("transformers will not know models with shared attention: %s", error)


def _complain(error: Exception | str) -> None:
    logging.getLogger("cospadi").warning("transformers will not read cospadi checkpoints: %s", error)


class _WatchedSpec(ModuleSpec):
    """Spec of a module that is already being executed, so that its loader can no longer be wrapped.

    The import system marks the end of the execution in the spec; that is when to register.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            _executed(self.name)


class _Finder(MetaPathFinder):
    """Find nothing itself: let the other finders find the awaited modules, and wrap their loaders."""

    def __init__(self, awaited: Sequence[str]) -> None:
        self._awaited = tuple(awaited)
        self._busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._awaited or self._busy:
            return None
        self._busy = True
        try:
            for finder in sys.meta_path:
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self)
                    return spec
        except Exception as error:
            _complain(error)
        finally:
            self._busy = False
        return None


class _Loader(Loader):
    """Run the module as its own loader would, then register."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Give the module its own loader back, for later users (pickling, resources, reload).
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if module.__name__ in (*_MODEL_TYPES, _PEFT):
            _executed(module.__name__)
            return
        if not _ready(sys.modules.get(_AWAITED[0])) and module.__name__ != _AWAITED[0]:
            return
        if _register(last_chance=module.__name__ == _AWAITED[-1]) and self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)

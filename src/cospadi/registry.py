"""Named things that the package offers and that other packages may add to: methods, pruning methods, formats.

A registry imports its own package's modules, whose decorators fill it, and then loads the entry points of a group, so
that an installed plug-in needs no import by the user.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import walk_packages
from typing import Generic, TypeVar

from cospadi.errors import RecipeError

T = TypeVar("T")


class Registry(Generic[T]):
    """Items by name.

    Args:
        kind: what an item is called in messages, for example ``"method"``.
        package: dotted name of the package whose modules register items when they are imported.
        group: entry-point group through which other packages add items; an entry names a module.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self.faults: dict[str, str] = {}
        """Entry points that could not be loaded, each with the reason."""
        self._items: dict[str, T] = {}
        self._failed: list[EntryPoint] = []
        self._loaded = self._loading = False

    def add(self, name: str, item: T) -> T:
        """Register an item under a name; an item of that name is replaced."""
        self._items[name] = item
        return item

    def all(self) -> dict[str, T]:
        """Every item by name, sorted: the package's own and those of installed plug-ins."""
        self._load()
        return dict(sorted(self._items.items()))

    def get(self, name: str) -> T:
        """An item by name.

        Raises:
            RecipeError: if there is none of that name (suggests the nearest).
        """
        known = self.all()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            faults = "".join(f"; the plug-in {entry} could not be loaded: {why}" for entry, why in self.faults.items())
            raise RecipeError(f"there is no {self.kind} {name!r}{hint} (known: {', '.join(known)}){faults}")
        return known[name]

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """Forget on exit whatever is registered inside the block."""
        self._load()
        kept = dict(self._items)
        try:
            yield
        finally:
            self._items = kept

    def retry(self) -> dict[str, str]:
        """Load again the entry points that failed, because the cause may be gone.

        Returns:
            those that still fail, with the reason.
        """
        self._load(retry=True)
        return dict(self.faults)

    def _load(self, retry: bool = False) -> None:
        if self._loading or (self._loaded and not retry):
            return
        self._loading = True  # a module that asks for another item while it is imported must not start over
        try:
            if not self._loaded:
                package = import_module(self.package)
                for module in walk_packages(package.__path__, f"{self.package}."):
                    import_module(module.name)
                self._loaded = True
                self._failed = list(entry_points(group=self.group))
            self._failed = [entry for entry in self._failed if not self._loads(entry)]
        finally:
            self._loading = False

    def _loads(self, entry: EntryPoint) -> bool:
        """Load an entry point; a broken plug-in must not take the package's own items away."""
        try:
            entry.load()
        except Exception as error:
            self.faults[entry.name] = f"{type(error).__name__}: {error}"
            return False
        self.faults.pop(entry.name, None)
        return True

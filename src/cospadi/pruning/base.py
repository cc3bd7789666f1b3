"""What a pruning method is: evidence from calibration text and a size → an edit of the model.

A method is one decorated function; its keyword-only arguments are its options::

    @depth_method("uidl", paper="arXiv 2403.17887")
    def uidl(evidence: Evidence, blocks: int, *, start: int | None = None) -> Cut: ...

The second argument is the number of blocks to remove or, of a method that removes width (``unit="share"``), the share
of the blocks' 16-bit bytes that may stay. Nothing is changed before :meth:`Edit.apply` is called.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import walk_packages
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, create_model
from torch import nn
from transformers import PreTrainedModel

from cospadi.errors import BudgetError, RecipeError
from cospadi.methods.options import checked_options
from cospadi.model_view import ModelView
from cospadi.pruning.evidence import Evidence

Unit = Literal["blocks", "share"]


class Edit(Protocol):
    """What a method decided to do with a model."""

    def apply(self, view: ModelView) -> PreTrainedModel:
        """Carry it out.

        Args:
            view: of the model that the evidence was taken from, or of a copy.

        Returns:
            the model, changed in place; plain ``save_pretrained`` writes a whole checkpoint of it.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """Plain data for the report; ``removed`` holds the indices of the removed blocks (empty if none is)."""
        ...


Solve = Callable[..., Edit]


@dataclass(frozen=True)
class DepthMethod:
    """A registered method."""

    name: str
    summary: str
    paper: str
    unit: Unit
    solve: Solve
    options: type[BaseModel]

    def check(self, options: dict[str, Any]) -> dict[str, Any]:
        """Validate options and fill in defaults.

        Raises:
            RecipeError: on an unknown option (naming the nearest) or a wrong value.
        """
        return checked_options(self.name, self.options, options)

    def remove(self, evidence: Evidence, blocks: int, options: dict[str, Any]) -> Edit:
        """Remove so many blocks.

        Raises:
            BudgetError: if the model has too few blocks, or the method removes no whole blocks.
            RecipeError: if an option is wrong, or does not fit the model.
        """
        if self.unit != "blocks":
            raise BudgetError(f"method {self.name!r} removes no whole blocks: say how much shall stay (--keep-blocks)")
        count = len(evidence.view.layers)
        if not 1 <= blocks < count:
            raise BudgetError(
                f"cannot remove {blocks} of {count} blocks: at least one must go and at least one must stay"
            )
        return self.solve(evidence, blocks, **self.check(options))

    def shrink(self, evidence: Evidence, keep: float, options: dict[str, Any]) -> Edit:
        """Keep at most a share of the blocks' 16-bit bytes: remove the fewest blocks (or the least width) for it.

        Args:
            evidence: of the model.
            keep: share, in (0, 1).
            options: of the method.

        Raises:
            BudgetError: if the share cannot be reached (names the least possible).
            RecipeError: if an option is wrong, or does not fit the model.
        """
        if not 0 < keep < 1:
            raise BudgetError(f"keep must lie between 0 and 1, not {keep:g}: it is the share of the blocks that stays")
        if self.unit == "share":
            return self.solve(evidence, keep, **self.check(options))
        sizes = [block_bytes(layer) for layer in evidence.view.layers]
        allowed = keep * sum(sizes)
        least = fewest_blocks(sizes, allowed)
        for blocks in range(least, len(sizes)):
            edit = self.remove(evidence, blocks, options)
            gone = edit.facts()["removed"]
            added = int(edit.facts().get("added_bytes", 0))
            if sum(sizes) - sum(sizes[index] for index in gone) + added <= allowed:
                return edit
        raise BudgetError(
            f"keep {keep:g} is too small for method {self.name!r} on this model: one block must stay "
            f"(keep {min(sizes) / sum(sizes):.4f})"
        )


def fewest_blocks(sizes: list[int], allowed: float) -> int:
    """How many blocks must go at least so that the others fit into `allowed` bytes, whichever they are."""
    left = sum(sizes)
    for count, size in enumerate(sorted(sizes, reverse=True)):
        if left <= allowed:
            return max(1, count)
        left -= size
    return len(sizes)


def block_bytes(module: nn.Module) -> int:
    """Bytes of the matrices of a block at 16 bits a weight; vectors (norms, biases) are not counted.

    Args:
        module: a decoder layer, or a list of them; real or on ``meta``.
    """
    return sum(2 * parameter.numel() for parameter in module.parameters() if parameter.ndim >= 2)


_METHODS: dict[str, DepthMethod] = {}


def depth_method(name: str, *, paper: str = "", unit: Unit = "blocks") -> Callable[[Solve], Solve]:
    """Register a method.

    Args:
        name: as it stands in recipes and on the command line.
        paper: citation.
        unit: of the second argument: ``"blocks"`` to remove, or ``"share"`` of the blocks' bytes that may stay.

    Returns:
        A decorator for ``solve(evidence, size, *, options…) -> Edit``; its docstring's first line is the summary.
    """

    def register(solve: Solve) -> Solve:
        parameters = inspect.signature(solve, eval_str=True).parameters
        fields: dict[str, Any] = {
            key: (parameter.annotation, parameter.default)
            for key, parameter in parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        options = create_model(f"{name}_options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
        summary = (inspect.getdoc(solve) or "").split("\n", 1)[0]
        _METHODS[name] = DepthMethod(name, summary, paper, unit, solve, options)
        return solve

    return register


@cache
def _load_all() -> None:
    package = import_module("cospadi.pruning")
    for module in walk_packages(package.__path__, "cospadi.pruning."):
        import_module(module.name)


def all_depth_methods() -> dict[str, DepthMethod]:
    """Every method by name."""
    _load_all()
    return dict(sorted(_METHODS.items()))


def get_depth_method(name: str) -> DepthMethod:
    """A method by name.

    Raises:
        RecipeError: if there is none of that name (names the nearest).
    """
    known = all_depth_methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"there is no pruning method {name!r}{hint} (known: {', '.join(known)})")
    return known[name]

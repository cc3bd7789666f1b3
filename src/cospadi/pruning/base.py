"""What a pruning method is: a function of the evidence and a size that returns an edit of the model.

A method is one decorated function. Its keyword-only arguments are its options::

    @pruning_method("uidl", paper="arXiv 2403.17887")
    def uidl(evidence: Evidence, blocks: int, *, start: int | None = None) -> Cut: ...

The second argument is the number of blocks (decoder layers) to remove or, for a method that prunes width
(``unit="share"``), the share of the blocks' 16-bit bytes to keep. The model does not change until :meth:`Edit.apply`.

Other packages add methods through the entry-point group ``cospadi.pruning``: an entry names a module, and importing the
module runs the decorators.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, create_model
from torch import nn
from transformers import PreTrainedModel

from cospadi.errors import BudgetError
from cospadi.methods.options import checked_options
from cospadi.model_view import ModelView
from cospadi.pruning.evidence import Evidence
from cospadi.registry import Registry

Unit = Literal["blocks", "share"]


class Edit(Protocol):
    """A decision about a model, ready to be carried out."""

    def apply(self, view: ModelView) -> PreTrainedModel:
        """Carry out the edit in place.

        Args:
            view: the model that the evidence was collected from, or a copy of it.

        Returns:
            The same model, pruned. Plain ``save_pretrained`` writes a complete checkpoint of it.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """Plain data for the report. ``removed`` lists the indices of the removed blocks (empty for width pruning)."""
        ...


Solve = Callable[..., Edit]


@dataclass(frozen=True)
class PruningMethod:
    """A registered pruning method.

    Attributes:
        name: the name in recipes and on the command line.
        summary: one line.
        paper: citation.
        unit: what the size counts: ``"blocks"`` to remove, or the ``"share"`` of the blocks' bytes to keep.
        text: whether it needs calibration text.
        solve: ``solve(evidence, size, **options) -> Edit``.
        options: model of the options, with their defaults.
    """

    name: str
    summary: str
    paper: str
    unit: Unit
    text: bool
    solve: Solve
    options: type[BaseModel]

    def check(self, options: dict[str, Any]) -> dict[str, Any]:
        """Validate options and fill in defaults.

        Raises:
            RecipeError: on an unknown option (suggests the nearest) or an invalid value.
        """
        return checked_options(self.name, self.options, options)

    def remove(self, evidence: Evidence, blocks: int, options: dict[str, Any]) -> Edit:
        """Remove a number of blocks.

        Raises:
            BudgetError: if the model has too few blocks, or the method does not remove whole blocks.
            RecipeError: if an option is invalid or does not fit the model.
        """
        if self.unit != "blocks":
            raise BudgetError(
                f"method {self.name!r} does not remove whole blocks: give the share to keep (--keep-blocks)"
            )
        count = len(evidence.view.layers)
        if not 1 <= blocks < count:
            raise BudgetError(f"cannot remove {blocks} of {count} blocks: remove at least one and keep at least one")
        return self.solve(evidence, blocks, **self.check(options))

    def shrink(self, evidence: Evidence, keep: float, options: dict[str, Any]) -> Edit:
        """Keep at most a share of the blocks' 16-bit bytes by removing as few blocks, or as little width, as possible.

        Args:
            evidence: of the model.
            keep: share, in (0, 1).
            options: of the method.

        Raises:
            BudgetError: if the share cannot be reached (names the smallest possible one).
            RecipeError: if an option is invalid or does not fit the model.
        """
        if not 0 < keep < 1:
            raise BudgetError(
                f"keep must lie between 0 and 1, not {keep:g}: it is the share of the blocks' bytes to keep"
            )
        if self.unit == "share":
            return self.solve(evidence, keep, **self.check(options))
        sizes = [block_bytes(layer) for layer in evidence.view.layers]
        allowed = keep * sum(sizes)
        for blocks in range(fewest_blocks(sizes, allowed), len(sizes)):
            edit = self.remove(evidence, blocks, options)
            facts = edit.facts()
            left = sum(sizes) - sum(sizes[index] for index in facts["removed"])
            if left + int(facts.get("added_bytes", 0)) <= allowed:
                return edit
        raise BudgetError(
            f"keep {keep:g} is too small for method {self.name!r} on this model: one block must stay "
            f"(keep {min(sizes) / sum(sizes):.4f})"
        )


def fewest_blocks(sizes: list[int], allowed: float) -> int:
    """The least number of blocks to remove so that the rest can fit into `allowed` bytes; at least 1."""
    left = sum(sizes)
    for count, size in enumerate(sorted(sizes, reverse=True)):
        if left <= allowed:
            return max(1, count)
        left -= size
    return len(sizes)


def block_bytes(module: nn.Module) -> int:
    """Bytes of a block's matrices at 16 bits per weight. Vectors (norms, biases) do not count.

    Args:
        module: one decoder layer or a list of them, real or on ``meta``.
    """
    return sum(2 * parameter.numel() for parameter in module.parameters() if parameter.ndim >= 2)


PRUNING: Registry[PruningMethod] = Registry("pruning method", "cospadi.pruning", "cospadi.pruning")
"""All pruning methods: those of this package and of installed plug-ins."""


def pruning_method(name: str, *, paper: str = "", unit: Unit = "blocks", text: bool = True) -> Callable[[Solve], Solve]:
    """Register a pruning method.

    Args:
        name: the name in recipes and on the command line.
        paper: citation.
        unit: what the second argument counts: ``"blocks"`` to remove, or the ``"share"`` of the blocks' bytes to keep.
        text: whether it needs calibration text; without, it must also decide on evidence that has no tokens.

    Returns:
        A decorator for ``solve(evidence, size, *, options…) -> Edit``. The first line of its docstring becomes the
        summary.
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
        PRUNING.add(name, PruningMethod(name, summary, paper, unit, text, solve, options))
        return solve

    return register


def all_pruning_methods() -> dict[str, PruningMethod]:
    """Every pruning method by name."""
    return PRUNING.all()


def get_pruning_method(name: str) -> PruningMethod:
    """A pruning method by name.

    Raises:
        RecipeError: if there is none of that name (suggests the nearest).
    """
    return PRUNING.get(name)

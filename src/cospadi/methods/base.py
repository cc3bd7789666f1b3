"""What a method is: a plan (shape and bytes → spec) and a solve (weights and statistics → factors).

A method is one decorated function; its keyword-only arguments, and those of its plan, are its options::

    @method("svd_llm", paper="arXiv 2403.07378", plan=low_rank_plan)
    def svd_llm(problem: Problem, spec: GroupSpec, *, ridge: NonNegative = 1e-6) -> Factors: ...

The type of an option says what values it may have, see `cospadi.methods.ranges`; other values are refused before
anything is read.

Third parties register theirs through the entry-point group ``cospadi.methods``: an entry names a module whose import
runs the decorators.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model
from torch import Tensor

from cospadi.errors import BudgetError, NumericalError, RecipeError
from cospadi.format import Factors, GroupSpec
from cospadi.methods.options import checked_options

Grouping = Literal["matrix", "siblings", "cross_layer", "pairs"]


@dataclass(frozen=True)
class GroupShape:
    """Names and sizes of the layers of a group, all that a plan may know."""

    modules: tuple[str, ...]
    d_in: int
    d_out: tuple[int, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes at 16 bits a weight."""
        return 2 * self.d_in * sum(self.d_out)


@dataclass(frozen=True)
class Problem:
    """What a solve gets.

    Attributes:
        name: the group's name, for messages.
        weights: W of each module, (d_in, d_out), float32 or float64.
        grams: XᵀX / tokens, (d_in, d_in) float64: one where all modules share their input, else one per module.
        mean_abs: mean |x| per input channel (d_in,), aligned with `grams`; empty if not collected.
        fisher: mean squared gradient of the loss per weight, shaped as `weights`; empty if not collected.
        seed: for every random choice.
    """

    name: str
    weights: tuple[Tensor, ...]
    grams: tuple[Tensor, ...]
    mean_abs: tuple[Tensor, ...] = ()
    fisher: tuple[Tensor, ...] = ()
    seed: int = 0

    def gram_of(self, index: int) -> Tensor:
        """Gram of one module's input."""
        return self.grams[0 if len(self.grams) == 1 else index]


Plan = Callable[..., GroupSpec]
Solve = Callable[..., Factors]


@dataclass(frozen=True)
class Method:
    """A registered method."""

    name: str
    summary: str
    paper: str
    grouping: Grouping
    plan: Plan
    solve: Solve
    options: type[BaseModel]
    needs: frozenset[str]
    compresses: bool

    def check(self, options: dict[str, Any]) -> dict[str, Any]:
        """Validate options and fill in defaults.

        Raises:
            RecipeError: on an unknown option (naming the nearest) or a wrong value.
        """
        return checked_options(
            self.name, self.options, options, {name: other.options for name, other in all_methods().items()}
        )

    def spec(self, shape: GroupShape, budget: int, options: dict[str, Any]) -> GroupSpec:
        """The largest spec of this method within `budget` bytes.

        Raises:
            BudgetError: if even the least needs more bytes.
        """
        spec = self.plan(shape, budget, **_pick(self.plan, self.check(options)))
        if spec.bytes > budget:
            raise BudgetError(
                f"{shape.modules[0]}: method {self.name!r} needs at least {spec.bytes:,} bytes "
                f"(keep {spec.bytes / shape.dense_bytes:.4f}), the budget is {budget:,}"
            )
        return spec

    def factorise(self, problem: Problem, spec: GroupSpec, options: dict[str, Any]) -> Factors:
        """Solve a problem under a spec.

        Raises:
            NumericalError: if the factors hold NaN or Inf.
        """
        factors = self.solve(problem, spec, **_pick(self.solve, self.check(options)))
        for stored in (factors.dictionary, factors.codes):
            if stored is not None and not bool(stored.matrix.isfinite().all()):
                raise NumericalError(f"{problem.name}: method {self.name!r} gave factors with NaN or Inf")
        return factors


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    plan: Plan,
    paper: str = "",
    grouping: Grouping = "matrix",
    needs: Iterable[str] = (),
    compresses: bool = True,
) -> Callable[[Solve], Solve]:
    """Register a method.

    Args:
        name: as it stands in recipes and on the command line.
        plan: ``plan(shape, budget, *, options…) -> GroupSpec``, the largest spec within `budget` bytes, or the least
            possible spec where the budget is too small.
        paper: citation.
        grouping: ``"matrix"``, ``"siblings"`` (layers with the same input share a dictionary), ``"cross_layer"`` (the
            same projection of two neighbouring decoder layers) or ``"pairs"`` (any two weights that look alike).
        needs: statistics beyond the Gram: ``"mean_abs"``, ``"fisher"``.
        compresses: False for a method whose size does not follow the budget (reports say so).

    Returns:
        A decorator for ``solve(problem, spec, *, options…) -> Factors``; its docstring's first line is the summary.
    """

    def register(solve: Solve) -> Solve:
        fields: dict[str, Any] = {}
        for function in (plan, solve):
            for key, parameter in inspect.signature(function, eval_str=True).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    fields[key] = (parameter.annotation, parameter.default)
        options = create_model(f"{name}_options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
        summary = (inspect.getdoc(solve) or "").split("\n", 1)[0]
        _METHODS[name] = Method(name, summary, paper, grouping, plan, solve, options, frozenset(needs), compresses)
        return solve

    return register


def add_method(item: Method) -> None:
    """Register a method whose plan and solve are not those of a :class:`~cospadi.format.GroupSpec`."""
    _METHODS[item.name] = item


def _pick(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    wanted = inspect.signature(function).parameters
    return {key: value for key, value in options.items() if key in wanted}


@cache
def _load_all() -> None:
    package = import_module("cospadi.methods")
    for module in iter_modules(package.__path__):
        import_module(f"cospadi.methods.{module.name}")
    for entry in entry_points(group="cospadi.methods"):
        entry.load()


def all_methods() -> dict[str, Method]:
    """Every method by name: the package's own and those of installed plug-ins."""
    _load_all()
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> Method:
    """A method by name.

    Raises:
        RecipeError: if there is none of that name (names the nearest).
    """
    known = all_methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"there is no method {name!r}{hint} (known: {', '.join(known)})")
    return known[name]

"""What a method is: a plan (shape and bytes → spec) and a solve (weights and statistics → numbers).

A method is one decorated function; its keyword-only arguments, and those of its plan, are its options::

    @method("svd_llm", paper="arXiv 2403.07378", plan=low_rank_plan, cost=low_rank_cost)
    def svd_llm(problem: Problem, spec: GroupSpec, *, ridge: NonNegative = 1e-6) -> Factors: ...

The type of an option says what values it may have, see `cospadi.methods.ranges`; other values are refused before
anything is read. The decorator also declares what the engine needs to know: how layers are grouped, how bytes are
allocated, which statistics are collected, and what a solve costs.

Third parties register theirs through the entry-point group ``cospadi.methods``: an entry names a module whose import
runs the decorators.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, create_model
from torch import Tensor

from cospadi.errors import BudgetError, NumericalError, RecipeError
from cospadi.format import GroupShape, GroupSpec, Solution, Spec
from cospadi.methods.cost import Work, factored_memory
from cospadi.methods.options import checked_options
from cospadi.registry import Registry

Grouping = Literal["matrix", "siblings", "cross_layer", "pairs", "projection"]
"""Which layers form a group: one matrix alone; ``siblings`` (the same input); ``cross_layer`` (the same projection of
two neighbouring decoder layers); ``pairs`` (any two weights that look alike); ``projection`` (the same projection of
all decoder layers)."""
Allocation = Literal["uniform", "pooled", "truncation", "rocket", "knapsack", "atoms"]
"""Who gets how many bytes; the rules are in `cospadi.engine.allocate.rules`."""


@dataclass(frozen=True)
class Problem:
    """What a solve gets.

    Attributes:
        name: the group's name, for messages.
        weights: W of each module, (d_in, d_out), float32 or float64.
        grams: XᵀX / tokens, (d_in, d_in) float64: one where all modules share it, else one per module. Tokens may be
            weighted; then modules that share nothing have a Gram each, even with one input. Empty where there was no
            calibration text, which only methods without `text` meet.
        dense_grams: one of the original model's, where `grams` are those of compressed layers' outputs; else empty.
        mean_abs: mean |x| per input channel (d_in,), aligned with `grams`; empty if not collected.
        fisher: mean squared gradient of the loss per weight, shaped as `weights`; empty if not collected.
        seed: for every random choice.
        dtype: 16-bit float in which numbers are stored, for methods that fit to what rounding leaves.
    """

    name: str
    weights: tuple[Tensor, ...]
    grams: tuple[Tensor, ...]
    mean_abs: tuple[Tensor, ...] = ()
    fisher: tuple[Tensor, ...] = ()
    dense_grams: tuple[Tensor, ...] = ()
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16

    def gram_of(self, index: int) -> Tensor:
        """Gram of one module's input."""
        return self.grams[0 if len(self.grams) == 1 else index]


Plan = Callable[..., Spec]
Solve = Callable[..., Solution]
Cost = Callable[[Any, Mapping[str, Any]], Work | None]
Memory = Callable[[Any], float]


@dataclass(frozen=True)
class Method:
    """A registered method; see :func:`method` for the fields."""

    name: str
    summary: str
    paper: str
    grouping: Grouping
    allocation: Allocation
    plan: Plan
    solve: Solve
    options: type[BaseModel]
    spec_type: type[Spec]
    text: bool
    needs: frozenset[str]
    covers: Literal["all", "attention"]
    decides: frozenset[str]
    sequential: bool | str
    gram: Literal["plain", "loss"]
    cost: Cost | None
    memory: Memory
    offers: Callable[[Mapping[str, Any]], list[Any]] | None
    by_device: Mapping[str, Mapping[str, Any]]
    wishes: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] | None

    def check(self, options: dict[str, Any]) -> dict[str, Any]:
        """Validate options and fill in defaults.

        Raises:
            RecipeError: on an unknown option (naming the nearest) or a wrong value.
        """
        return checked_options(
            self.name, self.options, options, {name: other.options for name, other in all_methods().items()}
        )

    def spec(self, shape: GroupShape, budget: int, options: dict[str, Any]) -> Spec:
        """The largest spec of this method within `budget` bytes.

        Raises:
            BudgetError: if even the least needs more bytes.
        """
        spec = self.least(shape, options, budget)
        if spec.bytes > budget:
            raise BudgetError(
                f"{shape.modules[0]}: method {self.name!r} needs at least {spec.bytes:,} bytes "
                f"(keep {spec.bytes / shape.dense_bytes:.4f}), the budget is {budget:,}"
            )
        return spec

    def least(self, shape: GroupShape, options: dict[str, Any], budget: int = 0) -> Spec:
        """The largest spec within `budget` bytes, or the least possible one where the budget is too small."""
        spec = self.plan(shape, budget, **_pick(self.plan, self.check(options)))
        return spec.solved_by(self.name)

    def factorise(self, problem: Problem, spec: Spec, options: dict[str, Any]) -> Solution:
        """Solve a problem under a spec.

        Raises:
            NumericalError: if a number is NaN or Inf.
        """
        found = self.solve(problem, spec, **_pick(self.solve, self.check(options)))
        if not found.finite:
            raise NumericalError(f"{problem.name}: method {self.name!r} returned NaN or Inf")
        return found

    def options_on(self, device: str, options: dict[str, Any]) -> dict[str, Any]:
        """Options as given, and where they leave it open what suits a type of device (``"cpu"``, ``"cuda"``)."""
        return {**self.by_device.get(device, {}), **options}

    def wants_sequential(self, options: dict[str, Any]) -> bool:
        """Whether, with these options, statistics are to be taken after the layers before are compressed."""
        if isinstance(self.sequential, str):
            return bool(self.check(options)[self.sequential])
        return self.sequential

    def work(self, spec: Spec, options: dict[str, Any]) -> Work | None:
        """What a solve takes; None: no honest guess."""
        return None if self.cost is None else self.cost(spec, self.check(options))


METHODS: Registry[Method] = Registry("method", "cospadi.methods", "cospadi.methods")


def method(
    name: str,
    *,
    plan: Plan,
    paper: str = "",
    grouping: Grouping = "matrix",
    allocation: Allocation = "uniform",
    spec: type[Spec] = GroupSpec,
    options: type[BaseModel] | None = None,
    text: bool = True,
    needs: Iterable[str] = (),
    covers: Literal["all", "attention"] = "all",
    decides: Iterable[str] = (),
    sequential: bool | str = False,
    gram: Literal["plain", "loss"] = "plain",
    cost: Cost | None = None,
    memory: Memory = factored_memory,
    offers: Callable[[Mapping[str, Any]], list[Any]] | None = None,
    by_device: Mapping[str, Mapping[str, Any]] | None = None,
    wishes: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Callable[[Solve], Solve]:
    """Register a method.

    Args:
        name: as it stands in recipes and on the command line.
        plan: ``plan(shape, budget, *, options…) -> spec``, the largest spec within `budget` bytes, or the least
            possible spec where the budget is too small.
        paper: citation.
        grouping: which layers form a group, unless the recipe says otherwise.
        allocation: who gets how many bytes, unless the recipe says otherwise.
        spec: the type of its specs.
        options: a model of its options; left out: built from the keyword-only arguments of plan and solve.
        text: whether it needs calibration text; without, it must also solve problems that have no Grams.
        needs: statistics beyond the Gram: ``"mean_abs"``, ``"fisher"``.
        covers: which linear layers it compresses where the recipe names none.
        decides: fields of the recipe that it decides itself and that users therefore must not set.
        sequential: whether each layer's statistics are taken after the layers before it are compressed, unless the
            recipe says otherwise; or the name of the option that asks for it.
        gram: whether tokens count alike in the Grams, or by how much the loss minds errors at them, unless the recipe
            says otherwise.
        cost: ``cost(spec, options) -> Work`` of one solve; None: no honest guess.
        memory: ``memory(spec) -> bytes`` that one solve holds on the device.
        offers: ``offers(options) -> representations`` that an allocation may choose from; None: the method itself.
        by_device: defaults of options on a type of device (``"cpu"``, ``"cuda"``) that differ from those of the
            signature, for what takes too long elsewhere.
        wishes: ``wishes(type of device, options) -> fields`` of the recipe that the method sets where the recipe leaves
            them open: ``sequential``, ``gram``, ``anchor``, ``anchor_share``.

    Returns:
        A decorator for ``solve(problem, spec, *, options…) -> solution``; its docstring's first line is the summary.
    """

    def register(solve: Solve) -> Solve:
        METHODS.add(
            name,
            Method(
                name=name,
                summary=(inspect.getdoc(solve) or "").split("\n", 1)[0],
                paper=paper,
                grouping=grouping,
                allocation=allocation,
                plan=plan,
                solve=solve,
                options=options or _options_of(name, plan, solve),
                spec_type=spec,
                text=text,
                needs=frozenset(needs),
                covers=covers,
                decides=frozenset(decides),
                sequential=sequential,
                gram=gram,
                cost=cost,
                memory=memory,
                offers=offers,
                by_device=by_device or {},
                wishes=wishes,
            ),
        )
        return solve

    return register


def _options_of(name: str, *functions: Callable[..., Any]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for function in functions:
        for key, parameter in inspect.signature(function, eval_str=True).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                fields[key] = (parameter.annotation, parameter.default)
    model: type[BaseModel] = create_model(
        f"{name}_options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields
    )
    return model


def _pick(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    wanted = inspect.signature(function).parameters
    return {key: value for key, value in options.items() if key in wanted}


def all_methods() -> dict[str, Method]:
    """Every method by name: the package's own and those of installed plug-ins."""
    return METHODS.all()


def get_method(name: str) -> Method:
    """A method by name.

    Raises:
        RecipeError: if there is none of that name (suggests the nearest).
    """
    return METHODS.get(name)


def refuse_decided(method: Method, given: Iterable[str]) -> None:
    """Refuse fields of a recipe that the method decides itself.

    Args:
        method: of the recipe.
        given: names of the fields that the user set.

    Raises:
        RecipeError: naming the first such field.
    """
    for name in given:
        if name in method.decides:
            raise RecipeError(f"{name} does not go with method {method.name!r}, which decides it itself: leave it out")

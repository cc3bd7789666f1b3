"""The recipe: every setting of a run, strictly validated. Importing this module does not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cospadi.aliases import canonical, canonical_bos
from cospadi.errors import BudgetError, RecipeError
from cospadi.io import expanded
from cospadi.quantities import parse_share, parse_size
from cospadi.recipe_messages import KINDS, first_problem

DEFAULT_METHOD = "auto"


def _number_of(share: Any) -> Any:
    """A share given as text as a number; anything else is left for pydantic to judge."""
    if not isinstance(share, str):
        return share
    try:
        return parse_share(share)
    except RecipeError:
        raise ValueError("it must be a share such as 0.8 or 80%") from None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``true``, which pydantic would accept as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        for kind in (int, float):
            if isinstance(value, bool) and kind in (annotation, *get_args(annotation)):
                raise PydanticCustomError(f"{kind.__name__}_type", KINDS[f"{kind.__name__}_"])
        return value


class Calibration(_Strict):
    """The text from which layer statistics are collected."""

    source: str | None = Field(
        None, description="A file or directory of text, - for standard input, or the name of a hub dataset."
    )
    samples: int = Field(256, ge=1, description="Number of sequences.")
    seq_len: int = Field(1024, ge=8, description="Tokens per sequence.")
    field: str | None = Field(
        None,
        description="Field of records that holds the text or messages; left out: text, messages, or prompt and "
        "completion.",
    )
    bos: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether sequences begin with the BOS token; auto: where the tokenizer adds it."
    )

    @field_validator("bos", mode="before")
    @classmethod
    def _bos_as_yaml_reads_it(cls, bos: Any) -> Any:
        return canonical_bos(bos) if isinstance(bos, bool) else bos


class Refine(_Strict):
    """Tuning of the factors after each decoder layer is factorised."""

    steps: int = Field(240, ge=1, description="Adam steps per decoder layer, after the learning-rate search.")
    batch: int = Field(8, ge=1, description="Sequences per step.")
    held_out: float = Field(
        0.125,
        gt=0,
        lt=1,
        description="Share of the calibration sequences held out to decide which parameters are kept.",
    )
    probe: float = Field(0.15, gt=0, le=1, description="Share of the steps spent on each learning rate that is tried.")
    patience: int = Field(4, ge=1, description="Tuning stops after this many tenths of the steps without improvement.")
    output_steps: int = Field(
        0, ge=0, description="Adam steps on all layers together afterwards, to match the original model's predictions."
    )

    @field_validator("held_out", "probe", mode="before")
    @classmethod
    def _shares_in_percent(cls, value: Any) -> Any:
        return _number_of(value)


class Prune(_Strict):
    """Removal of blocks (decoder layers), or of a share of their width, before compression."""

    method: str = Field("replaceme", description="Name of a pruning method; `cospadi prune --help` lists them.")
    blocks: int | None = Field(None, ge=1, description="Number of blocks to remove.")
    keep_blocks: float | None = Field(
        None, gt=0, lt=1, description="Instead of `blocks`: share of the blocks' 16-bit bytes to keep, between 0 and 1."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the method.")

    @field_validator("keep_blocks", mode="before")
    @classmethod
    def _keep_blocks_in_percent(cls, keep: Any) -> Any:
        return _number_of(keep)

    @model_validator(mode="after")
    def _one_size(self) -> Prune:
        if self.blocks is not None and self.keep_blocks is not None:
            raise BudgetError(
                f"blocks ({self.blocks}) and keep_blocks ({self.keep_blocks:g}) are both given: pass only one"
            )
        return self

    def require_size(self) -> None:
        """Check that the section gives a size.

        Raises:
            BudgetError: if it does not.
        """
        if self.blocks is None and self.keep_blocks is None:
            raise BudgetError("no size given: pass --blocks or --keep-blocks")


class Recipe(_Strict):
    """All settings of a compression run.

    Raises:
        RecipeError: on unknown keys (naming the nearest) or wrong values.
        BudgetError: if `keep` is not between 0 and 1, or both `keep` and `target_size` are given.
    """

    method: str = Field(DEFAULT_METHOD, description="Name of a compression method; `cospadi methods` lists them.")
    keep: float | None = Field(
        None, description="Share of the compressed linear layers' 16-bit bytes to keep, between 0 and 1."
    )
    target_size: str | None = Field(None, description="Total size of all files, such as 5GB; instead of `keep`.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the method. `num_bits` and `group_size` are accepted for `bits` and `group`.",
    )
    grouping: Literal["matrix", "siblings", "cross_layer", "pairs"] | None = Field(
        None, description="Which layers share a dictionary; default: as published for the method."
    )
    allocation: Literal["uniform", "pooled", "truncation", "rocket", "knapsack"] | None = Field(
        None, description="How bytes are divided among layers; default: as published for the method."
    )
    only: list[str] | None = Field(
        None, description="Compress only these modules: names or patterns such as q_proj, self_attn, layers.3, mlp.*."
    )
    calibration: Calibration = Field(default_factory=Calibration)
    prune: Prune | None = Field(
        None, description="Remove blocks first; `keep` still refers to the layers of the original model."
    )
    sequential: bool | None = Field(
        None,
        description="Take each layer's statistics after the layers before it are compressed; left out: what the method "
        "publishes.",
    )
    gram: Literal["plain", "loss"] | None = Field(
        None,
        description="Tokens count alike in a layer's Gram, or by how much the loss minds errors there; left out: what "
        "the method publishes.",
    )
    gram_blend: float = Field(0.2, ge=0, le=1, description="Share of the plain Gram that `gram: loss` mixes in.")
    anchor: bool | None = Field(
        None,
        description="Fit each layer to the original outputs, given inputs from the already compressed layers; left "
        "out: what suits the method.",
    )
    anchor_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the correction towards the original outputs that `anchor` applies; left out: what suits "
        "the method, else 0.5.",
    )
    refine: Refine | None = Field(
        None, description="Tune each decoder layer after it is factorised: true, or a section of settings."
    )
    drop_extra: bool = Field(
        False,
        description="Leave out stored tensors that the model's class does not take, such as multi-token prediction "
        "heads, instead of copying them.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    seed: int = Field(0, ge=0, description="Seed of every random choice.")

    @field_validator("keep", "anchor_share", mode="before")
    @classmethod
    def _shares_in_percent(cls, share: Any) -> Any:
        return _number_of(share)

    @field_validator("options")
    @classmethod
    def _canonical_names(cls, options: dict[str, Any]) -> dict[str, Any]:
        return canonical(options)

    @field_validator("keep")
    @classmethod
    def _keep_is_a_share(cls, keep: float | None) -> float | None:
        if keep is not None and not 0 < keep < 1:
            raise BudgetError(
                f"keep must lie between 0 and 1, not {keep:g}: it is the share of the linear layers' bytes to keep; "
                "to keep 80%, write 0.8 or 80%"
            )
        return keep

    @field_validator("target_size", mode="before")
    @classmethod
    def _target_is_a_size(cls, size: Any) -> Any:
        # in YAML, a plain number of bytes is an integer
        text = str(size) if isinstance(size, int) and not isinstance(size, bool) else size
        if isinstance(text, str):
            parse_size(text)
        return text

    @field_validator("only", mode="before")
    @classmethod
    def _only_with_commas(cls, only: Any) -> Any:
        patterns = only.split(",") if isinstance(only, str) else only
        if isinstance(patterns, list) and all(isinstance(item, str) for item in patterns):
            patterns = [item.strip() for item in patterns if item.strip()]
            if not patterns:
                raise ValueError("it names no module; leave it out to compress all")
        return patterns

    @field_validator("refine", mode="before")
    @classmethod
    def _refine_by_a_word(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        if self.keep is not None and self.target_size is not None:
            raise BudgetError(
                f"keep ({self.keep:g}) and target_size ({self.target_size}) are both given: pass only one"
            )
        return self

    @model_validator(mode="after")
    def _anchored_is_sequential(self) -> Recipe:
        if self.anchor and self.sequential is False:
            raise RecipeError("anchor works on compressed inputs: leave out sequential: false, or anchor")
        return self

    if not TYPE_CHECKING:  # so that editors and type checkers see the fields

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise RecipeError(first_problem(error, Recipe)) from None

    def require_budget(self) -> None:
        """Check that the recipe gives a size.

        Raises:
            BudgetError: if it does not.
        """
        if self.keep is None and self.target_size is None:
            raise BudgetError("no size given: pass --keep or --target-size")

    def given(self, *fields: str) -> list[str]:
        """Which of some optional fields are set."""
        return [field for field in fields if getattr(self, field)]

    @classmethod
    def of(cls, value: Recipe | dict[str, Any] | str | Path | None) -> Recipe:
        """A recipe from whatever functions accept: a Recipe, a dictionary, a file, or None.

        Raises:
            RecipeError: if it cannot be read, or has unknown keys or wrong values.
        """
        if value is None or isinstance(value, Recipe):
            return value or cls()
        if isinstance(value, dict):
            return cls().merged(value, source="recipe")
        if isinstance(value, (str, Path)):
            return cls.load(value)
        raise RecipeError(f"a recipe must be a Recipe, a dictionary or a file, not a {type(value).__name__}")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML recipe.

        Raises:
            RecipeError: if the file is missing, is not YAML, or has unknown keys or wrong values.
        """
        path = expanded(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"recipe {path} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path} cannot be read: {error}") from None
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where else ""
            raise RecipeError(f"recipe {path}{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
        if data is not None and not isinstance(data, dict):
            raise RecipeError(f"recipe {path} contains a {type(data).__name__}, not keys and values")
        return cls().merged(data or {}, source=f"recipe {path}")

    def merged(self, changes: dict[str, Any], source: str = "options") -> Recipe:
        """This recipe with some fields changed; nested sections are merged key by key.

        A change of `keep` replaces `target_size` and vice versa. A change of the method drops the options of the
        previous one.

        Raises:
            RecipeError: on unknown keys (naming the nearest) or wrong values.
        """
        data = self.model_dump()
        for key, other in (("keep", "target_size"), ("target_size", "keep")):
            if changes.get(key) is not None:
                data[other] = None
        if changes.get("method", self.method) != self.method:
            data["options"] = {}
        for key, value in changes.items():
            if key == "options" and isinstance(value, dict):
                value = canonical(value)
            section = data.get(key)
            data[key] = {**section, **value} if isinstance(section, dict) and isinstance(value, dict) else value
        try:
            return Recipe(**{str(key): value for key, value in data.items()})
        except RecipeError as error:
            raise RecipeError(f"{source}: {error}") from None

    def to_yaml(self) -> str:
        """The recipe as YAML, without fields that are None."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)


def with_prune(
    recipe: Recipe,
    method: str | None = None,
    blocks: int | None = None,
    keep_blocks: float | None = None,
    options: dict[str, Any] | None = None,
) -> Recipe:
    """A recipe with changes to its section ``prune``; changing the method drops the options of the previous one.

    Raises:
        RecipeError: on wrong values.
    """
    section = (recipe.prune or Prune()).model_dump()
    if method is not None and method != section["method"]:
        section |= {"method": method, "options": {}}
    if blocks is not None or keep_blocks is not None:
        section |= {"blocks": blocks, "keep_blocks": keep_blocks}
    section["options"] = section["options"] | (options or {})
    return recipe.model_copy(update={"prune": None}).merged({"prune": section})


def json_schema() -> str:
    """The JSON schema of recipes, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=2)

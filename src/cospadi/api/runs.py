"""`compress`, `prune` and `estimate`: options, progress, the run, and the pages beside its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import TextSource
from cospadi.engine import compress as compression
from cospadi.engine import prune as pruning
from cospadi.engine.compress import Result
from cospadi.engine.estimate import estimate as estimation
from cospadi.engine.estimate.estimate import Estimate
from cospadi.engine.inputs import given_text
from cospadi.engine.prune import PruneResult
from cospadi.io import expanded
from cospadi.recipe import Recipe
from cospadi.report import pages_written, write_all
from cospadi.report.depth import write_depth
from cospadi.report.progress import ProgressOption, showing

Model = str | os.PathLike[str] | PreTrainedModel
Tokenizer = PreTrainedTokenizerBase | str | os.PathLike[str] | None
AnyRecipe = Recipe | dict[str, Any] | str | Path | None
Grouping = Literal["matrix", "siblings", "cross_layer", "pairs"]
Allocation = Literal["uniform", "pooled", "truncation", "rocket", "knapsack"]
Gram = Literal["plain", "loss"]
Bos = Literal["auto", "on", "off"]

_NO_OPTIONS = ("model", "out", "tokenizer", "recipe", "calibration", "fresh", "progress", "command", "rehearse", "more")


def compress(
    model: Model,
    out: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer = None,
    keep: float | str | None = None,
    target_size: str | int | None = None,
    method: str | None = None,
    recipe: AnyRecipe = None,
    options: dict[str, Any] | None = None,
    grouping: Grouping | None = None,
    allocation: Allocation | None = None,
    only: str | Sequence[str] | None = None,
    prune: dict[str, Any] | None = None,
    sequential: bool | None = None,
    gram: Gram | None = None,
    gram_blend: float | None = None,
    anchor: bool | None = None,
    anchor_share: float | str | None = None,
    refine: bool | dict[str, Any] | None = None,
    drop_extra: bool | None = None,
    calibration: TextSource | dict[str, Any] | None = None,
    text_field: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    bos: Bos | None = None,
    device: Any = None,
    seed: int | None = None,
    fresh: bool = False,
    progress: ProgressOption = "auto",
    command: str = "",
    **more: Any,
) -> Result:
    """Compress a model into a directory that ``from_pretrained`` loads.

    The arguments are the options of `cospadi compress`; left out, they are the recipe's, else the defaults. The same
    call after an interruption resumes where it stopped and writes the same bytes.

    Args:
        model: local directory, hub id, or a transformers model. The run works on a copy: a model in memory stays as it
            is.
        out: output directory: new, empty, or of the same run.
        tokenizer: of a model in memory: the tokenizer, or where to read it.
        keep: share of the linear layers' 16-bit bytes to keep, such as 0.6 or ``"60%"``.
        target_size: total size of all files, such as ``"5GB"``; instead of `keep`.
        method: name of a compression method.
        recipe: a recipe, its keys and values, or the path of one; the other arguments override it.
        options: options of the method; each can also be an argument of its own, such as ``bits=4``.
        grouping: which layers share a dictionary.
        allocation: how bytes are divided among layers.
        only: compress only these modules: names or patterns, such as ``["q_proj", "mlp.*"]``.
        prune: remove blocks first: the section ``prune`` of a recipe.
        sequential: take each layer's statistics after the layers before it are compressed.
        gram: tokens count alike in a layer's statistics (``plain``), or by how much the loss minds errors there
            (``loss``).
        gram_blend: share of the plain statistics that ``gram="loss"`` mixes in.
        anchor: fit each layer to the original outputs, given inputs from the already compressed layers.
        anchor_share: share of that correction to apply.
        refine: tune each decoder layer after it is factorised: True, or a section of settings.
        drop_extra: leave out stored tensors that the model's class does not take, instead of copying them.
        calibration: the text: a file, a directory, a hub data set, or documents in memory such as a list, a generator
            or a ``Dataset``; or the section ``calibration`` of a recipe. Not needed where nothing reads it.
        text_field: field of the records that holds the text or messages; left out: ``text``, ``messages``, or
            ``prompt`` and ``completion``.
        samples: number of calibration sequences.
        seq_len: tokens per calibration sequence.
        bos: whether sequences begin with the BOS token: ``auto`` (where the tokenizer adds it), ``on`` or ``off``.
        device: where to compute: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: of every random choice.
        fresh: forget an earlier run in `out`.
        progress: ``"auto"``: a bar on a terminal or in a notebook, nothing elsewhere; True: also plain lines elsewhere;
            False: nothing; or a function called with (phase, done, total, detail, error so far).
        command: the command line, for the report.
        **more: options of the method.

    Returns:
        paths, sizes and errors.

    Raises:
        CospadiError: see `cospadi.errors`; the message names cause and remedy.
    """
    given = _options(locals(), more)
    with showing(progress) as reporting:
        result = compression.compress(
            model,
            expanded(out),
            tokenizer=tokenizer,
            calibration=calibration,
            recipe=recipe,
            fresh=fresh,
            progress=reporting,
            command=command,
            **given,
        )
    # A run interrupted between its last weight and its last page is complete except for the pages.
    if not result.complete or not pages_written(result.out):
        write_all(result.report, result.out)
    return result


def prune(
    model: Model,
    out: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer = None,
    method: str | None = None,
    blocks: int | None = None,
    keep_blocks: float | str | None = None,
    recipe: AnyRecipe = None,
    options: dict[str, Any] | None = None,
    drop_extra: bool | None = None,
    calibration: TextSource | dict[str, Any] | None = None,
    text_field: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    bos: Bos | None = None,
    device: Any = None,
    seed: int | None = None,
    fresh: bool = False,
    progress: ProgressOption = "auto",
    command: str = "",
    **more: Any,
) -> PruneResult:
    """Remove blocks (or width) from a model, without retraining.

    The arguments are the options of `cospadi prune`. What comes out is a checkpoint of the original architecture that
    loads without this package, unless the method or an option of it says otherwise. An interrupted run leaves no
    checkpoint; the same call does it again.

    Args:
        model: local directory, hub id, or a transformers model, which stays as it is.
        out: output directory: new, empty, or of the same run.
        tokenizer: of a model in memory: the tokenizer, or where to read it.
        method: name of a pruning method.
        blocks: number of blocks (decoder layers) to remove.
        keep_blocks: instead: share of the blocks' 16-bit bytes to keep, such as 0.75 or ``"75%"``.
        recipe: a recipe, its keys and values, or the path of one, with a section ``prune``; the other arguments
            override it.
        options: options of the method; each can also be an argument of its own, such as ``merge=4``.
        drop_extra: leave out stored tensors that the model's class does not take, instead of copying them.
        calibration: the text: a file, a directory, a hub data set, or documents in memory such as a list, a generator
            or a ``Dataset``; or the section ``calibration`` of a recipe. Not needed where nothing reads it.
        text_field: field of the records that holds the text or messages; left out: ``text``, ``messages``, or
            ``prompt`` and ``completion``.
        samples: number of calibration sequences.
        seq_len: tokens per calibration sequence.
        bos: whether sequences begin with the BOS token: ``auto`` (where the tokenizer adds it), ``on`` or ``off``.
        device: where to compute: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: of every random choice.
        fresh: forget an earlier run in `out`.
        progress: as for :func:`cospadi.compress`.
        command: the command line, for the report.
        **more: options of the method.

    Returns:
        paths, sizes, and what was cut.

    Raises:
        CospadiError: see `cospadi.errors`; the message names cause and remedy.
    """
    given = _options(locals(), more)
    with showing(progress) as reporting:
        result = pruning.prune(
            model,
            expanded(out),
            tokenizer=tokenizer,
            calibration=calibration,
            recipe=recipe,
            fresh=fresh,
            progress=reporting,
            command=command,
            **given,
        )
    if not result.complete or not pages_written(result.out):
        write_depth(result.report, result.out)
    return result


def estimate(
    model: Model,
    recipe: AnyRecipe = None,
    *,
    keep: float | str | None = None,
    target_size: str | int | None = None,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    grouping: Grouping | None = None,
    allocation: Allocation | None = None,
    only: str | Sequence[str] | None = None,
    prune: dict[str, Any] | None = None,
    sequential: bool | None = None,
    gram: Gram | None = None,
    gram_blend: float | None = None,
    anchor: bool | None = None,
    anchor_share: float | str | None = None,
    refine: bool | dict[str, Any] | None = None,
    drop_extra: bool | None = None,
    calibration: TextSource | dict[str, Any] | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    device: Any = None,
    rehearse: bool = False,
    **more: Any,
) -> Estimate:
    """Sizes, layer table, memory and time, from the configuration alone: no weights are read.

    Args:
        model: local directory, hub id, or a transformers model.
        recipe: as for :func:`cospadi.compress`, like all other arguments.
        keep: share of the linear layers' 16-bit bytes to keep.
        target_size: total size of all files; instead of `keep`.
        method: name of a compression method.
        options: options of the method.
        grouping: which layers share a dictionary.
        allocation: how bytes are divided among layers.
        only: compress only these modules.
        prune: remove blocks first.
        sequential: take each layer's statistics after the layers before it are compressed.
        gram: tokens count alike in a layer's statistics (``plain``), or by how much the loss minds errors there
            (``loss``).
        gram_blend: share of the plain statistics that ``gram="loss"`` mixes in.
        anchor: fit each layer to the original outputs.
        anchor_share: share of that correction to apply.
        refine: tune each decoder layer after it is factorised.
        drop_extra: leave out stored tensors that the model's class does not take; with `rehearse`.
        calibration: the text, or the section ``calibration`` of a recipe; the text is not read.
        samples: number of calibration sequences.
        seq_len: tokens per calibration sequence.
        device: where the run would compute.
        rehearse: also save and open a result without content, and look at the headers of the weights that are here, as
            a run does before its work.
        **more: options of the method, and whatever else :func:`cospadi.compress` takes from a recipe.

    Raises:
        ModelError: if there is no configuration, or the architecture is not supported.
        BudgetError: if the size cannot be reached, or none is asked for.
        RecipeError: if the method or one of its options does not exist, or is out of range.
        CalibrationError: if the model has no positions for sequences of that length.
    """
    given = _options(locals(), more)
    return estimation.estimate(model, recipe, calibration=given_text(calibration)[1], rehearse=rehearse, **given)


def _options(arguments: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The options among a function's arguments, so that their names stand in its signature alone."""
    return {key: value for key, value in arguments.items() if key not in _NO_OPTIONS} | more

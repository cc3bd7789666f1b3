"""Load a checkpoint of any format, or a stock one, and refuse it if anything is missing or damaged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from cospadi.checkpoint.checksums import check_checksums, has_checksums
from cospadi.checkpoint.extra_file import extra_names
from cospadi.checkpoint.formats.base import beyond, format_of
from cospadi.checkpoint.headers import read_directory, read_json
from cospadi.checkpoint.hooks import register
from cospadi.checkpoint.validate import validate
from cospadi.errors import CheckpointError, CospadiError, ModelError, ResourceError
from cospadi.io import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
    checksums: bool = True,
    compose: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint of any registered format, or a stock one as it is.

    Unlike plain ``from_pretrained`` this refuses a checkpoint in which a weight is missing, has another shape, or
    belongs to no module.

    Args:
        path: directory, or the id of a repository on the hub.
        dtype: ``"auto"`` for that of the checkpoint, or the floating-point dtype to compute in.
        device_map: as transformers takes it.
        revision: of a repository on the hub.
        checksums: compare the weight files with ``SHA256SUMS`` if that file is there; about a second for 1.5 GB.
        compose: compute the weights once and return an ordinary dense model, as large as the original; formats
            without a stock form are loaded as they are. Otherwise the model stays small.
        **kwargs: passed on to ``from_pretrained``.

    Returns:
        the model, in evaluation mode; stored factors are frozen.

    Raises:
        CheckpointError: if the checkpoint is absent or damaged; names file and tensor.
        ModelError: if `compose` is asked of offloaded layers.
        ResourceError: if there is not enough memory.
    """
    directory = _locate(path, revision)
    config = read_json(directory / "config.json")
    stored, shorter = format_of(config.get("quantization_config")), bool(kwargs)
    if stored is None:
        read_directory(directory)
    else:
        validate(directory, deep=False)  # the numbers are checked on the loaded tensors
        register()
    try:
        kind, kwargs = _model_class(directory, kwargs)
        model, info = kind.from_pretrained(
            directory,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **kwargs,
        )
    except CospadiError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"{directory}: not enough memory to load the model: {_first_line(error)}") from error
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: cannot be loaded: {_first_line(error)}") from error
    extra = extra_names(directory)
    for kind in ("missing", "mismatched", "unexpected"):
        names = sorted(str(name) for name in info.get(f"{kind}_keys") or ())
        if shorter:  # fewer layers may have been asked for
            names = [name for name in names if not beyond(model, name)]
        if kind == "unexpected":
            names = [] if stored is None else [name for name in names if name not in extra]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{directory}: {kind} tensor {names[0]}{more}; copy the checkpoint again")
    if checksums and (stored is not None or has_checksums(directory)):
        check_checksums(directory)  # last: the checks above name the tensor
    if compose and stored is not None and not stored.not_stock and getattr(model, "hf_quantizer", None) is not None:
        model.dequantize(dtype=model.dtype)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _locate(path: str | Path, revision: str | None) -> Path:
    directory = expanded(path)
    if directory.is_dir():
        return directory
    if isinstance(path, Path) or path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise CheckpointError(f"{path}: there is no such directory")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: neither a directory nor a readable repository on the hub: {_first_line(error)}"
        ) from error


def _model_class(directory: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of a checkpoint, and options for it with the configuration that its model type names.

    A class may serve several model types, by which transformers renames tensors; left to itself, it would read the
    configuration as that of its own type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from cospadi.model_view import model_class  # like all of transformers' model classes, not at import time

    config, rest = AutoConfig.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False, return_unused_kwargs=True, **options
    )
    try:
        found, config = model_class(config)
    except ModelError:  # transformers says what it is
        return AutoModelForCausalLM, options
    return found, rest | {"config": config}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

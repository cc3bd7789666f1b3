"""Open models from a local directory, without any network, or from a hub id. Failures become one clear line."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cospadi.errors import CospadiError, ModelError
from cospadi.model_view.sources import directory_name, refuse_adapter
from cospadi.runtime.memory import guard_memory

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_LONGEST_CAUSE = 240
HUB_TIMEOUT = 5.0
"""Seconds to wait for a hub that does not answer."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def source_name(source: str | Path) -> str:
    """A model's directory or hub id as text.

    Raises:
        ModelError: if it is something else, such as a model in memory.
    """
    if not isinstance(source, (str, Path)):
        raise ModelError(
            f"expected the directory or hub id of a model, not a {type(source).__name__}: save the model with its "
            "tokenizer, and name that directory"
        )
    return str(source)


def model_name(source: str | Path) -> str:
    """What reports call a model: its hub id, or the name of its directory."""
    folder = Path(source_name(source)).expanduser()
    # "." resolves to its directory's name, and a symbolic link keeps its own
    return directory_name(Path(os.path.abspath(folder))) if _is_folder(folder) else str(source)  # noqa: PTH100


def open_config(source: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """Read the configuration of a causal language model.

    Args:
        source: a local directory, or a hub id.
        revision: of a hub id.

    Returns:
        the configuration; no weights are read.

    Raises:
        ModelError: if there is none, if it cannot be read, or if it is not of a decoder-only language model.
    """
    options = _where(source, revision)
    with _explained(source, "cannot read its config.json"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(**options)
    found = ", ".join(getattr(config, "architectures", None) or []) or type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source}: {found} is an encoder-decoder model; only decoder-only models are supported")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"{source}: {found} (model type {config.model_type!r}) is not a causal language model "
            "that transformers knows"
        )
    return config


def open_tokenizer(source: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Read the tokenizer stored beside a model.

    Raises:
        ModelError: if there is none or it cannot be read.
    """
    options = _where(source, revision)
    if _is_directory(options) and not any(_inside(options, name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{source}: has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); copy the model's there")
    with _explained(source, "its tokenizer cannot be read"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**options)
    return tokenizer


def open_model(source: str | Path, *, revision: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer onto the CPU, in the dtype of the checkpoint, in eval mode.

    Local directories are read without any network. Code in the checkpoint is never run, and pickled weights are never
    opened.

    Args:
        source: a local directory, or a hub id.
        revision: branch, tag or commit of a hub id.

    Returns:
        model and tokenizer.

    Raises:
        ModelError: if anything is missing, unreadable or unsupported, or if the weights do not cover the model.
        ResourceError: if there is not enough memory.
    """
    config = open_config(source, revision=revision)
    tokenizer = open_tokenizer(source, revision=revision)
    _check_quantisation(source, config)
    options = _where(source, revision)
    if _is_directory(options):
        _check_files(_inside(options))
    remedy = "use a machine with more memory"
    with _explained(source, "cannot read its weights"), guard_memory(f"loading {source}", remedy):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **options,
            config=config,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # checked below, with a clearer message
        )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    _check_loaded(source, info)
    model.train(False)
    return model, tokenizer


def _check_loaded(source: str | Path, info: dict[str, Any]) -> None:
    # transformers fills missing and misshapen weights with random numbers, which no command can use
    wrong = sorted(info.get("mismatched_keys", ()))
    if wrong:
        name, there, expected = wrong[0]
        raise ModelError(
            f"{source}: {len(wrong)} weights do not have the shape that config.json says "
            f"(first: {name} is {tuple(there)}, not {tuple(expected)}); config.json belongs to another model"
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{source}: {len(missing)} weights are missing (first: {missing[0]}); the checkpoint is incomplete, or "
            "config.json belongs to another model"
        )
    spare = sorted(info.get("unexpected_keys", ()))
    if spare:  # extra heads are common and harmless, cut layers are not: the user must judge
        warnings.warn(
            f"{source}: {len(spare)} stored weights are not part of the model (first: {spare[0]})", stacklevel=3
        )


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A model on ``meta``: all shapes, no memory. Takes seconds for any size.

    Args:
        config: of a causal language model.

    Raises:
        ModelError: if transformers cannot build it.
    """
    with _explained(type(config).__name__, "cannot build the model"), torch.device("meta"):
        build: Any = AutoModelForCausalLM.from_config
        model: PreTrainedModel = build(config, trust_remote_code=False)
    model.train(False)
    return model


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # for example a name that is too long
        raise ModelError(f"{str(path)[:40]}…: there is no such directory ({error.strerror})") from None


def _where(source: str | Path, revision: str | None) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` for a source."""
    path = Path(source_name(source)).expanduser()
    if _is_folder(path):
        refuse_adapter(path)
        if not (path / "config.json").is_file():
            raise ModelError(f"{source}: the directory has no config.json, so it is not a model")
        return {
            "pretrained_model_name_or_path": str(path),
            "local_files_only": True,
            "trust_remote_code": False,
        }
    if path.exists():
        raise ModelError(f"{source}: is a file; give the directory that holds config.json and the weights")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise ModelError(f"{source}: there is no such directory")
    kept = _kept(source, revision or "main")
    if kept is not None:
        return {"pretrained_model_name_or_path": kept, "local_files_only": True, "trust_remote_code": False}
    return {"pretrained_model_name_or_path": source, "revision": revision or "main", "trust_remote_code": False}


@cache
def _kept(name: str, revision: str) -> str | None:
    """Ask the hub for a model, once and with a short timeout: transformers would try for half a minute.

    Returns:
        None if the hub has it; if the hub cannot be reached or must not be asked, the model's directory in the local
        cache.

    Raises:
        ModelError: if there is no such model, or it cannot be fetched.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE switches the hub off"
    else:
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=HUB_TIMEOUT)
            return None
        except GatedRepoError:
            raise ModelError(f"{name}: the hub wants you to accept its licence and log in (`hf auth login`)") from None
        except RevisionNotFoundError:
            raise ModelError(f"{name}: the hub has no revision {revision!r} of it") from None
        except RepositoryNotFoundError:
            raise ModelError(
                f"{name}: there is no such directory, and no such model on the hub (or it is private: `hf auth login`)"
            ) from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if 400 <= status < 500:
                raise ModelError(f"{name}: the hub's model has no readable config.json (HTTP {status})") from None
            why = f"the hub does not answer (HTTP {status})"
        except Exception as error:  # whatever the HTTP library of the installed version raises
            why = f"the hub cannot be reached ({type(error).__name__})"
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(config, str):
        return str(Path(config).parent)  # given the name, parts of transformers would still ask the hub
    raise ModelError(
        f"{name}: is neither a local directory nor a hub model that can be reached ({why}); check the name"
    )


def _is_directory(options: dict[str, Any]) -> bool:
    """Whether `_where` found a local directory rather than a hub id."""
    return Path(options["pretrained_model_name_or_path"]).is_dir()


def _inside(options: dict[str, Any], name: str = "") -> Path:
    """The local directory of `_where`, or a file in it."""
    return Path(options["pretrained_model_name_or_path"], name)


def _check_files(directory: Path) -> None:
    """Name missing or truncated weight files, before transformers does at length."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{directory}: {index.name} cannot be read ({error})") from None
    elif not (directory / names[0]).is_file():
        pickled = any(directory.glob("*.bin"))
        hint = "; it has pickled weights, which are not opened: convert them to safetensors first" if pickled else ""
        raise ModelError(f"{directory}: there are no weights (model.safetensors){hint}")
    for name in names:
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise ModelError(f"{directory}: the weight file {name} of its index is missing")
        _check_length(path)


def _check_length(path: Path) -> None:
    """Compare the size of a safetensors file with its header."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("its header is truncated")
            header = json.loads(file.read(length))
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from None
    if size != 8 + length + end:
        raise ModelError(f"{path}: has {size:,} bytes, its header says {8 + length + end:,}; copy or download it again")


def _check_quantisation(source: str | Path, config: PreTrainedConfig) -> None:
    """Refuse a format that transformers does not know: it would build dense layers with random weights."""
    from transformers.quantizers.auto import AutoHfQuantizer

    known: Any = AutoHfQuantizer.supports_quant_method
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and "quant_method" in stored and not known(stored):
        raise ModelError(
            f"{source}: transformers does not know its format {stored['quant_method']!r}; import the package that "
            "wrote it first (`import cospadi` for its own formats), or upgrade it"
        )


@contextmanager
def _explained(source: str | Path, what: str) -> Iterator[None]:
    """Turn whatever transformers, safetensors or the hub raise into one line."""
    try:
        yield
    except (CospadiError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            cause = "it needs code from the checkpoint, which is never run"
        elif unknown := re.search(r"model type `([^`]+)` but Transformers", text):
            cause = (
                f"the installed transformers ({transformers.__version__}) knows no architecture {unknown[1]!r}; "
                "upgrade it if the model is newer"
            )
        elif isinstance(error, SafetensorError):
            cause = f"a safetensors file is damaged: {_one_line(text)}"
        elif not Path(source).expanduser().exists() and isinstance(error, OSError):
            cause = "it is neither a local directory nor a hub model that can be reached"
        else:
            cause = _one_line(text) or type(error).__name__
        raise ModelError(f"{source}: {what}: {cause}") from error


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_CAUSE else line[: _LONGEST_CAUSE - 1] + "…"

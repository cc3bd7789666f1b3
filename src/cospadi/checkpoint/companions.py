"""Files that belong to a model beside its weights and its configuration: licences, processors, templates, pooling.

Every path that writes a checkpoint copies them from the model's directory, byte for byte, by an allow list. Code and
pickles are never on it; where a configuration names code (``auto_map``), that entry is removed, since the code does not
come along and would be missed by whoever loads the result with ``trust_remote_code=True``.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from cospadi.io import expanded

LARGEST_TEXT = 64 * 2**20
LARGEST_WEIGHTS = 2**30
"""Bytes of the largest file that is copied: one that people or parsers read; the weights of a pooling module."""

_WORDS = r"licen[cs]es?|notices?|copying|copyright|attributions?|(acceptable[-_ ])?use[-_ ]policy|terms[-_ ]of[-_ ]use"
_LEGAL = re.compile(rf"(.*[-_ .])?({_WORDS})([-_ .].*)?", re.IGNORECASE)
_LEGAL_SUFFIX = re.compile(r"(\.(txt|md|rst|pdf|html)|\.\d+)?", re.IGNORECASE)
_OF_THE_MODEL = (
    "generation_config.json",
    "*processor_config.json",
    "image_processor*.json",
    "feature_extract*.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
)
_OF_THE_TOKENIZER = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Vocabularies that other programs read; transformers may write them itself."""
_OF_A_MODULE = ("*.json", "*.txt", "*.safetensors")
"""Files in the directories that ``modules.json`` of sentence-transformers lists."""
_MODULE_FOLDER = re.compile(r"\w[\w.-]*")
_ON_THE_HUB = (
    *_OF_THE_MODEL,
    *_OF_THE_TOKENIZER,
    *(f"[0-9]_*/{pattern}" for pattern in _OF_A_MODULE),
    *(f"*{word}*" for word in ("LICEN[CS]E", "Licen[cs]e", "licen[cs]e", "NOTICE", "Notice", "COPYING", "POLICY")),
)
_NAMES_CODE = ("auto_map", "custom_pipelines")


def copy_companions(source: str | Path, folder: Path) -> list[str]:
    """Copy what belongs to a model into a checkpoint, and remove from the checkpoint what names code.

    Args:
        source: the model's directory, or its hub id, whose files are taken from the local cache
            (:func:`fetch_companions`); empty for a model without one.
        folder: of the checkpoint; what is written there already (configuration, tokenizer) stays.

    Returns:
        names of the copied files, relative to `folder`. A file that is too large or lies outside the model's directory
        is left out, with a warning.
    """
    origin = _directory(source)
    copied = []
    for name in [] if origin is None or origin.resolve() == folder.resolve() else sorted(_found(origin)):
        assert origin is not None
        target = folder / name
        file = None if target.exists() else _readable(origin, name)
        if file is not None:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
            copied.append(name)
    for path in folder.rglob("*config.json"):
        _drop_code(path)
    return copied


def remove_companions(folder: Path, names: Any) -> None:
    """Remove files that :func:`copy_companions` put into a checkpoint, and nothing else.

    Args:
        folder: of the checkpoint.
        names: as it returned them; they may come from a damaged file.
    """
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    modules = {name.partition("/")[0] for name in listed if "/" in name}
    for name in listed:
        if _allowed(name, modules):
            (folder / name).unlink(missing_ok=True)
    for module in modules:
        place = folder / module
        if _MODULE_FOLDER.fullmatch(module) and place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def fetch_companions(source: str) -> None:
    """Bring the companions of a hub model into the local cache, while the hub is there.

    What cannot be fetched is a warning: the model itself is there.

    Args:
        source: hub id of a model that was just fetched; a directory needs nothing.
    """
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE or not source or expanded(source).is_dir():
        return
    try:
        snapshot_download(source, allow_patterns=list(_ON_THE_HUB))
    except Exception as error:  # whatever the HTTP library of the installed version raises
        warnings.warn(
            f"{source}: its licence and other files beside the weights cannot be fetched ({type(error).__name__}); "
            "copy them yourself",
            stacklevel=2,
        )


def _directory(source: str | Path) -> Path | None:
    """The directory of a model; None if there is none on this machine."""
    if not str(source):
        return None
    folder = expanded(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(str(source), "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _found(origin: Path) -> Iterator[str]:
    """Names of the companions of a model, relative to its directory, with slashes."""
    modules = _module_folders(origin)
    for place in (origin, *(origin / name for name in {*modules, "additional_chat_templates"})):
        for path in place.iterdir() if place.is_dir() else ():
            name = path.relative_to(origin).as_posix()
            if _allowed(name, modules):
                yield name
            elif place != origin and path.suffix in (".bin", ".pt"):
                warnings.warn(
                    f"{path}: was not copied, since it is pickled: convert it to safetensors yourself", stacklevel=4
                )


def _allowed(name: str, modules: set[str]) -> bool:
    """Whether a file may be copied.

    Args:
        name: relative to the model's directory, with slashes.
        modules: directories of sentence-transformers' modules.
    """
    first, _, rest = name.rpartition("/")
    if any(fnmatchcase(name, pattern) for pattern in (*_OF_THE_MODEL, *_OF_THE_TOKENIZER)):
        return first in ("", "additional_chat_templates")
    if first:
        known = first in modules and _MODULE_FOLDER.fullmatch(first) is not None
        return known and any(fnmatchcase(rest, pattern) for pattern in _OF_A_MODULE)
    return bool(_LEGAL.fullmatch(name) and _LEGAL_SUFFIX.fullmatch(PurePosixPath(name).suffix))


def _module_folders(origin: Path) -> set[str]:
    """The directories of sentence-transformers' modules, such as ``1_Pooling``."""
    file = _readable(origin, "modules.json") if (origin / "modules.json").exists() else None
    try:
        modules = json.loads(file.read_text(encoding="utf-8")) if file is not None else []
        paths = {module["path"] for module in modules if isinstance(module["path"], str)}
    except (ValueError, TypeError, KeyError):
        return set()
    return {path for path in paths if _MODULE_FOLDER.fullmatch(path)}


def _readable(origin: Path, name: str) -> Path | None:
    """The file behind a name, if it may be read: regular, not too large, and within the model's directory."""
    path, home = (origin / name).resolve(), origin.resolve()
    places = [home]
    if home.parent.name == "snapshots":  # of the hub's cache, where files are links to blobs
        places.append(home.parent.parent / "blobs")
    reason = ""
    if not any(path.is_relative_to(place) for place in places):
        reason = "it is a link to a file outside the model's directory"
    elif not path.is_file():
        return None
    elif path.stat().st_size > (LARGEST_WEIGHTS if name.endswith(".safetensors") else LARGEST_TEXT):
        reason = f"it is unusually large ({path.stat().st_size:,} bytes)"
    if reason:
        warnings.warn(f"{origin / name}: was not copied, since {reason}; copy it yourself if you need it", stacklevel=4)
        return None
    return path


def _drop_code(path: Path) -> None:
    """Remove what names code from a configuration; one that names none keeps its bytes."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if not any(f'"{key}"' in text for key in _NAMES_CODE):
        return
    try:
        data = json.loads(text)
    except ValueError:  # copied as it was found; whoever reads it will say so
        return
    path.write_text(json.dumps(_without_code(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key not in _NAMES_CODE}
    return [_without_code(item) for item in value] if isinstance(value, list) else value

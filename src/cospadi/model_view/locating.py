"""Where a model is: a local directory, read without any network, or a hub id, looked up once."""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from cospadi.errors import ModelError
from cospadi.model_view.sources import directory_name, refuse_adapter

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


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # for example a name that is too long
        raise ModelError(f"{str(path)[:40]}…: there is no such directory ({error.strerror})") from None


def located(source: str | Path, revision: str | None) -> dict[str, Any]:
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


def is_directory(options: dict[str, Any]) -> bool:
    """Whether `located` found a local directory rather than a hub id."""
    return Path(options["pretrained_model_name_or_path"]).is_dir()


def inside(options: dict[str, Any], name: str = "") -> Path:
    """The local directory of `located`, or a file in it."""
    return Path(options["pretrained_model_name_or_path"], name)


def is_here(name: str) -> bool:
    """Whether a directory or hub id can be read without any network."""
    from huggingface_hub import try_to_load_from_cache

    if _is_folder(Path(name).expanduser()):
        return True
    return _HUB_ID.fullmatch(name) is not None and isinstance(try_to_load_from_cache(name, "config.json"), str)


def weights_directory(source: str | Path) -> Path | None:
    """The local directory of a model's weights; None if they were never fetched from the hub."""
    from huggingface_hub import try_to_load_from_cache

    options = located(source, None)
    if is_directory(options):
        return inside(options)
    config = try_to_load_from_cache(str(source), "config.json", revision=options["revision"])
    return Path(config).parent if isinstance(config, str) else None

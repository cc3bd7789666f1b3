"""Weight files that are missing or truncated, named before transformers does so at length."""

import json
from pathlib import Path

from cospadi.errors import ModelError


def check_files(directory: Path) -> None:
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

"""Whatever transformers, safetensors or the hub raise, as one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from cospadi.errors import CospadiError, ModelError

_LONGEST_CAUSE = 240


@contextmanager
def explained(source: str | Path, what: str) -> Iterator[None]:
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
            cause = f"a safetensors file is damaged: {one_line(text)}"
        elif not Path(source).expanduser().exists() and isinstance(error, OSError):
            cause = "it is neither a local directory nor a hub model that can be reached"
        else:
            cause = one_line(text) or type(error).__name__
        raise ModelError(f"{source}: {what}: {cause}") from error


def one_line(text: str) -> str:
    """A message on one line, shortened if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_CAUSE else line[: _LONGEST_CAUSE - 1] + "…"

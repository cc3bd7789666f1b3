"""What a directory holds and what to call it: adapters that are not models, and snapshots of the hub's cache."""

import json
import re
from pathlib import Path

from cospadi.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"
_SNAPSHOT = re.compile(r"models--(?P<id>[^/]+)/snapshots/[^/]+$")


def directory_name(folder: Path) -> str:
    """The name of a model's directory.

    Args:
        folder: an absolute path.

    Returns:
        its last part; for a snapshot in the hub's cache, whose last part is a hash, the hub id.
    """
    found = _SNAPSHOT.search(folder.as_posix())
    return folder.name if found is None else found["id"].replace("--", "/", 1)


def refuse_adapter(folder: Path) -> None:
    """Refuse a directory that holds an adapter, such as a LoRA, instead of a model.

    Raises:
        ModelError: naming the adapter's base model and how to merge the two.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, base = config.get("peft_type") or "PEFT", config.get("base_model_name_or_path") or "an unnamed model"
    except (OSError, ValueError, AttributeError):
        kind, base = "PEFT", "an unnamed model"
    raise ModelError(
        f"{folder}: is a {kind} adapter of {base}, not a model; merge the two first: "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('merged'), "
        "and copy the tokenizer there"
    )

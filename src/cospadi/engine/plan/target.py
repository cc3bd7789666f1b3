"""What a checkpoint's files take beside the tensors, so that a target size holds for all of them together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.checkpoint import format_for
from cospadi.checkpoint.write import write_side_files
from cospadi.format import Spec
from cospadi.model_view import open_tokenizer

# A header entry, {"dtype":"BF16","shape":[…],"data_offsets":[…,…]}, and an entry of the index of several shards, with
# their names left out, are never longer: offsets and shapes have at most 13 and 7 digits.
ENTRY, INDEX_ENTRY = 104, 48
SHARD = 5_000_000_000


@dataclass(frozen=True)
class Beside:
    """What a checkpoint holds beside the tensors of the model.

    Attributes:
        tokenizer: None: the one that lies where the model's configuration says, if it says that.
        indexed: an index lists all tensors, whatever their size, since tensors that are copied have a file of their
            own.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    indexed: bool = False


NOTHING_MORE = Beside()


def side_bytes(model: PreTrainedModel, specs: Sequence[Spec], total: int, beside: Beside = NOTHING_MORE) -> int:
    """Bytes of the headers of the weight files, of the configuration, of the tokenizer, and of the copied files.

    An upper bound, by a few kilobytes: only the finished files tell exactly.

    Args:
        model: real or on ``meta``.
        specs: what will be stored of the compressed layers.
        total: bytes of all tensors, which decides whether the weights are split into several files.
        beside: what else there will be.

    Raises:
        ModelError: if the tokenizer cannot be read.
    """
    layers = {name for spec in specs for name in spec.modules}
    names = [name for name, _ in model.named_parameters() if name.removesuffix(".weight") not in layers]
    stored = format_for(specs)
    names += stored.bound_names(specs)
    names.append(f"{specs[0].modules[0]}.guard")
    split = beside.indexed or total > SHARD // 2
    each = ENTRY + (INDEX_ENTRY if split else 0)
    factor = 2 if split else 1
    headers = sum(factor * len(name) + each for name in names)
    groups = len(json.dumps({"quantization_config": stored.bound(specs)}, indent=2))
    with TemporaryDirectory() as folder:
        source, tokenizer = model.config.name_or_path, beside.tokenizer
        if tokenizer is None and source:
            tokenizer = open_tokenizer(source)
        model.config.save_pretrained(folder)
        write_side_files(model, tokenizer, Path(folder))
        return headers + groups + sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

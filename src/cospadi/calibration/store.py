"""Statistics on disk, one safetensors file per decoder layer, so that an interrupted run can resume.

Grams are symmetric, so only the part of each row from the diagonal block on is written, in strips of `STRIP` rows.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cospadi.calibration.loss_gram import LossGram
from cospadi.calibration.statistics import Statistics
from cospadi.errors import OutputError
from cospadi.io import UNFINISHED, disk_errors, write_durably
from cospadi.model_view import LinearGroup

STRIP = 256
FINGERPRINT = "fingerprint.json"


class StatisticsStore:
    """A directory of statistics of one model and one calibration text.

    Args:
        directory: created if absent.
        fingerprint: everything the statistics depend on (JSON values). Existing statistics must have the same one.

    Raises:
        OutputError: if the directory holds statistics with another fingerprint (names what differs), or cannot be used.
    """

    def __init__(self, directory: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(dict(fingerprint)))
        path = self.directory / FINGERPRINT
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for left in self.directory.glob(f"*{UNFINISHED}"):
                left.unlink()
            if not path.exists():
                write_durably(path, json.dumps(self.fingerprint, indent=1, sort_keys=True) + "\n")
                return
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise OutputError(f"{path} is damaged: delete {self.directory}, or use --fresh") from None
            self._compare(found)

    def __contains__(self, layer: int) -> bool:
        """Whether the statistics of a decoder layer are there."""
        return self._path(layer).is_file()

    def has_loss(self, layer: int) -> bool:
        """Whether the loss-weighted Grams of a decoder layer are there."""
        return self._loss_path(layer).is_file()

    def save(self, layer: int, statistics: Mapping[LinearGroup, Statistics], *, loss: bool = False) -> None:
        """Write the statistics of one decoder layer.

        Args:
            layer: its index.
            statistics: of all of its inputs.
            loss: also the loss-weighted Grams; of layers that have none, the plain Gram will stand in.

        Raises:
            OutputError: if the disk is full or not writable.
        """
        if loss:
            weighted = {"layer": torch.tensor([layer])}
            for item in statistics.values():
                for name, found in item.loss.items():
                    weighted[f"{name}.gram"] = pack_symmetric(found.gram)
                    weighted[f"{name}.energy"] = torch.tensor([found.energy], dtype=torch.float64)
            write_durably(self._loss_path(layer), save(weighted))
            if layer in self:
                return
        tensors: dict[str, Tensor] = {}
        for group, item in statistics.items():
            key = group.modules[0]
            tensors[f"{key}.gram"] = pack_symmetric(item.gram)
            tensors[f"{key}.abs_sum"] = item.abs_sum.contiguous()
            tensors[f"{key}.tokens"] = torch.tensor([item.tokens], dtype=torch.int64)
        write_durably(self._path(layer), save(tensors))

    def load(self, group: LinearGroup, loss: Collection[str] = ()) -> Statistics:
        """Read the statistics of one group.

        Args:
            group: which.
            loss: names of its layers whose loss-weighted Grams are wanted, too, where they have one.

        Raises:
            OutputError: if they are missing or damaged.
        """
        key = group.modules[0]
        with self._opened(self._path(group.layer), group.layer) as file:
            gram = unpack_symmetric(file.get_tensor(f"{key}.gram"), group.d_in)
            found = Statistics(gram, file.get_tensor(f"{key}.abs_sum"), int(file.get_tensor(f"{key}.tokens")))
        if not loss:
            return found
        with self._opened(self._loss_path(group.layer), group.layer) as file:
            stored = {*file.keys()}
            weighted = {
                name: LossGram(
                    unpack_symmetric(file.get_tensor(f"{name}.gram"), group.d_in),
                    float(file.get_tensor(f"{name}.energy")),
                )
                for name in loss
                if f"{name}.gram" in stored
            }
        return replace(found, loss=weighted)

    @contextmanager
    def _opened(self, path: Path, layer: int) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except FileNotFoundError:
            raise OutputError(f"{self.directory}: no statistics of decoder layer {layer}") from None
        except (SafetensorError, ValueError, OSError) as error:
            raise OutputError(f"{path} is damaged ({error}): delete it, or use --fresh") from None

    def discard(self, layer: int) -> None:
        """Delete the statistics of one decoder layer once they are no longer needed."""
        self._path(layer).unlink(missing_ok=True)
        self._loss_path(layer).unlink(missing_ok=True)

    def require_space(self, groups: Iterable[LinearGroup], *, loss: bool = False) -> None:
        """Check that the disk has room for the statistics of these groups.

        Args:
            groups: whose statistics are still to be written.
            loss: with a loss-weighted Gram for each of their layers.

        Raises:
            OutputError: if it does not (names what is needed and what is free).
        """
        need = sum(8 * (packed_size(group.d_in) * (1 + loss * len(group.modules)) + group.d_in) for group in groups)
        free = shutil.disk_usage(self.directory).free
        if need > free:
            raise OutputError(
                f"{self.directory}: the calibration statistics need {_size(need)}, {_size(free)} are free: "
                "free some space, or choose a directory on another disk"
            )

    def _path(self, layer: int) -> Path:
        return self.directory / f"layer-{layer:05d}.safetensors"

    def _loss_path(self, layer: int) -> Path:
        return self.directory / f"loss-{layer:05d}.safetensors"

    def _compare(self, found: Any) -> None:
        if not isinstance(found, dict):
            found = {}
        missing = object()
        keys = sorted(found.keys() | self.fingerprint.keys())
        differ = [k for k in keys if found.get(k, missing) != self.fingerprint.get(k, missing)]
        if differ:
            shown = "; ".join(
                f"{key}: {_short(found.get(key))} there, {_short(self.fingerprint.get(key))} now" for key in differ
            )
            raise OutputError(
                f"{self.directory} holds statistics of another run ({shown}): use --fresh or another directory"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


def packed_size(size: int) -> int:
    """How many numbers `pack_symmetric` keeps of a (size, size) matrix."""
    return sum(min(STRIP, size - start) * (size - start) for start in range(0, size, STRIP))


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Pack a symmetric matrix (d, d) into a vector of `packed_size(d)` numbers."""
    return torch.cat([matrix[i : i + STRIP, i:].reshape(-1) for i in range(0, len(matrix), STRIP)])


def unpack_symmetric(packed: Tensor, size: int) -> Tensor:
    """Inverse of `pack_symmetric`.

    Raises:
        ValueError: if the vector does not have `packed_size(size)` numbers.
    """
    if packed.shape != (packed_size(size),):
        raise ValueError(f"a packed {size}x{size} matrix holds {packed_size(size)} numbers, not {tuple(packed.shape)}")
    matrix = torch.empty(size, size, dtype=packed.dtype)
    position = 0
    for start in range(0, size, STRIP):
        rows, columns = min(STRIP, size - start), size - start
        strip = packed[position : position + rows * columns].view(rows, columns)
        matrix[start : start + rows, start:] = strip
        matrix[start:, start : start + rows] = strip.T
        position += rows * columns
    return matrix


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e3:,.0f} kB"

"""The journal: every finished group is durable, and the same command goes on where it stopped.

A run's directory holds ``.cospadi/`` while it works: ``fingerprint.json`` (what the run is), ``statistics/`` (Grams),
``plan.json`` (the plan after calibration) and sections of numbered entries: ``groups/NNNN.safetensors`` with the packed
factors and, as metadata, what the report says of them; ``layers/`` and ``predictions/`` for tuning. Every file is
written under another name, flushed to disk and renamed, so a file that is there is whole.

A finished run has no ``.cospadi/``. Its report says what it was, so that the same command knows that it is done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from cospadi.checkpoint import validate
from cospadi.checkpoint.checksums import CHECKSUMS
from cospadi.checkpoint.companions import remove_companions
from cospadi.errors import CheckpointError, CospadiError, OutputError, ResourceError
from cospadi.io import disk_errors, write_durably

FOLDER = ".cospadi"
ROWS = "rows.jsonl"
"""Where a comparison keeps its finished rows."""
MARKER = "fingerprint.json"
PLAN = "plan.json"
SECTIONS = ("groups", "layers", "predictions")
"""Folders of numbered entries: groups of linear layers; tuned decoder layers; all groups tuned together."""
REPORT = "report.json"
_CHECKPOINT = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ, as ``key: old → new``, nested keys dotted."""
    out: list[str] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            out += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            out.append(f"{prefix}{key}: {_short(old)} → {_short(new)}")
    return out


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else "unset" if value is None else json.dumps(value)
    return text if len(text) <= 24 else text[:10] + "…" + text[-6:]


def _recorded(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint as the report holds it: its hash decides, since paths in a report may be shortened."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return fingerprint | {"sha256": digest}


class Section:
    """Numbered entries of a journal, each a file of tensors with a JSON object beside them.

    Args:
        folder: of the entries.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __bool__(self) -> bool:
        return any(self.folder.glob("*.safetensors"))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:04d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether the entry of this number is finished."""
        return self._path(index).exists()

    def write(self, index: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Make a finished entry durable."""
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        data = to_bytes({k: v.contiguous().cpu() for k, v in tensors.items()}, {"info": json.dumps(info)})
        write_durably(self._path(index), data)

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A finished entry.

        Raises:
            OutputError: if the file was altered.
        """
        with self.checked(index), safe_open(self._path(index), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {})["info"])

    @contextmanager
    def checked(self, index: int) -> Iterator[None]:
        """Reading an entry, or making use of what was read: whatever does not fit is the file's fault.

        Raises:
            OutputError: naming the file.
        """
        try:
            yield
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise OutputError(
                f"{self._path(index)} is damaged ({error}): delete it and run the command again"
            ) from None


class Journal:
    """The durable state of one run in its output directory.

    A run that has left nothing worth keeping (no statistics, no group, no checkpoint) does not bind the directory: the
    next one takes its place. Used as a context manager, it removes what it made if the run fails for good before its
    first group: then the same command would only fail in the same way.

    Args:
        out: the output directory; made if absent.
        fingerprint: what the run is: model, recipe, text, versions.
        fresh: forget an earlier run in `out`; files that no run of ours wrote stay.

    Raises:
        OutputError: if `out` holds something else, another run (naming what differs), or a run that is under way.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], *, fresh: bool = False) -> None:
        self.out, self.folder = out, out / FOLDER
        self.record = _recorded(json.loads(json.dumps(fingerprint)))
        """What the report of the finished run is to hold as its ``fingerprint``."""
        self.groups, self.layers, self.predictions = (Section(self.folder / name) for name in SECTIONS)
        self._lock: IO[str] | None = None
        check_output(out)
        self._made = [path for path in (self.folder, out, *out.parents) if not path.exists()]
        try:
            with disk_errors(out):
                self._take_lock()
                if fresh:
                    self._forget()
            self._claim()
        except BaseException:
            if self._lock is not None and self.folder in self._made:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.close()
            raise

    def _claim(self) -> None:
        earlier = self._earlier()
        if earlier is not None and earlier.get("sha256") != self.record["sha256"]:
            finished = (self.out / REPORT).exists()
            if finished or self._worth_keeping():
                changed = "; ".join(differences(earlier | {"sha256": self.record["sha256"]}, self.record))
                raise OutputError(
                    f"{self.out} holds {'a finished' if finished else 'an unfinished'} run with other settings "
                    f"({changed if earlier else 'its report does not say which'}): choose another directory, or "
                    "replace that run with --fresh"
                )
            shutil.rmtree(self.statistics, ignore_errors=True)
        elif (self.folder / MARKER).exists():
            return  # it says so already
        own = {key: value for key, value in self.record.items() if key != "sha256"}
        write_durably(self.folder / MARKER, json.dumps(own, indent=1, sort_keys=True).encode())

    def _earlier(self) -> dict[str, Any] | None:
        """What the run that is there was, with the hash; None if there is none."""
        marker = self.folder / MARKER
        if marker.exists():
            try:
                found: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
                return _recorded(found)
            except (OSError, ValueError, TypeError):
                raise OutputError(f"{marker} is damaged: forget that run with --fresh") from None
        report = self.report()
        if report is None:
            return None
        kept = report.get("fingerprint")
        return kept if isinstance(kept, dict) else {}

    def _worth_keeping(self) -> bool:
        return any(self.statistics.rglob("*.safetensors")) or bool(self.groups)

    def _take_lock(self) -> None:
        lock = held(self.out)
        if lock is None:
            raise OutputError(f"another run is working in {self.out}: wait for it or choose another directory")
        self._lock = lock

    def _forget(self) -> None:
        # The report goes first, for it says that the run is done; the fingerprint last: an interruption on the way
        # leaves an unfinished run. Whatever else lies here is not ours to delete.
        copied = self._copied()
        for path in [self.out / REPORT, self.out / "config.json", *self.out.iterdir()]:
            if path.name in (REPORT, "config.json") or _CHECKPOINT.fullmatch(path.name):
                path.unlink(missing_ok=True)
        remove_companions(self.out, copied)
        for name in (*SECTIONS, "statistics"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        others = [path for path in self.folder.iterdir() if path.is_file() and path.name not in (MARKER, "lock")]
        for path in [*others, self.folder / MARKER]:
            path.unlink(missing_ok=True)

    def _copied(self) -> Any:
        """What the finished run in `out` says it copied from its model's directory."""
        try:
            return json.loads((self.out / REPORT).read_text(encoding="utf-8")).get("copied_files", [])
        except (OSError, ValueError, AttributeError):
            return []

    @property
    def statistics(self) -> Path:
        """Directory of the cached statistics."""
        return self.folder / "statistics"

    def plan(self, asked: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The groups of the plan that an interrupted run decided on, or None.

        Args:
            asked: what the plan depends on; a plan for something else does not count.
        """
        path = self.folder / PLAN
        if not path.exists():
            return None
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found: list[dict[str, Any]] = kept["groups"]
        return found if kept["asked"] == asked else None

    def keep_plan(self, asked: dict[str, Any], groups: list[dict[str, Any]]) -> None:
        """Make a plan durable."""
        write_durably(self.folder / PLAN, json.dumps({"asked": asked, "groups": groups}, indent=1).encode())

    def report(self) -> dict[str, Any] | None:
        """The report of the finished run in `out`, or None if it is not finished.

        Raises:
            OutputError: if the report is damaged.
        """
        path = self.out / REPORT
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} is damaged ({error}): compress again with --fresh") from None
        return found

    def finish(self) -> None:
        """Forget what only the run needed; the report is written already, and says what the run was."""
        report = self.report()
        if report is not None and "fingerprint" not in report:  # of a version that kept it elsewhere
            content = json.dumps(report | {"fingerprint": self.record}, indent=2, sort_keys=True, ensure_ascii=False)
            write_durably(self.out / REPORT, content + "\n")
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        hopeless = isinstance(error, CospadiError) and not isinstance(error, (OutputError, ResourceError))
        if hopeless and not self.groups and not (self.out / REPORT).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            for path in self._made:
                with suppress(OSError):  # not empty: someone else put something there meanwhile
                    path.rmdir()
        self.close()


def held(out: Path) -> IO[str] | None:
    """The lock of an output directory, made if absent; None if another process holds it. Closing it releases it."""
    while True:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        try:
            lock = (out / FOLDER / "lock").open("w")
        except FileNotFoundError:  # another run finished meanwhile, and removed the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino == (out / FOLDER / "lock").stat().st_ino:
                return lock
        except BlockingIOError:
            lock.close()
            return None
        except FileNotFoundError:
            pass
        lock.close()


def _is_ours(out: Path) -> bool:
    """Whether a directory holds a run of ours, under way, interrupted or finished."""
    if (out / FOLDER).is_dir() or all((out / name).is_file() for name in ("recipe.yaml", CHECKSUMS)):
        return True  # the second: a finished run whose report was deleted; it is made again
    for name, mark in ((REPORT, '"cospadi_version"'), (ROWS, '{"fingerprint": "')):
        with suppress(OSError):
            if mark in (out / name).read_text(encoding="utf-8", errors="replace"):
                return True
    return False


def check_output(out: Path, comparison: bool = False) -> None:
    """Refuse an output directory that is neither new, empty, nor a run of ours, or that cannot be written.

    Args:
        out: the directory.
        comparison: it is for a comparison, which does not mix with a checkpoint.

    Raises:
        OutputError: naming what was found.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: name a directory")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise OutputError(f"{out} cannot be made: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be written: no permission in {nearest}; choose another directory")
    if out.is_dir() and any(out.iterdir()) and not _is_ours(out):
        raise OutputError(f"{out} is not empty and holds no run of cospadi: choose another directory or empty it")
    if comparison and ((out / "config.json").exists() or (out / FOLDER / MARKER).exists()):
        raise OutputError(f"{out} holds a checkpoint: choose another directory for the comparison")
    if not comparison and (out / ROWS).exists():
        raise OutputError(f"{out} holds a comparison: choose another directory for the checkpoint")


def check_complete(out: Path) -> None:
    """Look whether the checkpoint of a finished run is still whole.

    Raises:
        OutputError: naming what is wrong with it.
    """
    try:
        validate(out, deep=False)
    except CheckpointError as error:
        raise OutputError(
            f"the run is finished, but its checkpoint is damaged ({error}): compress again with --fresh"
        ) from None

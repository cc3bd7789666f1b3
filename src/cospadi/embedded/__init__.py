"""The small language model included in the package, and the standard-library texts it was trained on.

It lets `cospadi demo`, the quick start and the tests run without a download: a Llama of 2.8 million weights with a
byte-level tokenizer, trained by ``scripts/train_embedded.py`` on the source of the Python standard library. That source
is not shipped: calibration and held-out texts are read from the running Python. The training and the held-out
perplexity are recorded in ``benchmarks/results/embedded_model.json``.
"""

import os
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

from cospadi.errors import CalibrationError, ModelError

Part = Literal["train", "calibration", "heldout"]

HELDOUT_MODULES = (
    "argparse",
    "heapq",
    "textwrap",
    "shutil",
    "statistics",
    "json.decoder",
    "csv",
    "fractions",
    "calendar",
    "cmd",
    "queue",
    "sched",
)
"""Excluded from training; all exist in every Python from 3.11 to 3.14."""

CALIBRATION_MODULES = (
    "inspect",
    "typing",
    "tarfile",
    "urllib.request",
    "logging",
    "http.client",
    "asyncio.base_events",
    "unittest.case",
    "xml.etree.ElementTree",
    "subprocess",
    "pickle",
    "email.message",
    "configparser",
    "threading",
    "dataclasses",
    "optparse",
    "functools",
    "doctest",
    "enum",
    "mailbox",
    "ast",
    "http.cookiejar",
    "logging.handlers",
    "random",
    "contextlib",
)
"""Part of the training text, existing in every Python from 3.11 to 3.14; neighbours in this order differ in subject."""

# Generated tables and third-party packages teach a small model nothing; tests are as long as the library itself, and
# many distributions omit them.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "turtledemo", "__phello__"}
)
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize", "__phello__", "_sysconfig_vars")


def model_path() -> Path:
    """Directory of the embedded model, for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer``.

    Raises:
        ModelError: if the package was installed without its data files, or is imported from a zip archive.
    """
    path = Path(str(files(__name__) / "model"))
    if not (path / "model.safetensors").is_file():
        raise ModelError(
            f"the embedded model is missing from {path}: cospadi was installed without its data files or runs from an "
            "archive; reinstall it from a wheel, or use another model"
        )
    return path


def stdlib_texts(part: Part, root: Path | None = None) -> list[str]:
    """Source text of standard-library modules of the running Python, one string per file.

    Args:
        part: ``"train"``: everything the model may be trained on, sorted by path; ``"calibration"``: a fixed list of
            modules from it (more than 256 sequences of 1024 tokens); ``"heldout"``: a fixed list of modules that are
            excluded from it.
        root: directory of the library; None for that of the running Python.

    Returns:
        the texts, with newlines as line endings; files that are empty or not UTF-8 are left out.

    Raises:
        CalibrationError: if the source is missing, as in a zipped or stripped Python, or lacks a module of the fixed
            lists.
        ValueError: if `part` is unknown.
    """
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(get_args(Part))}, not {part!r}")
    return [text for _, text in stdlib_sources(part, root)]


def stdlib_sources(part: Part, root: Path | None = None) -> list[tuple[str, str]]:
    """Like :func:`stdlib_texts`, as pairs of (path relative to the library, with forward slashes; text)."""
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    if not folder.is_dir():
        raise CalibrationError(
            f"there is no standard-library source in {folder}: this Python is zipped or stripped; "
            "use a full Python, or pass texts with --calibration and --text"
        )
    if part == "train":
        allowed = (path for path in _candidates(folder) if not _is_heldout(path.relative_to(folder)))
        paths = sorted(allowed, key=lambda path: path.relative_to(folder).as_posix())
        missing = [] if paths else ["any module"]
    else:
        names = HELDOUT_MODULES if part == "heldout" else CALIBRATION_MODULES
        found = {name: _module_files(folder, name) for name in names}
        missing = [name for name, of_module in found.items() if not of_module]
        paths = [path for of_module in found.values() for path in of_module]
    if missing:
        raise CalibrationError(
            f"the source of {', '.join(missing)} is missing in {folder}: this Python is stripped; "
            "use a full Python, or pass texts with --calibration and --text"
        )
    texts = ((path.relative_to(folder).as_posix(), _read(path)) for path in paths)
    return [(name, text) for name, text in texts if text]


def _candidates(folder: Path) -> Iterator[Path]:
    """Python files of the library, in any order, without tests, tables and installed packages."""
    for parent, folders, names in os.walk(folder):
        # in place, so that os.walk skips the removed folders: site-packages may be large
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith(_SKIPPED_FILES):
                yield Path(parent, name)


def _is_heldout(path: Path) -> bool:
    """Whether a path relative to the library is a held-out module or lies inside a held-out package."""
    dotted = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    return any(dotted == name or dotted.startswith(f"{name}.") for name in HELDOUT_MODULES)


def _module_files(folder: Path, name: str) -> list[Path]:
    """The file of a module, or ``__init__.py`` of a package, as a list; empty if there is neither."""
    base = folder.joinpath(*name.split("."))
    return [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()][:1]


def _read(path: Path) -> str:
    """The text of a file, or an empty string if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""

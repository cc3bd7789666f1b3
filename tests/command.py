"""The command line as a person meets it, run within this process: one import of torch serves all tests.

done = command("compress", model, out, "--keep", "0.8", …)
done.code, done.out, done.err, done.json
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cospadi.cli import main


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self) -> str:
        """The error message, without its prefix; the last line of stderr."""
        last = self.err.splitlines()[-1]
        assert last.startswith("Error: ")
        return last.removeprefix("Error: ")


def command(*arguments: object, width: int = 100) -> Done:
    out, err = io.StringIO(), io.StringIO()
    argv, columns = sys.argv, os.environ.get("COLUMNS")
    sys.argv = ["cospadi", *map(str, arguments)]
    os.environ["COLUMNS"] = str(width)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        return Done(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    raise AssertionError("the command did not exit")


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by its place."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, str]:
    """Hash of every weight file of a checkpoint."""
    found = {name: digest for name, digest in snapshot(folder).items() if name.startswith("model")}
    assert found
    return found


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Whatever lies in a folder is the same afterwards; a folder that is not there stays away."""
    before = snapshot(folder) if folder.is_dir() else folder.exists()
    yield
    assert (snapshot(folder) if folder.is_dir() else folder.exists()) == before

"""Files that are complete or absent, and errors that name the cause and the remedy."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from cospadi.errors import OutputError
from cospadi.io import disk_errors, expanded, write_durably


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
        (SafetensorError("Error: Permission denied (os error 13)"), "Permission denied"),
        (SafetensorError("something else"), "something else"),
        (OSError("without a number"), "without a number"),
    ],
)
def test_errors_of_the_disk(tmp_path, error, words):
    with pytest.raises(OutputError, match=words) as caught, disk_errors(tmp_path):
        raise error
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_remedy_for_a_full_disk_is_the_callers():
    with pytest.raises(OutputError, match=r"x: buy a disk$"), disk_errors("x", "buy a disk"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_other_errors_pass():
    with pytest.raises(KeyError), disk_errors("x"):
        raise KeyError("x")
    with pytest.raises(OutputError, match=r"^mine$"), disk_errors("x"):
        raise OutputError("mine")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_durably(tmp_path / "file", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folders_are_made_and_text_is_utf8(tmp_path):
    path = write_durably(str(tmp_path / "a" / "b" / "c.txt"), "Gräm \ud800")
    assert path == tmp_path / "a" / "b" / "c.txt"
    assert path.read_text(encoding="utf-8") == "Gräm ?"


def test_new_files_have_the_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert write_durably(tmp_path / "a.txt", b"x").stat().st_mode == plain.stat().st_mode


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match=r"x/y cannot be written"):
        write_durably(tmp_path / "x" / "y", b"")


def test_the_home_directory_is_expanded_once_and_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    for given, meant in {
        "~": home,
        "~/a b": home / "a b",
        Path("~/x"): home / "x",
        "a/~": Path("a/~"),
        "": Path(),
        "./~x": tmp_path / "~x",
        "./~": tmp_path / "~",
        "/~x": Path("/~x"),
    }.items():
        assert expanded(given) == expanded(expanded(given)) == meant


def test_the_home_of_nobody_is_refused_with_a_spelling_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"~nobody-here/x: there is no such home .* write \./~nobody-here/x"):
        expanded("~nobody-here/x")
    assert expanded("./~nobody-here/x") == tmp_path / "~nobody-here/x"

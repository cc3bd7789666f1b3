"""What result files say of the code that made them."""

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from cospadi.runtime import fingerprints

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def uninstalled(monkeypatch):
    """As if the package ran from a checkout that is not installed."""

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(fingerprints, "version", absent)
    monkeypatch.delenv("COSPADI_COMMIT", raising=False)
    fingerprints.commit.cache_clear()
    yield monkeypatch
    fingerprints.commit.cache_clear()


def test_a_checkout_that_is_not_installed_knows_its_version(uninstalled):
    uninstalled.setattr(fingerprints, "SOURCE", PROJECT.parent)
    declared = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["version"]
    assert fingerprints.versions()["cospadi"] == declared


def test_a_copy_without_history_is_told_its_commit(uninstalled, tmp_path):
    uninstalled.setattr(fingerprints, "SOURCE", tmp_path)
    assert "commit" not in fingerprints.versions() and fingerprints.versions()["cospadi"] == "0+unknown"
    fingerprints.commit.cache_clear()
    uninstalled.setenv("COSPADI_COMMIT", "a" * 40)
    assert fingerprints.versions()["commit"] == "a" * 40


def test_a_broken_history_is_no_error(uninstalled, tmp_path):
    (tmp_path / ".git").mkdir()
    uninstalled.setattr(fingerprints, "SOURCE", tmp_path)
    assert fingerprints.commit() == ""

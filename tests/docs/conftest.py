"""Small stand-ins for the models and texts that the pages speak of."""

import json
import os
import shutil
from pathlib import Path

import pytest
from blocks import given

from cospadi.embedded import model_path, stdlib_texts

MODELS = ("MODEL", "llama-29m", "path/or/hub-id")
TEXTS = ("text.jsonl", "wikipedia.jsonl", "documentation.jsonl")
CHARACTERS = 4_500  # about 1200 tokens: one block of the default length


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed checkpoint."""
    from cospadi import compress

    out = tmp_path_factory.mktemp("given") / "small"
    text = stdlib_texts("calibration")[0][:CHARACTERS]
    compress(model_path(), out, method="rtn", keep=0.3, calibration=[text])
    return out


@pytest.fixture
def stand_ins(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the commands of a page work as they stand: the page's models are the embedded one."""
    for name in MODELS:
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(model_path(), target_is_directory=True)
    texts = [text[:CHARACTERS] for text in stdlib_texts("calibration")[:1]]
    for name in TEXTS:
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "held-out.txt").write_text(stdlib_texts("heldout")[0][:CHARACTERS], encoding="utf-8")
    page: Path = request.getfixturevalue("page")
    root = page.parents[1] if page.parent.name == "docs" else page.parent
    for name in ("recipes", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(root / name, target_is_directory=True)
    if "small" in given(page):
        shutil.copytree(request.getfixturevalue("compressed"), tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", os.environ.get("COLUMNS", "100"))
    return tmp_path

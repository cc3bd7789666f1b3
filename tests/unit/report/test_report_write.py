import ast
import json
import math
import sys
from pathlib import Path

import pytest

import cospadi.report
from cospadi.report import report_json, write_all


def test_everything_is_written(report, tmp_path):
    files = write_all(report, tmp_path / "out")
    assert set(files) == {
        "report.json", "report.html", "README.md", "assets/error_per_layer.png", "assets/bytes_per_layer.png",
    }  # fmt: skip
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == set(files)
    text = files["report.json"].read_text(encoding="utf-8")
    assert json.loads(text) == report
    keys = [line.split('"')[1] for line in text.splitlines() if line.startswith('  "')]
    assert keys == sorted(report)


def test_without_matplotlib_no_picture_is_linked(report, tmp_path, without_matplotlib):
    files = write_all(report, tmp_path)
    assert set(files) == {"report.json", "report.html", "README.md"}
    assert "assets/" not in files["README.md"].read_text(encoding="utf-8")


def test_an_empty_report_is_written(tmp_path):
    assert set(write_all({}, tmp_path)) == {"report.json", "report.html", "README.md"}


def test_report_json_is_strict_and_names_no_folder_of_this_machine(report, tmp_path):
    report["groups"][0]["error"] = math.nan
    report["recipe"]["texts"] = [str(tmp_path / "notes.jsonl")]
    report["command"] = f"cospadi compress {tmp_path}/model {tmp_path}/out"
    files = write_all(report, tmp_path / "out")
    data = json.loads(report_json(report), parse_constant=pytest.fail)
    assert data["groups"][0]["error"] is None
    assert data["command"] == "cospadi compress model out"
    for name in ("report.json", "report.html", "README.md"):
        assert str(tmp_path) not in files[name].read_text(encoding="utf-8")


def test_report_imports_plain_data_code_only():
    """No torch anywhere below, and no matplotlib before a plot is asked for; IPython only where it runs."""
    for source in Path(cospadi.report.__file__).parent.glob("*.py"):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top, _, rest = name.partition(".")
                assert top in {*sys.stdlib_module_names, "IPython", "cospadi", "matplotlib", "rich", "yaml"}, source
                assert top != "cospadi" or rest.split(".")[0] in {"errors", "io", "progress", "report"}, source
        at_import = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not any(name.startswith(("matplotlib", "IPython")) for name in at_import)


def test_report_modules_use_only_public_names_of_each_other():
    """No helper with a leading underscore crosses modules: shared parts are public in small modules."""
    modules = {path.stem for path in Path(cospadi.report.__file__).parent.glob("*.py")}
    for source in Path(cospadi.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cospadi"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], source
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert not node.attr.startswith("_"), source
        assert len(source.read_text(encoding="utf-8").splitlines()) <= 400, source

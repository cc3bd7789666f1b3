"""The public face of the package: its names, where they claim to live, and that importing it is cheap."""

import inspect
import pickle
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_type_hints

import pytest

import cospadi

ERRORS = [name for name in cospadi.__all__ if name.endswith("Error")]
OTHERS = [name for name in cospadi.__all__ if name not in ERRORS]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names():
    assert set(OTHERS) == {
        "Estimate", "PruneResult", "Recipe", "Result", "benchmark", "compare", "compress", "doctor", "estimate",
        "evaluate", "export", "generate", "inspect", "load", "prune",
    }  # fmt: skip
    assert set(ERRORS) == {
        "BudgetError", "CalibrationError", "CheckpointError", "CospadiError", "ModelError", "NumericalError",
        "OutputError", "RecipeError", "ResourceError",
    }  # fmt: skip
    assert set(cospadi.__all__) < set(dir(cospadi)) and "__version__" in dir(cospadi)
    with pytest.raises(AttributeError, match="'compres'"):
        cospadi.compres  # noqa: B018


@pytest.mark.parametrize("name", cospadi.__all__)
def test_public_names_live_in_the_package(name):
    item = getattr(cospadi, name)
    assert (item.__module__, item.__name__) == ("cospadi", name)
    assert inspect.getdoc(item)
    assert pickle.loads(pickle.dumps(item)) is item


@pytest.mark.parametrize("name", OTHERS)
def test_annotations_still_resolve(name):
    assert get_type_hints(getattr(cospadi, name))


def test_repr_names_the_package():
    assert repr(cospadi.ModelError) == "<class 'cospadi.ModelError'>"
    assert repr(cospadi.Recipe) == "<class 'cospadi.Recipe'>"


def test_a_recipe_can_be_subclassed():
    class Mine(cospadi.Recipe):
        extra: int = 0

    assert Mine(keep=0.5, extra=3).extra == 3


@pytest.mark.parametrize("name", ERRORS)
def test_exceptions_survive_pickling(name):
    kind = getattr(cospadi, name)
    error = pickle.loads(pickle.dumps(kind("layer 3: what and why")))
    assert type(error) is kind and isinstance(error, cospadi.CospadiError) and str(error) == "layer 3: what and why"


def test_importing_the_package_loads_neither_torch_nor_transformers():
    heavy = "print([m for m in ('torch', 'transformers', 'numpy', 'pydantic', 'safetensors') if m in sys.modules])"
    assert python(f"import sys, cospadi; cospadi.ModelError; cospadi.__version__; {heavy}") == "[]"
    assert python("import sys, cospadi; cospadi.Recipe; print('torch' in sys.modules)") == "False"
    assert python("import sys, cospadi; cospadi.compress; print('torch' in sys.modules)") == "True"


def test_help_does_not_load_torch():
    code = "import sys\nfrom cospadi.cli import main\nsys.argv[1:] = ['compress', '--help']\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    assert python(code + "print('torch' in sys.modules)").splitlines()[-1] == "False"


def test_the_version_is_that_of_the_distribution(monkeypatch):
    assert cospadi.__version__ == version("cospadi")
    project = Path(cospadi.__file__).parents[2] / "pyproject.toml"
    if project.exists():  # a source tree
        assert cospadi.__version__ == tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]

    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert cospadi.__version__ == "0+unknown"


def test_the_package_is_typed():
    assert (Path(cospadi.__file__).parent / "py.typed").is_file()

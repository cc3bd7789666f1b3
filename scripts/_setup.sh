# Sourced by the other scripts: a virtual environment with the package in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "cospadi needs Python 3.11 or newer; set PYTHON to one (found: $("$PYTHON" --version 2>&1 || echo none))" >&2
    exit 1
fi

# set_up EXTRAS: makes .venv where it is missing and installs what is not there yet. torch 2.13.0 is what the tests
# are run with; a torch that is already in the environment and new enough is left alone.
set_up() {
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    .venv/bin/python - <<'PY' || .venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
from importlib.metadata import version
major, minor = version("torch").split(".")[:2]
raise SystemExit((int(major), int(minor)) < (2, 10))
PY
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$1"
}

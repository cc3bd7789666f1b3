"""Runs tests in Triton's interpreter, which must be chosen before anything in a process imports Triton."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="there is no Triton for this machine; its interpreter runs the kernels here",
)
@pytest.mark.parametrize(
    "name",
    [
        "kernels/interpreted.py",
        "kernels/interpreted_trellis.py",
        "solvers/interpreted_feedback.py",
        "solvers/interpreted_trellis.py",
    ],
)
def test_kernels_in_the_interpreter(name):
    tests = Path(__file__).parent / name
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

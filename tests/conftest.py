"""Tests that need a GPU skip where there is none; the longest file goes first."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    # at the end the other worker would only wait for it
    items.sort(key=lambda item: item.path.name != "test_interpreted.py")
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(absent)

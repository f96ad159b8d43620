"""Settings of all tests: helpers of this folder are importable, torch runs on one thread, import paths are restored."""

import sys

import pytest
import torch

torch.set_num_threads(1)  # sums keep their order


@pytest.fixture(autouse=True)
def import_path():
    """Restore the import path, to which targets in the working directory add that directory."""
    before = list(sys.path)
    yield
    sys.path[:] = before

"""Fixtures of builds."""

import shutil

import pytest
from builds import ROOT, read_setup_py


@pytest.fixture
def source(tmp_path):
    """A copy of what a build needs, without leftovers of other builds."""
    copy = tmp_path / "source"
    left = ("*.so", "__pycache__", ".*", "build", "dist", "*.egg-info", "results")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left))
    return copy


@pytest.fixture(scope="module")
def setup_py():
    with read_setup_py() as found:
        yield found

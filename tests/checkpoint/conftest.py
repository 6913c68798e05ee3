"""Folders that the tests of this room start from."""

from pathlib import Path

import good_folders
import pytest


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A good dense folder."""
    return good_folders.write_dense(tmp_path / "dense")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A good GPTQ folder: 4 bits, groups of 32, format gptq, desc_act false."""
    return good_folders.write_packed(tmp_path / "packed")

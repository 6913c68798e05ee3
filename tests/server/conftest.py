"""A tokenizer of bytes, for every test of the server: one token a byte, `<end>` is 256."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longwing.tokenizer import Tokenizer
from tiny import write_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


VERSION = "0.7.0"
"""Of the official client, the last one."""


@pytest.fixture(scope="session")
def official_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the official client; `LONGWING_TEST_TGI_PYTHON` names one that exists."""
    if given := os.environ.get("LONGWING_TEST_TGI_PYTHON"):
        return Path(given)
    folder = tmp_path_factory.mktemp("tgi")
    python = folder / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", f"text-generation=={VERSION}"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"text-generation {VERSION} cannot be installed here: {last}")
    return python

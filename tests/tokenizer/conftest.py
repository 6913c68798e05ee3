"""Tokenizers that several test files use, made once, and the same as transformers reads them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizer_folders import (
    CHATML,
    LLAMA_SETTINGS,
    OPEN_ASSISTANT,
    falcon_json,
    llama_json,
    write_folder,
)
from transformers import PreTrainedTokenizerFast

from longwing.tokenizer import Tokenizer

LLAMAS = ["llama-legacy", "llama-first"]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder_of(name)`: Falcon's tokenizer with markup of two chat formats, or a Llama's."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            if name == "falcon":
                described = falcon_json(*OPEN_ASSISTANT, *CHATML)
                made[name] = write_folder(path, described, eos_token="<|endoftext|>")
            else:
                described = llama_json(name.removeprefix("llama-"))
                made[name] = write_folder(path, described, **LLAMA_SETTINGS)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def falcon(folder_of: Callable[[str], Path]) -> Tokenizer:
    """Falcon's tokenizer with OpenAssistant's and ChatML's tokens."""
    return Tokenizer.from_folder(folder_of("falcon"))


@pytest.fixture(scope="session", params=LLAMAS)
def llama(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Tokenizer:
    """A small tokenizer of Llama 2's kind, in both of its published forms."""
    return Tokenizer.from_folder(folder_of(request.param))


@pytest.fixture(scope="session", params=["falcon", *LLAMAS])
def pair(
    request: pytest.FixtureRequest, folder_of: Callable[[str], Path]
) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """One folder's tokenizer, ours and transformers'."""
    folder = folder_of(request.param)
    return Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)

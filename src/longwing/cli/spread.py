"""Ray, where a verb needs it; and work spread over a cluster of it: `--ray` and its options."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from longwing.cli.console import note
from longwing.cli.generate import encode_prompt
from longwing.cluster.options import SpreadOptions
from longwing.cluster.pool import EnginePool
from longwing.errors import ConfigError
from longwing.evals.task import Model
from longwing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from longwing.cluster.crew import Crew


def cluster_variables(name: str) -> list[str]:
    """The environment variables of an option of `SpreadOptions`."""
    return ["RAY_ADDRESS"] if name == "address" else []


def with_ray(name: str) -> ModuleType:
    """A module of `longwing.cluster` that knows Ray, which is an extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(f"longwing.cluster.{name}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed", remedy="pip install 'longwing[cluster]'"
        ) from error


@contextmanager
def assembled(spread: SpreadOptions, device: str) -> Iterator["Crew"]:
    """The workers of a cluster, while the work lasts.

    Raises:
        ConfigError: Ray is not installed, is not there, or has not so much room.
    """
    with with_ray("crew").assembled(spread, device) as crew:
        size = crew.size
        note(f"workers: {size.num}, each with {size.gpus:g} GPUs and {size.cpus:g} cores")
        yield crew


@contextmanager
def spread_model(
    spread: SpreadOptions,
    make: Callable[[], Model],
    folder: Path,
    template: str,
    *,
    device: str,
    per_worker: int,
) -> Iterator[EnginePool]:
    """A model in every worker, asked as one.

    Args:
        spread: the cluster.
        make: loads the model; called in the workers.
        folder: the model's, for its tokenizer.
        template: as --template of the command line.
        device: as --device.
        per_worker: questions that each answers at a time.
    """
    prompts = _Prompts(Tokenizer.from_folder(folder), template)
    with (
        assembled(spread, device) as crew,
        EnginePool(
            lambda: crew.hire(make, threads=per_worker),
            prompts,
            num_workers=crew.size.num,
            per_worker=per_worker,
        ) as pool,
    ):
        yield pool


class _Prompts:
    """What `LocalModel` does without its weights."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def count_tokens(self, text: str, *, chat: bool) -> int:
        """Tokens of a prompt as it would be asked."""
        return len(encode_prompt(self._tokenizer, text, self._template if chat else "plain"))

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, and nothing before it."""
        return self._tokenizer.encode(text, add_bos=False)

"""longwing: open language models over long documents on little hardware.

    import longwing

    model = longwing.load("path/to/model")
    print(model.generate("The first line of Moby Dick is", max_new_tokens=40).text)
    for chunk in model.stream("Once upon a time", temperature=0.8, seed=1):
        print(chunk.text, end="", flush=True)

`longwing.Client(url)` asks a model that is served elsewhere, and needs no torch.

Names are loaded when first used, so that `import longwing` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longwing import errors
    from longwing.client import AsyncClient, Client
    from longwing.engine.generator import Chunk, Completion, Generator, load
    from longwing.engine.request import SamplingParams

_HOMES = {
    "AsyncClient": "longwing.client",
    "Chunk": "longwing.engine.generator",
    "Client": "longwing.client",
    "Completion": "longwing.engine.generator",
    "Generator": "longwing.engine.generator",
    "SamplingParams": "longwing.engine.request",
    "load": "longwing.engine.generator",
}

__all__ = [
    "AsyncClient",
    "Chunk",
    "Client",
    "Completion",
    "Generator",
    "SamplingParams",
    "errors",
    "load",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "errors":
        return import_module("longwing.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'longwing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

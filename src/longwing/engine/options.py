"""How a model is loaded and served by the batching engine, and the limits of a step. No torch.

Plain values only, so that they can be sent to the process that obeys them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longwing.errors import RequestError

KV_DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")
"""Number types of cached keys and values; auto is the activations' own."""

CPU_WEIGHTS = ("auto", "fast", "small", "float32")
"""Forms of a model's matrices on a CPU."""

OVERLAPS = ("auto", "on", "off")
"""Whether the host's work on one step is done while the device does the next."""

DEFAULTS: Mapping[str, Mapping[str, int]] = {
    # More than 4 tokens in a step leave the 4-bit kernel for a form that costs twice as much.
    "cpu": {
        "page_len": 32,
        "max_batch_tokens": 512,
        "max_beside_tokens": 512,
        "max_draft": 3,
        "draft_sequences": 1,
    },
    # A step of up to 8 tokens costs a quarter more than one of 1, of 9 to 16 two fifths more; and
    # four sequences with 7 drafts each are 32 tokens, after which the next size up is 64.
    "cuda": {
        "page_len": 128,
        "max_batch_tokens": 2048,
        "max_beside_tokens": 2048,
        "max_draft": 7,
        "draft_sequences": 4,
    },
}
"""What is unset, by the kind of device; measured by bench/serve.py and `longwing bench`.

Nobody reads less beside others than alone unless somebody asks for larger steps.
"""

LONGEST = 2**30

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def adapter_place(text: str) -> tuple[str, str]:
    """(name, folder) of an adapter: NAME=FOLDER, or a folder whose own name it goes by.

    Raises:
        RequestError: the name is none that clients could be told.
    """
    name, equals, folder = text.partition("=")
    if not equals:
        name, folder = Path(text).absolute().name, text
    if not _ADAPTER_NAME.fullmatch(name) or not folder:
        raise RequestError(
            f'adapter "{text[:200]}": write NAME=FOLDER, where NAME has up to 128 letters, digits '
            "and . _ : - and begins with a letter or digit"
        )
    return name, folder


def _whole(default: int | None, low: int, high: int, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """The limits of a step and of the queue.

    Raises:
        RequestError: a value is out of its range.
    """

    max_sequences: int = _whole(64, 1, 4096, "Sequences in one step at most.")
    max_batch_tokens: int | None = _whole(
        None, 1, 2**20, "Tokens in one step at most: a longer prompt is read in chunks of it. "
        "Unset: 2048 on a GPU, 512 on a CPU."
    )  # fmt: skip
    max_beside_tokens: int | None = _whole(
        None, 1, 2**20, "Tokens of prompts in a step at most while others are being answered: the "
        "fewer, the sooner comes their next token. Unset: 2048 on a GPU, 512 on a CPU."
    )  # fmt: skip
    max_waiting: int = _whole(1024, 0, 2**20, "Sequences that may wait for their turn.")
    max_draft: int | None = _whole(
        None, 0, 64, "Tokens guessed ahead from the text so far and checked in one step; 0: off. "
        "Unset: 7 on a GPU, 3 on a CPU."
    )  # fmt: skip
    draft_sequences: int | None = _whole(
        None, 0, 4096, "Guess ahead only while at most so many sequences are at work. "
        "Unset: 4 on a GPU, 1 on a CPU."
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, setting in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if "low" not in setting.metadata or (value is None and setting.default is None):
                continue
            low, high = setting.metadata["low"], setting.metadata["high"]
            if type(value) is not int or not low <= value <= high:
                raise RequestError(f"{name} must be from {low} to {high}, is {value!r}")


@dataclass(frozen=True, kw_only=True)
class EngineOptions(SchedulerOptions):
    """Settings of an engine, checked when made.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "float16" or "bfloat16", of activations and dense weights.
        context: longest prompt and answer together, in tokens; None is what the model claims, or
            what the memory holds if that is less.
        rope: RoPE settings in place of the model's, as `--rope` takes them.
        memory: bytes the engine may use on its device, weights included; None is what there is.
        cache_tokens: tokens the cache holds, in place of num_pages.
        adapters: LoRA adapters to serve beside the model, each as `adapter_place` reads it.
        tensor_parallel: ranks that share the model, a process and a GPU each; `device` is the
            first one's, and `memory` is of each.
        rank_timeout_s: how long a rank may keep the others waiting.

    Raises:
        RequestError: a value is out of its range.
    """

    device: str = "auto"
    dtype: str = "auto"
    context: int | None = None
    rope: str | None = None
    memory: int | None = None
    cache_tokens: int | None = None
    adapters: tuple[str, ...] = ()
    tensor_parallel: int = _whole(
        1, 1, 64, "GPUs that share the model, each with a part of every matrix and of the cache, "
        "beginning with --device. They must divide its key/value heads: 2, 4 or 8 for Falcon-40B. "
        "On a CPU: so many processes share its cores, which is for trying it out."
    )  # fmt: skip
    rank_timeout_s: int = _whole(
        7, 1, 3600, "With --tensor-parallel: seconds that one of them may keep the others waiting. "
        "Then it is taken for hung, and all of them are ended and started anew."
    )  # fmt: skip
    cpu_weights: str = field(
        default="auto",
        metadata={
            "help": f"On a CPU, what weights become: {', '.join(CPU_WEIGHTS)}. fast: packed ones "
            "in 4 bits and in bfloat16, the head in 8 bits; small: without the second copy; "
            "float32: exact; auto: fast, unless --dtype float32 asks for exact."
        },
    )
    kv_dtype: str = field(
        default="auto",
        metadata={
            "help": f"Number type of cached keys and values: {', '.join(KV_DTYPES)}; "
            "auto: the activations' own."
        },
    )
    page_len: int = _whole(
        0, 0, 4096, "Tokens in a page of the KV cache; 0: 128 on a GPU, 32 on a CPU."
    )
    num_pages: int | None = _whole(
        None, 1, LONGEST, "Pages of the KV cache; unset: as many as the memory holds."
    )
    overlap: str = field(
        default="auto",
        metadata={
            "help": "Begin a decoding step on the device before the tokens of the last one are "
            f"read: {', '.join(OVERLAPS)}; auto: on a GPU."
        },
    )
    prefix_cache: bool = field(
        default=True, metadata={"help": "Keep the keys and values of prompts that may come again."}
    )
    cache_share: float = field(
        default=1.0,
        metadata={
            "help": "Largest part of the cache that one key's past prompts may take, from 0 to 1."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cpu_weights not in CPU_WEIGHTS:
            raise RequestError(
                f'cpu_weights "{self.cpu_weights}" is not one of {", ".join(CPU_WEIGHTS)}'
            )
        object.__setattr__(self, "adapters", tuple(self.adapters))  # from JSON comes a list
        names = [adapter_place(text)[0] for text in self.adapters]
        for name in names:
            if names.count(name) > 1:
                raise RequestError(f'adapter "{name}" is given twice; name one NAME=FOLDER')
        if not 0 <= self.cache_share <= 1:
            raise RequestError(f"cache_share must be from 0 to 1, is {self.cache_share!r}")
        if self.overlap not in OVERLAPS:
            raise RequestError(f'overlap "{self.overlap}" is not one of {", ".join(OVERLAPS)}')
        if self.kv_dtype not in KV_DTYPES:
            raise RequestError(f'kv_dtype "{self.kv_dtype}" is not one of {", ".join(KV_DTYPES)}')

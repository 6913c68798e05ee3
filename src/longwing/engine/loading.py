"""`load_engine`: from a folder to an engine whose cache fills the memory there is.

The one idea: a plan first. What the weights and a step's workspace leave of the memory becomes
pages; from the pages follows the longest context, if nobody asked for one.
"""

import os
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longwing.engine.adapters import num_bytes, open_adapters
from longwing.engine.engine import Engine
from longwing.engine.folder import ModelFolder
from longwing.engine.followers import Followers
from longwing.engine.leading_runner import LeadingRunner
from longwing.engine.options import DEFAULTS, EngineOptions
from longwing.engine.runner import Runner
from longwing.engine.status import EngineInfo
from longwing.errors import CapacityError, RequestError
from longwing.layers.lora import attach
from longwing.models import DTYPES, Decoder, find_device, load_model
from longwing.models.memory import out_of_memory
from longwing.models.prepare import prepare, weight_bytes
from longwing.models.sharding import check_split
from longwing.models.streaming import stream_weights
from longwing.parallel import Group
from longwing.plan import (
    PREFILL_CHUNK,
    RUNTIME_BYTES,
    format_size,
    graphs_bytes,
    kv_bytes_per_token,
)

_GPU_SHARE = 0.92
"""Part of a GPU's free memory that is used when no limit is given: other processes need some."""

_CPU_BYTES = {"fast": 2.5, "small": 0.6, "float32": 4.0}
"""Bytes a packed weight takes on a CPU, in the forms it is given there."""

NCCL_BYTES = 512 * 2**20
"""Memory that a rank keeps free for what its sums with the others go through (not yet measured)."""

_HOST_SHARE = 0.25
"""Part of the host's free memory that pages may take. Unused pages cost nothing there."""


def load_engine(
    path: str | Path,
    options: EngineOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    dedicated: bool = False,
) -> tuple[Engine, EngineInfo]:
    """Load a model folder, ready to serve; `close` the engine when done with it.

    Args:
        path: a folder with config.json, safetensors and tokenizer.json.
        options: how; None is the defaults. Of several ranks this process is the first, and starts
            the others.
        progress: called with (bytes read, bytes in all).
        dedicated: this process is nothing but the engine; see `followers.Followers`.

    Raises:
        CheckpointError: the folder cannot be used; says which file or tensor, and why.
        CapacityError: the model or the context asked for does not fit.
        RequestError: this machine has not the devices asked for.
        EngineError: another rank could not be started; says which, and why.
    """
    options = EngineOptions() if options is None else options
    device = rank_device(options, 0)
    folder = ModelFolder.open(path, options.rope)
    options = _settled(options, device)
    if options.tensor_parallel == 1:
        options = replace(options, num_pages=pages_that_fit(folder, options, device))
        model = load_part(folder, options, device, progress=progress)
        return _engine(model, folder, options, Runner)
    check_split(folder.config, options.tensor_parallel)
    with ExitStack() as on_failure:
        followers = Followers(folder.path, options, device, dedicated=dedicated)
        on_failure.callback(followers.close)
        group, num_pages = followers.meet(pages_that_fit(folder, options, device))
        options = replace(options, num_pages=num_pages)
        model = load_part(folder, options, device, group=group, progress=progress)
        engine, info = _engine(model, folder, options, partial(LeadingRunner, followers=followers))
        followers.wait_until_loaded()
        on_failure.pop_all()
    return engine, info


def load_part(
    folder: ModelFolder,
    options: EngineOptions,
    device: torch.device,
    *,
    group: Group | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """One rank's part of the model, in the form in which it is fast; without a group, all of it.

    Args:
        folder: the model's.
        options: with num_pages, and nothing unset.
        device: of this rank.
        group: the ranks.
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: as `load_model`, and `open_adapters`.
        CapacityError: it does not fit the device, or the context asked for not the pages.
    """
    adapters = open_adapters(options, folder.config, folder.checkpoint.config)
    model = load_model(
        folder.path,
        device=device,
        dtype=DTYPES.get(options.dtype),
        context=_context(folder, options),
        rope=None if options.rope is None else folder.config.rope,
        unpack=device.type == "cpu" and options.cpu_weights == "float32",
        progress=progress,
        group=group,
    )
    if adapters:
        attach(model, adapters)
    if device.type == "cpu":
        return prepare(model, options.cpu_weights)
    stream_weights(model)
    torch.cuda.empty_cache()  # What laying out has left behind, before the pages come.
    return model


def rank_device(options: EngineOptions, rank: int) -> torch.device:
    """The device of one rank, made this thread's own; the first rank's is what the options name.

    Raises:
        RequestError: this machine has no such device, or not one for each rank.
    """
    first, size = find_device(options.device), options.tensor_parallel
    if first.type == "cpu":
        return first
    if size == 1:
        if first.index is not None:
            torch.cuda.set_device(first)
        return first
    count, lowest = torch.cuda.device_count(), first.index or 0
    if lowest + size > count:
        raise RequestError(
            f"tensor_parallel is {size}, and from {torch.device('cuda', lowest)} on this machine "
            f"has {count - lowest} of its {count} GPUs; use {count - lowest} or fewer, or show it "
            "more (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", lowest + rank)
    torch.cuda.set_device(device)
    return device


def _settled(options: EngineOptions, device: torch.device) -> EngineOptions:
    """The options with what was left to the kind of device; on a CPU, ranks share its threads."""
    unset: dict[str, Any] = {
        k: v for k, v in DEFAULTS[device.type].items() if _is_unset(options, k)
    }
    options = replace(options, **unset)
    if options.cache_tokens is not None:
        options = replace(options, num_pages=-(-options.cache_tokens // options.page_len))
    if device.type == "cpu":
        exact = options.dtype == "float32" and options.cpu_weights == "auto"
        forms = {"auto": "float32" if exact else "fast"}.get(
            options.cpu_weights, options.cpu_weights
        )
        # Activations are float32 there in any case; the forms say what is multiplied in less.
        options = replace(options, dtype="float32", cpu_weights=forms)
        if options.tensor_parallel > 1:
            torch.set_num_threads(max(torch.get_num_threads() // options.tensor_parallel, 1))
    return options


def _engine(
    model: Decoder, folder: ModelFolder, options: EngineOptions, runner: Callable[..., Runner]
) -> tuple[Engine, EngineInfo]:
    with out_of_memory(f"allocating {options.num_pages} pages of the cache"):
        engine = Engine(model, folder.tokenizer, options, runner=runner)
    return engine, describe(engine, folder)


def _is_unset(options: EngineOptions, name: str) -> bool:
    value = getattr(options, name)
    return value is None or (name == "page_len" and value == 0)


def describe(engine: Engine, folder: ModelFolder) -> EngineInfo:
    """What is served, in plain words and numbers."""
    model = engine.model
    device = model.device
    rotary = model.rotary
    return EngineInfo(
        name=folder.path.name,
        architecture=model.config.family,
        quantization=folder.quantization,
        dtype=_word(model.dtype),
        kv_dtype=_word(engine.runner.pages[0].keys_PBKH.dtype),
        device=str(device),
        device_name=(
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        ),
        vocab_size=model.config.vocab_size,
        context=engine.context,
        num_pages=engine.cache.num_pages,
        page_len=engine.cache.page_len,
        kv_bytes=engine.runner.kv_bytes,
        weight_bytes=weight_bytes(model),
        ranks=model.group.size,
        max_sequences=engine.options.max_sequences,
        max_batch_tokens=engine.options.max_batch_tokens or 0,
        rope_method=rotary.cfg.method if rotary else "alibi",
        rope_rungs=rotary.rungs if rotary else (),
        adapters=engine.runner.adapters.names if engine.runner.adapters else (),
    )


def pages_that_fit(folder: ModelFolder, options: EngineOptions, device: torch.device) -> int:
    """How many pages one rank's memory holds, and no more than could ever be in use at once.

    As many as were asked for, if a number was.

    Raises:
        CapacityError: it does not even hold one sequence of the context asked for.
    """
    if options.num_pages is not None:
        return options.num_pages
    wanted, ranks = options.context or folder.config.context, options.tensor_parallel
    kv_word = _kv_word(folder, options)
    page_bytes = options.page_len * kv_bytes_per_token(folder.config, kv_word) // ranks
    planned = folder.plan(
        context=wanted,
        dtype=options.dtype,
        kv_dtype=kv_word,
        prefill_chunk=options.max_batch_tokens or PREFILL_CHUNK,
    )
    if planned:
        beside = folder.part_bytes(planned.weights, ranks) + planned.workspace.total
        beside -= planned.workspace.graphs  # those of one sequence; there may be more
    else:
        beside = sum(info.nbytes for info in folder.checkpoint.tensors.values())
    if planned and device.type == "cpu":
        beside += int(planned.quantised_parameters * _CPU_BYTES[options.cpu_weights]) // ranks
    beside += num_bytes(options, DTYPES[_activations(folder, options)].itemsize)
    if device.type == "cuda":
        beside += graphs_bytes(folder.config, options.max_sequences)
        beside += NCCL_BYTES if ranks > 1 else 0
    room = _memory(options, device) - beside
    if device.type == "cpu" and options.memory is None:
        room = int(room * _HOST_SHARE)
    most = options.max_sequences * -(-wanted // options.page_len)
    num_pages = min(room // page_bytes, most)
    needed = -(-options.context // options.page_len) if options.context else 1
    if num_pages < needed:
        part = "" if ranks == 1 else f" of one of {ranks} ranks"
        raise CapacityError(
            f"{folder.path.name} and its workspace take {format_size(beside)}{part}, which leaves "
            f"{format_size(max(room, 0))} for the cache; {needed * options.page_len:,} tokens of "
            f"it take {format_size(needed * page_bytes)}; "
            "use a shorter context, a smaller max_batch_tokens, fewer bits, kv_dtype int8 or more "
            "memory"
        )
    return num_pages


def _context(folder: ModelFolder, options: EngineOptions) -> int:
    """The longest sequence to serve: what was asked for, else the claim or what the pages hold."""
    held = (options.num_pages or 1) * options.page_len
    if options.context is None:
        return min(folder.config.context, held)
    if options.context > held:
        raise CapacityError(
            f"a context of {options.context:,} tokens does not fit {options.num_pages} pages of "
            f"{options.page_len}; raise num_pages, or ask for {held:,} or less"
        )
    return options.context


def _memory(options: EngineOptions, device: torch.device) -> int:
    """Bytes the engine may plan with, its weights included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What is free now is beside this process; plans count a process's own share too.
        free = int(free * _GPU_SHARE) + RUNTIME_BYTES
        return free if options.memory is None else min(options.memory, free)
    if options.memory is not None:
        return options.memory
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        # Linux counts as available what its file cache would give back.
        text = Path("/proc/meminfo").read_text()
        (line,) = (line for line in text.splitlines() if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return free // options.tensor_parallel


def _kv_word(folder: ModelFolder, options: EngineOptions) -> str:
    word = options.kv_dtype
    if word == "auto":
        word = _activations(folder, options)
    if word not in (*DTYPES, "int8"):
        raise RequestError(f'kv_dtype "{word}" is not one of {", ".join(DTYPES)}, int8')
    return word


def _activations(folder: ModelFolder, options: EngineOptions) -> str:
    """The number type of activations, of what is not quantised, and of adapters."""
    own = folder.config.dtype if folder.config.dtype in DTYPES else "bfloat16"
    return own if options.dtype == "auto" else options.dtype


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

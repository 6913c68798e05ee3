"""`load_engine`: from a folder to an engine whose cache fills the memory there is.

The one idea: a plan first. What the weights and a step's workspace leave of the memory becomes
pages; from the pages follows the longest context, if nobody asked for one.
"""

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longwing.engine.engine import Engine
from longwing.engine.folder import ModelFolder
from longwing.engine.graphs import GRAPHS_BYTES
from longwing.engine.options import DEFAULTS, EngineOptions
from longwing.engine.status import EngineInfo
from longwing.errors import CapacityError, RequestError
from longwing.models import DTYPES, find_device, load_model
from longwing.models.memory import out_of_memory
from longwing.models.prepare import prepare, weight_bytes
from longwing.models.streaming import stream_weights
from longwing.plan import PREFILL_CHUNK, RUNTIME_BYTES, format_size, kv_bytes_per_token

_GPU_SHARE = 0.92
"""Part of a GPU's free memory that is used when no limit is given: other processes need some."""

_CPU_BYTES = {"fast": 2.5, "small": 0.6, "float32": 4.0}
"""Bytes a packed weight takes on a CPU, in the forms it is given there."""

_HOST_SHARE = 0.25
"""Part of the host's free memory that pages may take. Unused pages cost nothing there."""


def load_engine(
    path: str | Path,
    options: EngineOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Engine, EngineInfo]:
    """Load a model folder, ready to serve.

    Args:
        path: a folder with config.json, safetensors and tokenizer.json.
        options: how; None is the defaults.
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: the folder cannot be used; says which file or tensor, and why.
        CapacityError: the model or the context asked for does not fit.
    """
    options = EngineOptions() if options is None else options
    device = find_device(options.device)
    folder = ModelFolder.open(path, options.rope)
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
    if options.num_pages is None:
        options = replace(options, num_pages=_num_pages(folder, options, device))
    context = _context(folder, options)
    model = load_model(
        folder.path,
        device=device,
        dtype=DTYPES.get(options.dtype),
        context=context,
        rope=None if options.rope is None else folder.config.rope,
        unpack=device.type == "cpu" and options.cpu_weights == "float32",
        progress=progress,
    )
    if device.type == "cpu":
        model = prepare(model, options.cpu_weights)
    else:
        stream_weights(model)
    with out_of_memory(f"allocating {options.num_pages} pages of the cache"):
        engine = Engine(model, folder.tokenizer, options)
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
        max_sequences=engine.options.max_sequences,
        max_batch_tokens=engine.options.max_batch_tokens or 0,
        rope_method=rotary.cfg.method if rotary else "alibi",
        rope_rungs=rotary.rungs if rotary else (),
    )


def _num_pages(folder: ModelFolder, options: EngineOptions, device: torch.device) -> int:
    """How many pages the memory holds, and no more than could ever be in use at once.

    Raises:
        CapacityError: it does not even hold one sequence of the context asked for.
    """
    wanted = options.context or folder.config.context
    kv_word = _kv_word(folder, options)
    page_bytes = options.page_len * kv_bytes_per_token(folder.config, kv_word)
    planned = folder.plan(
        context=wanted,
        dtype=options.dtype,
        kv_dtype=kv_word,
        prefill_chunk=options.max_batch_tokens or PREFILL_CHUNK,
    )
    stored = sum(info.nbytes for info in folder.checkpoint.tensors.values())
    beside = planned.weights.total + planned.workspace.total if planned else stored
    if planned and device.type == "cpu":
        beside += int(planned.quantised_parameters * _CPU_BYTES[options.cpu_weights])
    if device.type == "cuda":
        beside += GRAPHS_BYTES
    room = _memory(options, device) - beside
    if device.type == "cpu" and options.memory is None:
        room = int(room * _HOST_SHARE)
    most = options.max_sequences * -(-wanted // options.page_len)
    num_pages = min(room // page_bytes, most)
    needed = -(-options.context // options.page_len) if options.context else 1
    if num_pages < needed:
        raise CapacityError(
            f"{folder.path.name} and its workspace take {format_size(beside)}, which leaves "
            f"{format_size(max(room, 0))} for the cache; {needed * options.page_len:,} tokens of "
            f"it take {format_size(needed * page_bytes)}; "
            "use a shorter context, fewer bits, kv_dtype int8 or more memory"
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
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        # Linux counts as available what its file cache would give back.
        text = Path("/proc/meminfo").read_text()
        (line,) = (line for line in text.splitlines() if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return free if options.memory is None else options.memory


def _kv_word(folder: ModelFolder, options: EngineOptions) -> str:
    word = options.dtype if options.kv_dtype == "auto" else options.kv_dtype
    if word == "auto":
        word = folder.config.dtype if folder.config.dtype in DTYPES else "bfloat16"
    if word not in (*DTYPES, "int8"):
        raise RequestError(f'kv_dtype "{word}" is not one of {", ".join(DTYPES)}, int8')
    return word


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

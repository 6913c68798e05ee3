"""The batching engine on a GPU: the tokens of the plain path on the CPU."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ids, request, run

from longwing.engine.generator import load
from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("falcon-7b", "falcon-40b", "falcon-rw", "llama3", "llama-dynamic", "mistral")
PATHS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunks and few pages": {"max_batch_tokens": 16, "num_pages": 16, "page_len": 8},
    "drafts": {"max_draft": 6, "draft_sequences": 16},
}


def prompts() -> list[list[int]]:
    dice = random.Random(3)
    shared = [dice.randrange(256) for _ in range(40)]
    own = [[dice.randrange(256) for _ in range(length)] for length in (1, 7, 33)]
    return [*own, shared, [*shared, 9, 9], [5, 6, 7, 8] * 8]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_engine_on_a_gpu_gives_the_plain_paths_tokens(
    name: str, path: str, tiny_folder: Callable[[str], Path]
) -> None:
    options = EngineOptions(device="cuda", dtype="float32", context=128, **PATHS[path])
    engine, info = load_engine(tiny_folder(name), options)
    assert info.device.startswith("cuda")
    told = run(engine, [request(prompt) for prompt in prompts()])
    plain = load(tiny_folder(name), device="cpu", dtype="float32", context=128)
    for place, prompt in enumerate(prompts()):
        alone = plain.generate(prompt, max_new_tokens=24, ignore_eos=True)
        assert ids(told[str(place)]) == alone.token_ids, place
    engine.cache.check([])


def test_cache_on_a_gpu_fills_the_memory_that_is_allowed(
    tiny_folder: Callable[[str], Path],
) -> None:
    options = EngineOptions(device="cuda", dtype="float32", memory=2 * 2**30, max_sequences=4096)
    engine, info = load_engine(tiny_folder("falcon-40b"), options)
    assert info.kv_bytes + info.weight_bytes <= torch.cuda.memory_allocated() <= 2 * 2**30
    assert run(engine, [request([1, 2, 3])])["0"]

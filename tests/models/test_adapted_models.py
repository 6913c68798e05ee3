"""Adapters on models that were rebuilt for speed: what the plain model with adapters gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FalconConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from gptq_writer import write_gptq
from longwing.checkpoint.adapter import Adapter, AdapterConfig
from longwing.layers.lora import AdapterChoice, LoRALinear, adaptable, attach
from longwing.models import Decoder, load_model
from longwing.models.prepare import FastLlamaBlock, prepare, weight_bytes
from longwing.models.streamed_falcon import StreamedFalconBlock
from longwing.models.streamed_llama import StreamedLlamaBlock
from longwing.models.streaming import stream_weights
from tiny import COMMON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "num_attention_heads": 4,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "falcon-40b": lambda: FalconConfig(
        **SHAPE, num_kv_heads=2, new_decoder_architecture=True, alibi=False
    ),
    "falcon-rw": lambda: FalconConfig(
        **SHAPE, alibi=True, parallel_attn=False, multi_query=False, bias=True
    ),
    "llama": lambda: LlamaConfig(**SHAPE, intermediate_size=256, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**SHAPE, intermediate_size=256, num_key_value_heads=2),
}
ALL: tuple[str, ...] = ()
SOME = ("query_key_value", "v_proj", "dense_4h_to_h", "up_proj")


def adapters_for(model: Decoder) -> list[Adapter]:
    """One of every linear of the blocks, and one of another rank for some."""
    return [_random(model, 3, ALL, seed=1), _random(model, 4, SOME, seed=2)]


def _random(model: Decoder, rank: int, targets: tuple[str, ...], seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (0.8 / shape[1] ** 0.5)

    return Adapter(
        path=Path(f"adapter-{seed}"),
        config=AdapterConfig(rank=rank, alpha=1.5 * rank, targets=()),
        layers={
            name: (matrix(rank, linear.in_features), matrix(linear.out_features, rank))
            for name, linear in adaptable(model)
            if name.startswith(model.BLOCKS) and (not targets or name.endswith(targets))
        },
    )


def _hidden(model: Decoder, choice: AdapterChoice | None, of: int | list[int]) -> Tensor:
    """(T, D) of one text, each token through its own adapter."""
    T = 20 if isinstance(of, int) else len(of)
    if choice is not None:
        choice.of = of if isinstance(of, int) else torch.tensor(of, device=model.device)
    tokens_T, positions_T = (torch.arange(T, device=model.device) * step for step in (7, 1))
    with torch.inference_mode():
        return model(tokens_T, positions_T).float()


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


MIXTURES: tuple[int | list[int], ...] = (-1, 0, 1, [0, 1, -1, 1, 0], [1, 0, -1, 0] * 6)


@pytest.mark.parametrize("name", ["falcon-40b", "falcon-rw", "qwen2"])
def test_streamed_blocks_add_what_adapters_add(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    write_gptq(CONFIGS[name](), tmp_path, bits=4, group_size=64)

    def load(kernels: str) -> tuple[Decoder, AdapterChoice]:
        monkeypatch.setenv("LONGWING_KERNELS", kernels)
        model = load_model(tmp_path, device=DEVICE, dtype=torch.float16, unpack=False)
        return model, attach(model, adapters_for(model))

    plain, its_choice = load("reference")
    expected = [_hidden(plain, its_choice, of) for of in MIXTURES]
    fast, choice = load("triton")
    num_bytes = weight_bytes(fast)
    assert stream_weights(fast) > 0
    assert isinstance(fast.blocks[0], (StreamedFalconBlock, StreamedLlamaBlock))
    assert not any(isinstance(module, LoRALinear) for module in fast.modules())
    assert weight_bytes(fast) < 1.3 * num_bytes  # the bases are not kept beside
    for of, expected_TD in zip(MIXTURES, expected, strict=True):
        assert _error(_hidden(fast, choice, of), expected_TD) < 0.01, of
    assert _error(expected[0], expected[1]) > 0.1
    assert _error(expected[2], expected[1]) > 0.1


@pytest.mark.parametrize("base", ["dense", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_prepared_blocks_add_what_adapters_add(name: str, base: str, tmp_path: Path) -> None:
    write_gptq(CONFIGS[name](), tmp_path, bits=4, group_size=32)
    unpack = base == "dense"
    plain, fast = (load_model(tmp_path, unpack=unpack) for _ in range(2))
    (its_choice, choice) = (attach(model, adapters_for(model)) for model in (plain, fast))
    prepare(fast, "float32" if unpack else "fast")
    assert name not in ("llama", "qwen2") or isinstance(fast.blocks[0], FastLlamaBlock)
    for of in MIXTURES:
        error = _error(_hidden(fast, choice, of), _hidden(plain, its_choice, of))
        assert error < (1e-5 if unpack else 0.03), of


def test_models_without_adapters_run_the_same_operations_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attaching none leaves every linear, and every product of a rebuilt block, as it was."""
    write_gptq(CONFIGS["llama"](), tmp_path, bits=4, group_size=64)
    monkeypatch.setenv("LONGWING_KERNELS", "triton")
    model = load_model(tmp_path, device=DEVICE, dtype=torch.float16, unpack=False)
    attach(model, [])
    stream_weights(model)
    assert all(getattr(module, "added", None) is None for module in model.modules())

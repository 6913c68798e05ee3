"""Adapters round linears: the sum by hand, packed bases, mixtures, and what does not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longwing.checkpoint.adapter import Adapter, AdapterConfig
from longwing.errors import CheckpointError
from longwing.kernels import dequantize
from longwing.layers import Linear
from longwing.layers.lora import AdapterChoice, Gate, LoRALinear, adaptable, attach, wrap
from longwing.models import load_model
from longwing.models.prepare import prepare
from longwing.parallel import shard_linear

LAYER = "transformer.h.1.mlp.dense_h_to_4h"


def _adapter(layers: dict[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
    """Random sides for layers of these (O, I)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 4

    return Adapter(
        path=Path(f"adapter-{seed}"),
        config=AdapterConfig(rank=rank, alpha=2.0 * rank, targets=(), base_model="other"),
        layers={
            name: (random(rank, shape[1]), random(shape[0], rank)) for name, shape in layers.items()
        },
    )


def _shapes(folder: Path) -> dict[str, tuple[int, int]]:
    model = load_model(folder)
    return {
        name: (linear.out_features, linear.in_features)
        for name, linear in adaptable(model)
        if name.startswith(model.BLOCKS)
    }


def test_adapter_adds_scale_times_b_a_x(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("falcon-40b")
    adapter = _adapter({LAYER: _shapes(folder)[LAYER]}, rank=4, seed=1)
    model = load_model(folder)
    linear = model.get_submodule(LAYER)
    assert isinstance(linear, Linear)
    x_TI = torch.randn(5, linear.in_features)
    before_TO = linear(x_TI)
    attach(model, [adapter])
    A_RI, B_OR = adapter.layers[LAYER]
    after_TO = model.get_submodule(LAYER)(x_TI)
    torch.testing.assert_close(after_TO, before_TO + 2 * x_TI @ A_RI.T @ B_OR.T)


def test_an_overflow_in_one_adapters_ranks_is_nothing_to_the_others_tokens() -> None:
    gate = Gate([(0, 1, 2.0), (1, 1, 1.0)], torch.empty(0, dtype=torch.float16))
    gate.choose(torch.tensor([0, 1, -1]))
    low_TR = torch.tensor([[1.0, torch.inf]] * 3, dtype=torch.float16)
    assert gate.through(low_TR).tolist() == [[2.0, 0.0], [0.0, 65504.0], [0.0, 0.0]]


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_mixed_batch_gives_each_token_its_own_adapter(
    base: str, tiny_folder: Callable[[str], Path], packed_folder: Callable[[int], Path]
) -> None:
    folder = packed_folder(4) if base == "packed" else tiny_folder("falcon-40b")
    adapters = [_adapter(_shapes(folder), rank, seed=rank) for rank in (2, 5)]
    tokens_T, positions_T = torch.arange(12) * 7, torch.arange(12)
    model = load_model(folder, unpack=False)
    linear = dict(adaptable(model))[LAYER]
    assert isinstance(linear, Linear)
    assert (linear.bits == 4) == (base == "packed")
    none_TD = model(tokens_T, positions_T)
    choice = attach(model, adapters)
    alone = []
    for adapter in adapters:
        single = load_model(folder, unpack=False)
        attach(single, [adapter])
        alone.append(single(tokens_T, positions_T))
    for index, expected_TD in ((-1, none_TD), (0, alone[0]), (1, alone[1])):
        choice.of = index
        torch.testing.assert_close(model(tokens_T, positions_T), expected_TD)
        choice.of = torch.full((12,), index)
        torch.testing.assert_close(model(tokens_T, positions_T), expected_TD)
    layer = model.get_submodule(LAYER)
    x_TI, of_T = torch.randn(3, linear.in_features), torch.tensor([1, -1, 0])
    choice.of = of_T
    mixed_TO = layer(x_TI)
    for token, index in enumerate(of_T.tolist()):
        choice.of = index
        torch.testing.assert_close(mixed_TO[token], layer(x_TI)[token])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradient_through_packed_weights_is_that_of_the_dense_ones_and_keeps_none(
    bits: int, packed_folder: Callable[[int], Path]
) -> None:
    model = load_model(packed_folder(bits), unpack=False)
    layer = wrap(model, LAYER, AdapterChoice())
    assert isinstance(layer.base, Linear)
    packed = layer.base.packed
    assert packed is not None
    dense_OI = dequantize(packed, torch.float32).T
    x_TI = torch.randn(6, layer.in_features, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out_TO = layer(x_TI)
    assert all(tensor.numel() < dense_OI.numel() for tensor in kept)
    slope_TO = torch.randn_like(out_TO)
    (own,) = torch.autograd.grad(out_TO, x_TI, slope_TO)
    torch.testing.assert_close(out_TO, x_TI @ dense_OI.T)
    torch.testing.assert_close(own, slope_TO @ dense_OI)


@pytest.mark.parametrize("leaf", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"])
def test_ranks_that_share_a_linear_share_what_is_added_to_it(
    leaf: str, tiny_folder: Callable[[str], Path]
) -> None:
    folder = tiny_folder("falcon-40b")
    name = next(name for name in _shapes(folder) if name.endswith(f".{leaf}"))
    adapter = _adapter({name: _shapes(folder)[name]}, rank=3, seed=1)
    whole = load_model(folder)
    attach(whole, [adapter])
    module = whole.get_submodule(name)
    assert isinstance(module, LoRALinear)
    x_TI = torch.randn(4, module.in_features)
    expected_TO = module(x_TI) - module.base(x_TI)
    parts = []
    for rank in range(2):
        model = load_model(folder)
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        K = model.config.num_kv_heads
        shard = shard_linear(name, linear.in_features, linear.out_features, K, size=2, rank=rank)
        linear.take_part(shard)
        nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
        attach(model, [adapter])
        parts.append(model.get_submodule(name)(x_TI[:, shard.ins]))
    found_TO = sum(parts) if shard.sums else torch.cat(parts, 1)
    torch.testing.assert_close(found_TO, expected_TO, rtol=1e-4, atol=1e-5)


def test_adapter_of_another_model_is_refused_by_name_or_shape(
    tiny_folder: Callable[[str], Path],
) -> None:
    model = load_model(tiny_folder("llama2"))
    falcon = _adapter(_shapes(tiny_folder("falcon-40b")), rank=2, seed=0)
    with pytest.raises(CheckpointError, match=r"h\.0.*no such linear.*another model \('other'\)"):
        attach(model, [falcon])
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(CheckpointError, match=r"adapts 64 -> 80 .* has 64 -> 96"):
        attach(model, [_adapter({name: (80, 64)}, rank=2, seed=0)])
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_falcon_prepared_for_the_cpu_keeps_its_adapter(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("falcon-40b")
    model = load_model(folder)
    attach(model, [_adapter(_shapes(folder), rank=3, seed=0)])
    tokens_T, positions_T = torch.arange(9), torch.arange(9)
    expected_TD = model(tokens_T, positions_T)
    prepared = prepare(model, "float32")
    torch.testing.assert_close(prepared(tokens_T, positions_T), expected_TD, rtol=1e-4, atol=1e-4)


def test_scale_is_alpha_over_the_rank_or_over_its_root() -> None:
    config = AdapterConfig(rank=16, alpha=32, targets=())
    assert config.scale == 2
    assert replace(config, use_rslora=True).scale == 8

"""Turning a dense model: the same logits, and blocks that are read one at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longwing.checkpoint import Checkpoint, write_shards
from longwing.errors import ConfigError
from longwing.models import Decoder, Filler, ModelConfig, empty_model, take_inventory
from longwing.quant.rotation import hadamard, mixing, rotated, turn
from tiny import ARCHITECTURES

LLAMAS = sorted(name for name in ARCHITECTURES if not name.startswith("falcon"))


def _in_float64(folder: Path, target: Path) -> Path:
    """A tiny model with float64 tensors, so that nothing hides behind rounding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.save_pretrained(target)
    return target


def _loaded(checkpoint: Checkpoint) -> Decoder:
    config = ModelConfig.from_hf(checkpoint.config)
    model = empty_model(config)
    inventory = take_inventory(model, checkpoint)
    assert not inventory.problems
    Filler(
        model=model,
        checkpoint=checkpoint,
        device=torch.device("cpu"),
        dtype=torch.float64,
        unpack=False,
    ).fill(inventory)
    model.place_tables(torch.device("cpu"))
    return model


@torch.inference_mode()
def _logits(model: Decoder) -> torch.Tensor:
    tokens_T = torch.arange(60, 90)
    return model.lm_head(model(tokens_T, torch.arange(30)))  # Decoder.logits would make float32


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "heads") for name in sorted(ARCHITECTURES)), *((name, "full") for name in LLAMAS)],
)
def test_turned_model_has_the_logits_of_the_unturned_one(
    name: str, how: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = Checkpoint.open(_in_float64(tiny_folder(name), tmp_path / "wide"))
    turned = rotated(plain, how)
    assert any(not torch.equal(turned.read(name), plain.read(name)) for name in plain.tensors)
    expected_TV, actual_TV = _logits(_loaded(plain)), _logits(_loaded(turned))
    error = (actual_TV - expected_TV).norm() / expected_TV.norm()
    assert error < (1e-9 if how == "heads" else 1e-6)  # RMSNorm computes in float32


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "falcon3"])
@torch.inference_mode()
def test_transformers_reads_a_turned_folder(
    name: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    turned = rotated(Checkpoint.open(tiny_folder(name)), "full")
    write_shards(tmp_path, ((name, turned.read(name)) for name in turned.tensors), {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(turned.config))
    tokens_1T = torch.arange(60, 90)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder)(tokens_1T).logits
        for folder in (tiny_folder(name), tmp_path)
    )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_full_turn_of_a_model_with_layer_norm_is_refused(
    tiny_folder: Callable[[str], Path],
) -> None:
    with pytest.raises(ConfigError, match=r"needs RMSNorm.*take heads"):
        rotated(Checkpoint.open(tiny_folder("falcon-40b")), "full")


@pytest.mark.parametrize("size", [1, 2, 64, 80, 128, 576, 4544])
@pytest.mark.parametrize("make", [hadamard, mixing])
def test_rotations_are_orthogonal_and_spread_a_unit_vector(
    make: Callable[[int], tuple[torch.Tensor, ...]], size: int
) -> None:
    x = torch.eye(size, dtype=torch.float64)[: min(size, 20)]
    turned = turn(x, make(size))
    torch.testing.assert_close(turned @ turned.T, x @ x.T, rtol=0, atol=1e-12)
    if size >= 64:
        assert float(turned.abs().max()) < 0.45

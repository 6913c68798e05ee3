"""Adapter folders: what peft writes is read, what we write peft reads, anything else is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longwing.checkpoint.adapter import Adapter, AdapterConfig, write_adapter
from longwing.engine.generator import load
from longwing.errors import CheckpointError, ConfigError

LAYER = "transformer.h.0.self_attention.query_key_value"
PREFIX = f"base_model.model.{LAYER}"

# What peft 0.21.2 writes for a LoraConfig(r=4, lora_alpha=8) of two kinds of layers.
PEFT: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": {"base_model_class": "FalconForCausalLM", "parent_library": "transformers"},
    "base_model_name_or_path": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False,
    "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
    "rank_pattern": {}, "revision": None, "target_modules": ["query_key_value"],
    "target_parameters": None, "task_type": None, "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    "velora_config": None,
}  # fmt: skip


def _tensors(rank: int = 4) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}.lora_A.weight": torch.ones(rank, 128),
        f"{PREFIX}.lora_B.weight": torch.ones(192, rank),
    }


def _write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**PEFT, **config}))
    save_file(_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def test_what_peft_writes_is_read(tmp_path: Path) -> None:
    adapter = Adapter.open(_write(tmp_path / "a"))
    assert adapter.config == AdapterConfig(rank=4, alpha=8, targets=("query_key_value",))
    assert adapter.config.scale == 2
    assert list(adapter.layers) == [LAYER]
    assert Adapter.open(_write(tmp_path / "b", target_modules="all-linear")).config.targets == ()


def test_what_is_written_is_read_back_with_peft_s_names(tmp_path: Path) -> None:
    config = AdapterConfig(rank=2, alpha=3.0, targets=("dense",), use_rslora=True, base_model="m")
    layers = {"transformer.h.0.self_attention.dense": (torch.randn(2, 8), torch.randn(6, 2))}
    settings = {"rope_theta": 1e6, "max_position_embeddings": 4096}
    write_adapter(tmp_path, config, layers, settings, {"steps": 3})
    back = Adapter.open(tmp_path)
    assert (back.config, dict(back.settings)) == (config, settings)
    for name, sides in layers.items():
        assert all(torch.equal(a, b) for a, b in zip(sides, back.layers[name], strict=True))
    files = {"adapter_config.json", "adapter_model.safetensors", "longwing_tuning.json"}
    assert {file.name for file in tmp_path.iterdir()} == files
    prefix = "base_model.model.transformer.h.0.self_attention.dense"
    names = {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == names
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw.items() >= {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3.0, "bias": "none",
        "target_modules": ["dense"], "use_rslora": True, "base_model_name_or_path": "m",
    }.items()  # fmt: skip
    assert set(raw) <= set(PEFT)


# peft asks transformers for a name that is on its way out.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_peft_loads_what_is_written_and_gives_the_same_logits(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    folder = tiny_folder("falcon-40b")
    generator = torch.Generator().manual_seed(0)
    layers = {
        f"transformer.h.{block}.self_attention.query_key_value": (
            torch.randn(4, 128, generator=generator) / 8,
            torch.randn(192, 4, generator=generator) / 8,
        )
        for block in (0, 1)
    }
    config = AdapterConfig(rank=4, alpha=8, targets=("query_key_value",))
    write_adapter(tmp_path, config, layers, {}, {})
    tokens = list(range(0, 300, 9))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        plain_TV = model(torch.tensor([tokens])).logits[0]
        tuned = peft.PeftModel.from_pretrained(model, tmp_path)
        expected_TV = tuned(torch.tensor([tokens])).logits[0]
    found_TV = load(folder, device="cpu", adapter=tmp_path).logits(tokens)
    torch.testing.assert_close(found_TV, expected_TV, rtol=1e-4, atol=1e-4)
    assert (found_TV - plain_TV).abs().max() > 0.1


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("use_dora", True, "DoRA"),
        ("peft_type", "IA3", 'only "LORA"'),
        ("r", 0, "rank from 1"),
        ("r", True, "rank from 1"),
        ("r", "8", "rank from 1"),
        ("lora_alpha", float("inf"), "not valid JSON"),
        ("lora_alpha", -1, "above 0"),
        ("lora_alpha", None, "above 0"),
        ("bias", "all", "biases"),
        ("modules_to_save", ["lm_head"], "whole layers"),
        ("rank_pattern", {"dense": 4}, "ranks that differ"),
        ("alpha_pattern", {"dense": 4}, "scales that differ"),
        ("init_lora_weights", "pissa", "change the base weights"),
        ("target_modules", [3], "list of layer names"),
        ("use_rslora", "yes", "true or false"),
        ("brand_new_method", {"on": True}, "does not know it"),
        ("trainable_token_indices", [1, 2], "embedding rows"),
    ],
)
def test_settings_that_are_not_plain_lora_are_refused_with_value_and_remedy(
    field: str, value: object, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        Adapter.open(_write(tmp_path / "a", **{field: value}))
    assert "adapter_config.json" in str(caught.value)
    if "JSON" not in reason:
        assert f'"{field}"' in str(caught.value)
        assert "use a plain LoRA adapter" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{PREFIX}.lora_A.weight": None}, "has no lora_A"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(3, 128)}, "not of rank 4"),
        ({f"{PREFIX}.lora_B.weight": torch.full((192, 4), torch.nan)}, "not finite"),
        ({f"{PREFIX}.lora_B.weight": torch.ones(192, 4, dtype=torch.int32)}, "floating-point"),
        ({f"{PREFIX}.lora_B.weight": torch.ones(192)}, "floating-point matrix"),
        ({f"{PREFIX}.lora_magnitude_vector": torch.ones(1)}, "is not named"),
        ({"base_model.model.other.lora_A.weight": torch.ones(4, 8)}, "has no lora_B"),
        (
            {
                "base_model.model.other.lora_A.weight": torch.ones(4, 8),
                "base_model.model.other.lora_B.weight": torch.ones(8, 4),
            },
            "not among the target_modules",
        ),
    ],
)
def test_tensors_that_do_not_make_an_adapter_are_refused_by_name(
    change: dict[str, torch.Tensor | None], reason: str, tmp_path: Path
) -> None:
    changed = {**_tensors(), **change}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=reason):
        Adapter.open(_write(tmp_path / "a", tensors))


def test_folder_that_is_no_adapter_is_refused(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is missing"):
        Adapter.open(tiny_folder("llama2"))
    with pytest.raises(CheckpointError, match="is not a folder"):
        Adapter.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="names 'dense', of which"):
        Adapter.open(_write(tmp_path / "a", target_modules=["query_key_value", "dense"]))
    with pytest.raises(CheckpointError, match="nowhere: is not a folder"):
        Adapter.size("nowhere")


def test_settings_beside_an_adapter_replace_rope_alone(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a")
    (folder / "longwing_tuning.json").write_text('{"settings": {"auto_map": {}}}')
    with pytest.raises(ConfigError, match="'auto_map' is not one of"):
        Adapter.open(folder)
    (folder / "longwing_tuning.json").write_text('{"settings": 5}')
    with pytest.raises(ConfigError, match="not an object"):
        Adapter.open(folder)

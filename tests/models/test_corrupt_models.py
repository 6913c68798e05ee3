"""Every kind of broken folder through the whole loader: a clear CheckpointError, nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FalconConfig

from checkpoint.corrupt import CorruptCase, cases
from gptq_writer import write_gptq
from longwing.engine.generator import load
from longwing.errors import CheckpointError, ConfigError
from longwing.models import load_model
from longwing.verify import verify
from tiny import ARCHITECTURES, COMMON, save_model, write_tokenizer

CASES = cases()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense Llama and a packed Falcon, both loadable."""
    base = tmp_path_factory.mktemp("good")
    folders = {"dense": base / "dense", "packed": base / "packed"}
    for folder in folders.values():
        folder.mkdir()
        write_tokenizer(folder)
    save_model(ARCHITECTURES["llama-mqa"](), folders["dense"])
    shape: dict[str, Any] = {**COMMON, "hidden_size": 64, "num_attention_heads": 4}
    write_gptq(FalconConfig(**shape, bias=False), folders["packed"], bits=4, group_size=32)
    for folder in folders.values():
        load_model(folder)
        assert verify(folder).ok
    return folders


def _refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    verdict = verify(folder)
    assert not verdict.ok
    assert str(caught.value) in {str(problem) for problem in verdict.problems}
    return caught.value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_corrupt_folder_is_refused_with_file_tensor_and_reason(
    case: CorruptCase, good: dict[str, Path], tmp_path: Path
) -> None:
    kind = "packed" if case.needs == "any" else case.needs
    folder = shutil.copytree(good[kind], tmp_path / "model")
    case.build(folder)
    message = str(_refused(folder))
    assert message.isprintable()
    assert all(part in message for part in case.expected), (case.expected, message)


def _config(**changes: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return build


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)

    return build


def _put_nan(name: str) -> Callable[[Path], None]:
    return _tensors(lambda tensors: tensors[name].view(-1).__setitem__(3, float("nan")))


EMBED = "model.embed_tokens.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
MODEL_CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no model type": (_config(model_type=None), ("config.json", "model_type")),
    "model type that names code": (_config(model_type="../evil"), ("config.json", "model_type")),
    "kv heads 0": (_config(num_key_value_heads=0), ("config.json", "num_key_value_heads", "0")),
    "more kv heads than heads": (_config(num_key_value_heads=8), ("num_key_value_heads", "8")),
    "kv heads that do not divide": (_config(num_key_value_heads=3), ("3 key/value heads", "4")),
    "huge layer count": (_config(num_hidden_layers=10**9), ("num_hidden_layers", "1024")),
    "huge hidden size": (_config(hidden_size=2**40), ("hidden_size", "131072")),
    "layers as text": (_config(num_hidden_layers="2; import os"), ("num_hidden_layers",)),
    "layers as true": (_config(num_hidden_layers=True), ("num_hidden_layers", "True")),
    "one layer too many": (_config(num_hidden_layers=3), ("model.layers.2.", "missing")),
    "one layer too few": (_config(num_hidden_layers=1), ("model.layers.1.", "does not imply")),
    "vocabulary unlike the embedding": (_config(vocab_size=400), (EMBED, "[320, 64]", "[400, 64]")),
    "mlp unlike the weights": (_config(intermediate_size=128), (GATE, "[96, 64]", "[128, 64]")),
    "biases that are not there": (_config(attention_bias=True), ("q_proj.bias", "missing")),
    "tied by mistake": (_config(tie_word_embeddings="yes"), ("tie_word_embeddings", "yes")),
    "rope factor 0": (
        _config(rope_parameters={"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}),
        ("config.json", "factor"),
    ),
    "rope factor nan": (
        _config(rope_parameters={"rope_type": "yarn", "factor": float("nan"), "rope_theta": 1e4}),
        ("config.json", "NaN"),
    ),
    "rope factor 1e308": (
        _config(rope_parameters={"rope_type": "dynamic", "factor": 1e308, "rope_theta": 1e4}),
        ("config.json", "factor"),
    ),
    "unknown rope field": (
        _config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "magic": 1}),
        ("config.json", "magic"),
    ),
    "eos outside the vocabulary": (_config(eos_token_id=320), ("eos_token_id", "320")),
    "nan weight": (_put_nan(GATE), ("model.safetensors", GATE, "not finite")),
    "integer weight": (
        _tensors(lambda t: t.update({GATE: t[GATE].to(torch.int32)})),
        ("model.safetensors", GATE, "int32"),
    ),
    "missing head": (
        _tensors(lambda t: t.pop("lm_head.weight")),
        ("lm_head.weight", "missing", "tie_word_embeddings"),
    ),
    "missing norm": (_tensors(lambda t: t.pop("model.norm.weight")), ("model.norm.weight",)),
    "tensor of another model": (
        _tensors(lambda t: t.update({"vision.weight": torch.ones(1)})),
        ("model.safetensors", "vision.weight", "does not imply"),
    ),
    "transposed weight": (
        _tensors(lambda t: t.update({GATE: t[GATE].T})),
        ("model.safetensors", GATE, "[64, 96]", "[96, 64]"),
    ),
}


@pytest.mark.parametrize("name", MODEL_CASES)
def test_folder_at_odds_with_its_config_is_refused(
    name: str, good: dict[str, Path], tmp_path: Path
) -> None:
    build, expected = MODEL_CASES[name]
    folder = shutil.copytree(good["dense"], tmp_path / "model")
    build(folder)
    message = str(_refused(folder))
    assert all(part in message for part in expected), (expected, message)


def test_packed_layer_without_the_bias_its_model_has_is_refused_by_name(tmp_path: Path) -> None:
    shape: dict[str, Any] = {**COMMON, "hidden_size": 64, "num_attention_heads": 4}
    config = FalconConfig(**shape, alibi=True, parallel_attn=False, multi_query=False, bias=True)
    write_gptq(config, tmp_path, bits=4, group_size=32)
    write_tokenizer(tmp_path)
    name = "transformer.h.1.mlp.dense_h_to_4h.bias"
    _put_nan(name)(tmp_path)
    assert "not finite" in str(_refused(tmp_path))
    _tensors(lambda tensors: tensors.pop(name))(tmp_path)
    assert name in str(_refused(tmp_path))


@pytest.mark.parametrize("end", [999, "x", [2, 1.5]])
def test_generation_config_that_names_no_tokens_is_refused(
    end: object, good: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(good["dense"], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(ConfigError, match=r"generation_config.json.*eos_token_id"):
        load(folder)
    assert not verify(folder).ok


def test_corpus_is_large() -> None:
    assert len(CASES) + len(MODEL_CASES) >= 60


def test_weight_too_large_for_float16_is_refused_with_a_way_out(
    good: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(good["dense"], tmp_path / "model")
    _tensors(lambda t: t[GATE].view(-1).__setitem__(0, 1e6))(folder)
    load_model(folder, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"gate_proj.*do not fit float16.*bfloat16"):
        load_model(folder, dtype=torch.float16)


def test_verify_lists_every_problem_not_the_first_alone(
    good: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(good["dense"], tmp_path / "model")
    _put_nan(GATE)(folder)
    _put_nan("model.norm.weight")(folder)
    (folder / "tokenizer.json").write_text("[]")
    problems = verify(folder).problems
    assert {problem.tensor for problem in problems} == {GATE, "model.norm.weight", None}
    (tokenizer,) = verify(folder, values=False).problems
    assert tokenizer.file == "tokenizer.json"

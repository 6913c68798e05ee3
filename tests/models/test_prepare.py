"""Prepared models against the same models unprepared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from gptq_writer import write_gptq
from longwing.engine.generator import Generator
from longwing.errors import RequestError
from longwing.kernels import AttentionInputs, KVPages
from longwing.models import Decoder, load_model
from longwing.models.prepare import prepare
from longwing.tokenizer import Tokenizer
from tiny import ARCHITECTURES, COMMON

Folder = Callable[[str], Path]
T = 48


def _tokens(length: int = T) -> torch.Tensor:
    return torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(1))


def _logits(model: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(model(_tokens(), torch.arange(T)))


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_form_gives_the_plain_models_logits_and_greedy_tokens(
    name: str, tiny_folder: Folder
) -> None:
    folder = tiny_folder(name)
    plain, fast = load_model(folder), prepare(load_model(folder), "float32")
    assert _relative_error(_logits(fast), _logits(plain)) < 1e-5
    answers = []
    for model in (plain, fast):
        generator = Generator(model, Tokenizer.from_folder(folder))
        prompt = _tokens(24).tolist()
        answers.append(generator.generate(prompt, max_new_tokens=24, ignore_eos=True).token_ids)
    assert answers[0] == answers[1]


def _config(family: str) -> PretrainedConfig:
    shape: dict[str, Any] = {**COMMON, "num_hidden_layers": 2, "hidden_size": 128}
    if family == "falcon":
        return FalconConfig(
            **shape,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            ffn_hidden_size=256,
        )
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    return kind(**shape, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256)


@pytest.mark.parametrize("weights", ["fast", "small"])
@pytest.mark.parametrize("desc_act", [False, True], ids=["natural", "act-order"])
@pytest.mark.parametrize(("bits", "sym"), [(2, False), (3, True), (4, True), (4, False), (8, True)])
@pytest.mark.parametrize("family", ["falcon", "llama", "qwen2"])
def test_packed_model_keeps_its_logits_within_a_few_percent(
    family: str, bits: int, sym: bool, desc_act: bool, weights: str, tmp_path: Path
) -> None:
    write_gptq(_config(family), tmp_path, bits=bits, group_size=32, sym=sym, desc_act=desc_act)
    plain = load_model(tmp_path, unpack=True)
    fast = prepare(load_model(tmp_path, unpack=False), weights)
    assert _relative_error(_logits(fast), _logits(plain)) < 0.03


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_decoding_over_pages_gives_the_logits_of_the_whole_sequence(
    dtype: str, tiny_folder: Folder
) -> None:
    model = prepare(load_model(tiny_folder("llama2")), "float32")
    expected_TV, config = _logits(model), model.config
    pages = tuple(
        KVPages.allocate(1, T, config.num_kv_heads, config.head_dim, dtype)
        for _ in range(config.num_layers)
    )
    rung = model.rotary.rung_for(T, 0) if model.rotary else 0
    for first, last in [(0, 40), *((t, t + 1) for t in range(40, T))]:
        positions_T = torch.arange(first, last)
        cos_TF, sin_TF = model.rotary.rows(rung, positions_T) if model.rotary else (None, None)
        inputs = AttentionInputs(
            starts_S1=torch.tensor([0, last - first], dtype=torch.int32),
            context_lens_S=torch.tensor([last], dtype=torch.int32),
            page_tables_SM=torch.zeros(1, 1, dtype=torch.int32),
            slots_T=positions_T,
            pages=pages,
            cos_TF=cos_TF,
            sin_TF=sin_TF,
        )
        with torch.inference_mode():
            actual_TV = model.logits(model(_tokens()[first:last], positions_T, inputs))
        error = _relative_error(actual_TV, expected_TV[first:last])
        assert error < (1e-5 if dtype == "float32" else 0.05)


def test_unknown_form_is_refused_and_told_the_known_ones(tiny_folder: Folder) -> None:
    with pytest.raises(RequestError, match='"tiny" are not one of fast, small, float32'):
        prepare(load_model(tiny_folder("llama2")), "tiny")

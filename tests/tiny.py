"""Every supported architecture and variant at a few thousand parameters, as transformers models.

All weights are random and none is left at its neutral start (norms at 1, biases at 0), so that a
part that is left out, or applied twice, shows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCAB = 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": 256,
}


def _falcon(**settings: Any) -> FalconConfig:
    defaults: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "alibi": False}
    return FalconConfig(**{**COMMON, "max_position_embeddings": 256, **defaults, **settings})


def _llama(kind: type[PretrainedConfig] = LlamaConfig, **settings: Any) -> PretrainedConfig:
    defaults: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    }
    return kind(**{**COMMON, **defaults, **settings})


def _rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **settings}}


ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "falcon-rw": lambda: _falcon(alibi=True, parallel_attn=False, multi_query=False, bias=True),
    "falcon-rw-12-heads": lambda: _falcon(
        alibi=True, parallel_attn=False, multi_query=False, bias=True,
        hidden_size=96, num_attention_heads=12,
    ),
    "falcon-7b": lambda: _falcon(hidden_size=112, num_attention_heads=7, multi_query=True),
    "falcon-7b-untied": lambda: _falcon(multi_query=True, tie_word_embeddings=False),
    "falcon-sequential-rotary": lambda: _falcon(parallel_attn=False, multi_query=True),
    "falcon-parallel-per-head": lambda: _falcon(multi_query=False),
    "falcon-40b": lambda: _falcon(
        hidden_size=128, num_attention_heads=8, num_kv_heads=2, new_decoder_architecture=True
    ),
    "falcon-180b": lambda: _falcon(
        hidden_size=128, num_attention_heads=8, num_kv_heads=2, new_decoder_architecture=True,
        ffn_hidden_size=192, tie_word_embeddings=False,
    ),
    "falcon2-11b": lambda: _falcon(
        num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1,
        **_rope("default", rope_theta=500042.0),
    ),
    "llama2": lambda: _llama(),
    "llama2-biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-mqa": lambda: _llama(num_key_value_heads=1),
    "llama3": lambda: _llama(
        num_key_value_heads=2,
        **_rope("llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-linear": lambda: _llama(**_rope("linear", factor=2.0)),
    "llama-yarn": lambda: _llama(
        **_rope("yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    # The length compared in the tests is 64: the second rung of this ladder.
    "llama-dynamic": lambda: _llama(max_position_embeddings=32, **_rope("dynamic", factor=2.0)),
    "llama-longrope": lambda: _llama(
        **_rope("longrope", factor=4.0, original_max_position_embeddings=32,
                short_factor=[1.0 + 0.1 * i for i in range(8)],
                long_factor=[2.0 + 0.3 * i for i in range(8)]),
    ),
    "smollm2": lambda: _llama(
        hidden_size=48, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
        **_rope("default", rope_theta=100000.0),
    ),
    "falcon3": lambda: _llama(num_attention_heads=2, num_key_value_heads=1, head_dim=64),
    "mistral": lambda: _llama(MistralConfig, num_key_value_heads=2, sliding_window=9),
    "mistral-whole-context": lambda: _llama(
        MistralConfig, num_key_value_heads=2, sliding_window=None
    ),
    "qwen2": lambda: _llama(Qwen2Config, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-window": lambda: _llama(
        Qwen2Config, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
}  # fmt: skip


def make_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The transformers model with random weights, float32, ready to run."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0, 0.1).add_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
    return model


def save_model(config: PretrainedConfig, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Save as transformers saves: config.json, generation_config.json, model.safetensors."""
    model = make_model(config, seed)
    model.save_pretrained(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with one special token, `<end>` = 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = RustTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

"""config.json read strictly: published files as they are, and every wrong value by name."""

import math
from typing import Any

import pytest
from transformers import MistralConfig

from longwing.errors import ConfigError
from longwing.models import ModelConfig

# As published; fields of no interest here left out, code-naming ones kept on purpose.
FALCON_40B_2023: dict[str, Any] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["RWForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_RW.RWConfig"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "RefinedWeb",
    "n_head": 128,
    "n_head_kv": 8,
    "n_layer": 60,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.26.0",
    "use_cache": True,
    "vocab_size": 65024,
}
FALCON_7B_2023 = {
    **{k: v for k, v in FALCON_40B_2023.items() if k != "n_head_kv"},
    "hidden_size": 4544,
    "model_type": "RefinedWebModel",
    "multi_query": True,
    "n_head": 71,
    "n_layer": 32,
}
FALCON_RW_1B_2023 = {
    **{k: v for k, v in FALCON_40B_2023.items() if k != "n_head_kv"},
    "alibi": True,
    "bias": True,
    "hidden_size": 2048,
    "model_type": "RefinedWebModel",
    "multi_query": False,
    "n_head": 32,
    "n_layer": 24,
    "parallel_attn": False,
    "vocab_size": 50304,
}
FALCON_11B = {
    "model_type": "falcon",
    "new_decoder_architecture": True,
    "num_ln_in_parallel_attn": 1,
    "num_attention_heads": 32,
    "num_kv_heads": 8,
    "num_hidden_layers": 60,
    "hidden_size": 4096,
    "ffn_hidden_size": 16384,
    "max_position_embeddings": 8192,
    "rope_theta": 500042.0,
    "vocab_size": 65024,
    "tie_word_embeddings": False,
}
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 49152,
}


def test_falcon_40b_of_2023_is_the_new_decoder_by_its_model_type() -> None:
    config = ModelConfig.from_hf(FALCON_40B_2023)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (128, 8, 64)
    assert (config.num_layers, config.mlp_size, config.vocab_size) == (60, 32768, 65024)
    assert (config.parallel_block, config.num_norms, config.tie_embeddings) == (True, 2, True)
    assert config.kv_bytes_per_token(2) == 122_880
    assert config.unknown == ()


def test_falcon_7b_of_2023_has_one_kv_head_and_one_norm() -> None:
    config = ModelConfig.from_hf(FALCON_7B_2023)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (71, 1, 64)
    assert (config.parallel_block, config.num_norms, config.mlp_size) == (True, 1, 18176)


def test_falcon_rw_of_2023_uses_alibi_and_biases_and_2048_positions() -> None:
    config = ModelConfig.from_hf(FALCON_RW_1B_2023)
    assert config.rope is None
    assert (config.num_kv_heads, config.parallel_block, config.num_norms) == (32, False, 2)
    assert (config.qkv_bias, config.mlp_bias, config.max_position) == (True, True, 2048)


def test_falcon_11b_has_grouped_heads_and_one_norm() -> None:
    config = ModelConfig.from_hf(FALCON_11B)
    assert (config.num_kv_heads, config.head_dim, config.num_norms) == (8, 128, 1)
    assert config.rope is not None
    assert config.rope.theta == 500042.0


def test_old_and_new_names_of_one_model_read_equal() -> None:
    renamed = {"n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
    renamed |= {"n_layer": "num_hidden_layers", "torch_dtype": "dtype"}
    today = {renamed.get(name, name): value for name, value in FALCON_40B_2023.items()}
    today |= {"model_type": "falcon", "new_decoder_architecture": True}
    old, new = ModelConfig.from_hf(FALCON_40B_2023), ModelConfig.from_hf(today)
    assert (old.model_type, new.model_type) == ("RefinedWeb", "falcon")
    assert {**vars(old), "model_type": ""} == {**vars(new), "model_type": ""}


def test_smollm2_is_a_llama_with_shared_embedding() -> None:
    config = ModelConfig.from_hf(SMOLLM2)
    assert (config.family, config.num_kv_heads, config.head_dim) == ("llama", 3, 64)
    assert (config.tie_embeddings, config.eos_ids, config.context) == (True, (2,), 8192)
    assert config.unknown == ()


def test_code_naming_fields_are_neither_read_nor_reported() -> None:
    bait = {"auto_map": {"AutoModelForCausalLM": "evil.py--Evil"}, "trust_remote_code": True}
    config = ModelConfig.from_hf({**SMOLLM2, **bait, "_attn_implementation_internal": "evil/hub"})
    assert config.unknown == ("_attn_implementation_internal", "trust_remote_code")


def test_two_names_of_one_field_must_agree() -> None:
    with pytest.raises(ConfigError, match=r'"n_head" is 64, but num_attention_heads is 128'):
        ModelConfig.from_hf({**FALCON_40B_2023, "num_attention_heads": 128, "n_head": 64})


def test_ids_below_0_mean_none() -> None:
    assert ModelConfig.from_hf({**SMOLLM2, "eos_token_id": -1, "bos_token_id": -1}).eos_ids == ()


def test_numbers_that_change_nothing_are_accepted_in_any_spelling() -> None:
    neutral = {"logit_scale": 1, "num_experts": 0, "sliding_window": 0, "use_mrope": False}
    assert ModelConfig.from_hf({**SMOLLM2, **neutral}).unknown == ()


def test_fields_that_a_file_leaves_out_are_what_transformers_takes() -> None:
    left_out = ("num_key_value_heads", "sliding_window")
    raw = {key: value for key, value in SMOLLM2.items() if key not in left_out}
    raw |= {"model_type": "mistral", "num_attention_heads": 16, "hidden_size": 1024}
    config = ModelConfig.from_hf(raw)
    theirs = MistralConfig(**{key: raw[key] for key in ("hidden_size", "num_attention_heads")})
    assert config.num_kv_heads == theirs.num_key_value_heads == 8
    assert set(config.windows) == {theirs.sliding_window} == {4096}
    stated = ModelConfig.from_hf({**raw, "sliding_window": None, "num_key_value_heads": None})
    assert (stated.num_kv_heads, set(stated.windows)) == (16, {None})


def test_sliding_windows_follow_each_family_s_rule() -> None:
    mistral = {**SMOLLM2, "model_type": "mistral", "sliding_window": 4096}
    assert set(ModelConfig.from_hf(mistral).windows) == {4096}
    qwen = {**SMOLLM2, "model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 10}
    assert set(ModelConfig.from_hf(qwen).windows) == {None}
    windows = ModelConfig.from_hf({**qwen, "use_sliding_window": True}).windows
    assert windows == (None,) * 10 + (4096,) * 20


COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
WRONG_COUNTS = [0, -1, 2**40, 1.5, math.nan, math.inf, "12", True, [], {}]


@pytest.mark.parametrize("value", WRONG_COUNTS, ids=repr)
@pytest.mark.parametrize(
    "field", [*COUNTS, "intermediate_size", "num_key_value_heads", "max_position_embeddings"]
)
def test_wrong_whole_number_is_refused_by_name_and_value(field: str, value: object) -> None:
    shown = str(value)[:6].strip("[{}]")
    with pytest.raises(ConfigError, match=rf'"{field}" (is|holds) .*{shown}'):
        ModelConfig.from_hf({**SMOLLM2, field: value})


@pytest.mark.parametrize("field", [*COUNTS, "model_type", "intermediate_size"])
def test_missing_field_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f'"{field}" is missing'):
        ModelConfig.from_hf({name: value for name, value in SMOLLM2.items() if name != field})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "known are RefinedWeb"),
        ({"model_type": None}, "is missing"),
        ({"rms_norm_eps": 0}, "outside"),
        ({"rms_norm_eps": math.nan}, "outside"),
        ({"rms_norm_eps": "1e-5"}, "not a number"),
        ({"hidden_act": "os.system"}, "known are gelu"),
        ({"tie_word_embeddings": 1}, "neither true nor false"),
        ({"torch_dtype": "int4"}, "known are"),
        ({"eos_token_id": [2, 99999]}, "not a token id below 49152"),
        ({"eos_token_id": list(range(65))}, "at most 64"),
        ({"eos_token_id": "2"}, "not a token id"),
        ({"num_attention_heads": 7}, "not a multiple of the 7"),
        ({"num_key_value_heads": 2}, "do not divide"),
        ({"num_key_value_heads": 10}, "outside 1 to 9"),
        ({"head_dim": 63}, "even"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"logits_scaling": 8.0}, "does not build"),
        ({"num_experts": 8}, "does not build"),
        ({"layer_types": ["full_attention"]}, "a list of 30 is needed"),
        ({"layer_types": ["sliding_attention"] * 30}, "sliding_window is not set"),
        ({"layer_types": ["mamba"] * 30}, "known are"),
        ({"sliding_window": -1, "use_sliding_window": True}, "outside"),
        ({"rope_theta": math.nan}, "rope theta is nan"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "magic"}}, "magic"),
    ],
)
def test_unacceptable_setting_is_refused_with_its_reason(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf({**SMOLLM2, **changes})


@pytest.mark.parametrize("dialect", ["rope_scaling", "rope_parameters"])
def test_rope_settings_of_an_alibi_model_are_refused(dialect: str) -> None:
    scaled = {**FALCON_RW_1B_2023, dialect: {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(ConfigError, match="ALiBi"):
        ModelConfig.from_hf(scaled)
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert ModelConfig.from_hf({**FALCON_RW_1B_2023, **plain}).rope is None

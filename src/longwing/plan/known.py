"""The Falcon family by name, so that a plan needs no download.

Written as a config.json would say it and read by the same strict reader. Layers, widths, head
dimension, vocabulary and trained context are on tiiuae's model cards (huggingface.co/tiiuae); what
is not on them is marked unverified. A config.json at hand is always the better source.
"""

from collections.abc import Mapping

from longwing.errors import ConfigError
from longwing.models import ModelConfig


def known_config(name: str) -> ModelConfig:
    """The settings of a model of `KNOWN`, by its name in either case.

    Raises:
        ConfigError: no such name.
    """
    raw = KNOWN.get(name.lower())
    if raw is None:
        raise ConfigError(
            f"no model is known by the name {name!r}; known are {', '.join(KNOWN)}",
            remedy="or give the path of a config.json, or of a folder with one",
        )
    return ModelConfig.from_hf(raw, file=name)


_FALCON: Mapping[str, object] = {
    "model_type": "falcon",
    "vocab_size": 65024,
    "max_position_embeddings": 2048,
    "bias": False,
    "alibi": False,
    "parallel_attn": True,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "torch_dtype": "bfloat16",
}

KNOWN: Mapping[str, Mapping[str, object]] = {
    "falcon-rw-1b": {
        **_FALCON,
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "multi_query": False,  # unverified
        "parallel_attn": False,
        "alibi": True,
        "bias": True,  # unverified
        "bos_token_id": 1,  # unverified
        "eos_token_id": 2,  # unverified
    },
    "falcon-7b": {
        **_FALCON,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,
        "new_decoder_architecture": False,
    },
    "falcon2-11b": {
        **_FALCON,
        "hidden_size": 4096,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_kv_heads": 8,  # unverified
        "ffn_hidden_size": 16384,  # unverified
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,  # unverified
        "max_position_embeddings": 8192,
        "rope_theta": 500042.0,  # unverified
        "tie_word_embeddings": False,  # unverified; with two matrices the parameters come to 11.1 G
    },
    "falcon-40b": {
        **_FALCON,
        "hidden_size": 8192,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
    },
    "falcon-180b": {
        **_FALCON,
        "hidden_size": 14848,
        "num_hidden_layers": 80,
        "num_attention_heads": 232,
        "num_kv_heads": 8,  # unverified
        "new_decoder_architecture": True,
    },
}
"""Name -> what its config.json says."""

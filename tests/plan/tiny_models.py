"""Small configs of every kind of block, for plans that are held against real tensors."""

from longwing.models import ModelConfig

_FALCON = {
    "model_type": "falcon",
    "vocab_size": 160,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}

CONFIGS = {
    "falcon, two norms": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, one norm": {**_FALCON, "multi_query": True},
    "falcon, alibi and biases": {
        **_FALCON,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
    },
    "llama": _LLAMA,
    "llama, tied": {**_LLAMA, "tie_word_embeddings": True},
    "mistral, windowed": {**_LLAMA, "model_type": "mistral", "sliding_window": 16},
    "qwen2": {**_LLAMA, "model_type": "qwen2"},
}


def config(kind: str) -> ModelConfig:
    return ModelConfig.from_hf(CONFIGS[kind])

"""Tiny models of transformers written as llama.cpp's converter would write them.

The judge of `longwing.convert`: names and the reordering of rows are stated here a second time,
from llama.cpp's definition. (`raw_gguf.py` writes bytes, for files that no writer would make.)
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

MERGES = ("Ġ t", "h e", "Ġt he", "i n", "l l", "1 2", "Ċ Ċ")
END = "<end>"
VOCAB = 320

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    module, _, part = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{part}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{part}"


def reorder(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: one of the first half, one of the second, in turn."""
    head_dim = len(weight) // heads
    rows = [
        head * head_dim + half * head_dim // 2 + pair
        for head in range(heads)
        for pair in range(head_dim // 2)
        for half in (0, 1)
    ]
    return weight[rows]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    architecture: str = "llama",
    kind: Callable[[str], Kind] = lambda name: Kind.F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    divisors: np.ndarray | None = None,
) -> None:
    """Write `model` as a GGUF file.

    Args:
        path: the file to make.
        model: a Llama, Mistral or Qwen2 model.
        architecture: GGUF's name for it; rows are reordered if it is "llama".
        kind: how to encode the matrix of a name; vectors stay F32.
        change: adds fields, before the file is closed.
        divisors: content of `rope_freqs.weight`.
    """
    writer = gguf.GGUFWriter(path, architecture)
    write_settings(writer, model.config)
    write_vocabulary(writer)
    change(writer)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    for name, weight in weights_of(model).items():
        data = weight.numpy()
        if architecture == "llama":
            if ".q_proj." in name:
                data = reorder(data, model.config.num_attention_heads)
            if ".k_proj." in name:
                data = reorder(data, model.config.num_key_value_heads)
        chosen = kind(name) if weight.ndim == 2 else Kind.F32
        encoded = gguf.quants.quantize(np.ascontiguousarray(data), chosen)
        writer.add_tensor(gguf_name(name), encoded, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights_of(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The state dict, a tied output left out."""
    tied = model.config.tie_word_embeddings
    state = model.state_dict()
    return {name: state[name] for name in state if not (tied and name == "lm_head.weight")}


def write_settings(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def write_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Byte-level BPE: 256 bytes, `<end>` = 256, a few merges, and names for the spare rows."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    used = len(tokens)
    tokens += [f"[PAD{index}]" for index in range(used, VOCAB)]
    kinds = [gguf.TokenType.NORMAL] * used + [gguf.TokenType.UNUSED] * (VOCAB - used)
    kinds[256] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(list(MERGES))
    writer.add_eos_token_id(256)


def llama3_divisors(config: PretrainedConfig) -> np.ndarray:
    """What llama.cpp stores for Llama 3.1's method: plain over slowed frequencies, float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = config.rope_parameters["rope_theta"] ** -exponents
    return (plain / slowed.double()).float().numpy()

"""The Llama family in GGUF: what its tensors are called, how they are laid out, its config.json.

Holds the plan of a conversion: which tensor of the file becomes which tensor of a Hugging Face
folder, and the settings beside them. Nothing is read here but the header (and the rotary divisors);
reading, writing and the tokenizer are left to the neighbours.

The one idea: llama.cpp rotates neighbouring pairs (x[2i], x[2i+1]) in architecture "llama", the
Hugging Face models rotate halves (x[i], x[i+H/2]). So its converter reorders the rows of the query
and key projections inside each head, and `restore_rows` puts them back. In "qwen2" it rotates
halves too, and nothing is reordered.

Shapes: N query heads, K KV heads, H head dim, D model dim, F MLP dim, V vocabulary, O, I out and in
features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from longwing.convert.gguf_file import GgufFile
from longwing.convert.gguf_header import TensorEntry, Value, show
from longwing.convert.rope_settings import KEYS as ROPE_KEYS
from longwing.convert.rope_settings import ROPE_FREQS, rope_settings
from longwing.errors import ConvertError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What sets one architecture of GGUF apart.

    Attributes:
        model_type: config.json's name for it.
        class_name: transformers' class.
        reordered: the rows of q and k are reordered (see above).
        qkv_bias: query, key and value have biases; None: all projections of the attention do, or
            none, as the file has it.
    """

    model_type: str
    class_name: str
    reordered: bool
    qkv_bias: bool | None


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor to convert.

    Attributes:
        entry: where it lies in the GGUF file.
        name: its name in the folder.
        heads: heads whose rows are to be restored; 0 for none.
    """

    entry: TensorEntry
    name: str
    heads: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a file will become, everything checked.

    Attributes:
        architecture: GGUF's name for it.
        vocab_size: rows of the embedding.
        config: config.json, without number type and token ids.
        weights: every tensor of the folder, in the order of the layers.
    """

    architecture: str
    vocab_size: int
    config: dict[str, object]
    weights: tuple[Weight, ...]


def plan_model(file: GgufFile) -> Plan:
    """Plan the conversion of a Llama-family file.

    Raises:
        ConvertError: another architecture; a setting that changes the arithmetic and is not built
            here; a tensor missing, unexpected or of the wrong shape.
    """
    name = _check_kind(file)
    _check_keys(file, name)
    architecture, window = ARCHITECTURES[name], 0
    if name == "llama":
        window = file.integer("llama.attention.sliding_window", low=0, high=2**24, default=0)
        architecture = _MISTRAL if window else architecture
    sizes, parts = _sizes(file, name), _parts(file, architecture)
    expected = _expected(sizes, parts)
    _check_tensors(file, expected)
    eps = file.number(f"{name}.attention.layer_norm_rms_epsilon", low=1e-12, high=0.1)
    config: dict[str, object] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.mlp_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": eps,
        "tie_word_embeddings": parts.tied,
        **rope_settings(file, name, sizes.head_dim),
    }
    if architecture.model_type == "llama":
        config |= {"attention_bias": parts.qkv_bias, "mlp_bias": parts.mlp_bias}
    else:  # sliding_window has a default in transformers, so no window has to be said
        config |= {"sliding_window": window or None, "use_sliding_window": bool(window)}
    heads = {"attn_q": sizes.num_heads, "attn_k": sizes.num_kv_heads}
    weights = tuple(
        Weight(
            entry=file.tensors[gguf_name],
            name=hf_name,
            heads=heads.get(gguf_name.split(".")[-2], 0) if architecture.reordered else 0,
        )
        for gguf_name, (hf_name, _) in expected.items()
    )
    return Plan(architecture=name, vocab_size=sizes.vocab_size, config=config, weights=weights)


def restore_rows(weight_OI: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's reordering of a query or key projection (or of its bias).

    Inside each head llama.cpp interleaves the two halves: row i of the first half goes to 2i, row i
    of the second to 2i + 1. Source: `LlamaModel.permute` in llama.cpp's conversion/llama.py.

    Args:
        weight_OI: (heads * H, I), or (heads * H,) for a bias.
        heads: heads in it: query heads for q, KV heads for k.
    """
    pairs = weight_OI.reshape(heads, weight_OI.shape[0] // heads // 2, 2, *weight_OI.shape[1:])
    return pairs.transpose(1, 2).reshape(weight_OI.shape)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Which of the optional tensors there are."""

    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool


def _check_kind(file: GgufFile) -> str:
    """The architecture's name, once the file is known to be a whole model of one that is built."""
    name = file.text("general.architecture")
    kind = file.text("general.type", default="model")
    if kind != "model":
        raise file.refusal(
            f"is {show(kind)}, not 'model'",
            part="general.type",
            remedy="convert the model itself",
        )
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise file.refusal(
            f"architecture {show(name)} is not supported; supported are {known} (which Mistral, "
            "SmolLM2 and Falcon3 use too)",
            remedy="fetch the model's safetensors folder instead",
        )
    if file.integer("split.count", low=0, high=65_535, default=0) > 1:
        raise file.refusal(
            "is one part of a model split over several files",
            remedy="join them with llama.cpp's `llama-gguf-split --merge`",
        )
    if not file.tensors:
        raise file.refusal("holds a vocabulary and no weights")
    return name


# Keys that change the arithmetic, and the values at which they do not.
_NEUTRAL: Mapping[str, tuple[Value, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "tensor_data_layout": ("reference", "Meta AI original pth"),
}

_KEYS = frozenset(
    {
        *("vocab_size", "embedding_length", "block_count", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv"),
        *("attention.key_length", "attention.value_length", "attention.sliding_window"),
        "attention.layer_norm_rms_epsilon",
    }
)


def _check_keys(file: GgufFile, name: str) -> None:
    """Refuse every setting of the architecture that is not known: it may change the arithmetic."""
    for full, value in file.fields.items():
        if not full.startswith(name + "."):
            continue
        key = full.removeprefix(name + ".")
        if key in _NEUTRAL:
            if not any(type(value) is type(same) and value == same for same in _NEUTRAL[key]):
                allowed = " or ".join(show(same) for same in _NEUTRAL[key])
                raise file.refusal(f"is {show(value)}; only {allowed} is supported", part=full)
        elif key not in _KEYS and key not in ROPE_KEYS:
            raise file.refusal(
                f"({show(value)}) is not known and may change the arithmetic, so it is not ignored",
                part=full,
            )


def _sizes(file: GgufFile, name: str) -> _Sizes:
    """The model's extents, each bounded, and agreeing with one another."""

    def size(key: str, high: int, default: int | None = None) -> int:
        return file.integer(f"{name}.{key}", low=1, high=high, default=default)

    hidden_size = size("embedding_length", 2**17)
    num_heads = size("attention.head_count", 1024)
    num_kv_heads = size("attention.head_count_kv", num_heads, num_heads)
    head_dim = size("attention.key_length", 1024, max(1, hidden_size // num_heads))
    if size("attention.value_length", 1024, head_dim) != head_dim:
        raise file.refusal("differs from key_length", part=f"{name}.attention.value_length")
    if num_heads % num_kv_heads or head_dim % 2:
        raise file.refusal(
            f"{num_kv_heads} KV heads must divide {num_heads} query heads, and the head dimension, "
            f"{head_dim}, must be even"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.refusal("is missing", part="token_embd.weight")
    vocab_size = size("vocab_size", 2**22, embedding.shape[0])
    return _Sizes(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        mlp_size=size("feed_forward_length", 2**20),
        num_layers=size("block_count", 1024),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )


def _parts(file: GgufFile, architecture: Architecture) -> _Parts:
    """Read off the first layer; every other must agree, or a tensor will be missing or too many."""
    free = architecture.qkv_bias is None
    bias = "blk.0.attn_q.bias" in file.tensors
    return _Parts(
        qkv_bias=bias if free else bool(architecture.qkv_bias),
        out_bias=bias and free,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors and free,
        tied="output.weight" not in file.tensors,
    )


def _expected(sizes: _Sizes, parts: _Parts) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor the settings ask for: GGUF's name -> (Hugging Face's name, shape)."""
    V, D, F = sizes.vocab_size, sizes.hidden_size, sizes.mlp_size
    NH, KH = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    modules = {
        "attn_q": ("self_attn.q_proj", (NH, D), parts.qkv_bias),
        "attn_k": ("self_attn.k_proj", (KH, D), parts.qkv_bias),
        "attn_v": ("self_attn.v_proj", (KH, D), parts.qkv_bias),
        "attn_output": ("self_attn.o_proj", (D, NH), parts.out_bias),
        "ffn_gate": ("mlp.gate_proj", (F, D), parts.mlp_bias),
        "ffn_up": ("mlp.up_proj", (F, D), parts.mlp_bias),
        "ffn_down": ("mlp.down_proj", (D, F), parts.mlp_bias),
        "attn_norm": ("input_layernorm", (D,), False),
        "ffn_norm": ("post_attention_layernorm", (D,), False),
    }
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (V, D))
    }
    for layer in range(sizes.num_layers):
        for ours, (theirs, shape, biased) in modules.items():
            here, there = f"blk.{layer}.{ours}", f"model.layers.{layer}.{theirs}"
            expected[here + ".weight"] = (there + ".weight", shape)
            if biased:
                expected[here + ".bias"] = (there + ".bias", shape[:1])
    expected["output_norm.weight"] = ("model.norm.weight", (D,))
    if not parts.tied:
        expected["output.weight"] = ("lm_head.weight", (V, D))
    return expected


def _check_tensors(file: GgufFile, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Exactly the expected tensors, in the expected shapes and in encodings that can be read."""
    missing = [name for name in expected if name not in file.tensors]
    if missing:
        raise _listed(file, "tensors are missing", missing)
    known = expected.keys() | {ROPE_FREQS}
    extra = [name for name in file.tensors if name not in known]
    if extra:
        raise _listed(file, "tensors are not part of this architecture", extra)
    kinds = set()
    for name, (_, shape) in expected.items():
        entry = file.tensors[name]
        if entry.shape != shape:
            raise file.refusal(f"has shape {entry.shape}; the settings imply {shape}", part=name)
        if entry.kind not in kinds:
            file.check_readable(entry)
            kinds.add(entry.kind)


def _listed(file: GgufFile, what: str, names: list[str]) -> ConvertError:
    shown = ", ".join(name if name.isprintable() else show(name) for name in names[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return file.refusal(f"{what}: {shown}{more}")


_MISTRAL = Architecture(
    model_type="mistral", class_name="MistralForCausalLM", reordered=True, qkv_bias=False
)
"""A "llama" file with a sliding window; without one the two are the same model."""

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama", class_name="LlamaForCausalLM", reordered=True, qkv_bias=None
    ),
    "qwen2": Architecture(
        model_type="qwen2", class_name="Qwen2ForCausalLM", reordered=False, qkv_bias=True
    ),
}
"""By the name in `general.architecture`. Mistral, SmolLM2 and Falcon3 call themselves llama."""

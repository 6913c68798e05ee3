"""`ModelConfig`: what a model is, read from config.json, and the only reader of that file's fields.

Holds one frozen dataclass for every supported family and the parser that fills it. How RoPE
settings and quantisation settings are read is left to `rope.py` and `checkpoint/`.

The one idea: an allow-list. The parser asks for the fields it knows, each with its bounds; a field
that would change the arithmetic in a way not built here is refused by name; anything else is
neither read nor obeyed, and is listed in `ModelConfig.unknown`. `auto_map` and its kind, which name
code to run, are never looked at.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

from longwing.errors import ConfigError
from longwing.models.fields import Fields
from longwing.rope import RopeConfig

MAX_POSITION = 2**24
"""The longest context a config may claim; beyond it a number is taken for a mistake."""

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the Falcon or the Llama family.

    Attributes:
        family: "falcon" or "llama", the module that runs it.
        model_type: what config.json calls it, e.g. "RefinedWeb" or "qwen2".
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        num_layers: decoder blocks.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides num_heads.
        head_dim: width of one head.
        mlp_size: inner width of the MLP.
        max_position: longest trained (or claimed) context, in tokens, before RoPE extension.
        norm_eps: epsilon of the norms.
        activation: one of ACTIVATIONS.
        tie_embeddings: the output projection is the embedding matrix.
        qkv_bias: query, key and value projections have biases.
        out_bias: the attention's output projection has one.
        mlp_bias: the MLP's projections have them.
        rope: rotary settings; None means ALiBi.
        windows: per layer, how many tokens back attention sees; None is all.
        parallel_block: attention and MLP read the same token and add to one residual (Falcon).
        num_norms: layer norms in front of a block: 1 shared, or 2 (Falcon-40B: ln_attn and ln_mlp;
            and every sequential block).
        dtype: the checkpoint's own number type as config.json names it, or "".
        eos_ids: tokens that end an answer.
        unknown: fields of config.json that longwing neither knows nor obeys.
    """

    family: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_position: int
    norm_eps: float
    activation: str
    tie_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rope: RopeConfig | None
    windows: tuple[int | None, ...]
    parallel_block: bool
    num_norms: int
    dtype: str = ""
    eos_ids: tuple[int, ...] = ()
    unknown: tuple[str, ...] = ()

    @classmethod
    def from_hf(cls, raw: Mapping[str, object], file: str = "config.json") -> "ModelConfig":
        """Read a config.json as Hugging Face repositories carry it, legacy Falcon names included.

        Raises:
            ConfigError: a field is missing, of the wrong type, out of bounds, contradicts another,
                or asks for arithmetic that is not built here. Nothing has been loaded by then.
        """
        fields = Fields(raw, file)
        model_type = fields.choice("model_type", choices=FAMILIES)
        return FAMILIES[model_type](fields, raw, model_type)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_kv_heads} key/value heads do not divide {self.num_heads} query heads",
                file="config.json",
            )
        if len(self.windows) != self.num_layers:
            raise ConfigError(
                f"{len(self.windows)} attention windows for {self.num_layers} layers",
                file="config.json",
            )

    @property
    def context(self) -> int:
        """The longest context the settings claim, RoPE extension included, in tokens."""
        return self.rope.max_len if self.rope else self.max_position

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """Bytes one token adds to the cache: 2 * layers * KV heads * head dim * bytes a value."""
        return int(2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value)


# Fields that say nothing about the arithmetic of inference.
_HARMLESS = (
    *("architectures", "auto_map", "transformers_version", "_name_or_path", "use_cache"),
    *("initializer_range", "attention_dropout", "hidden_dropout", "pad_token_id", "pretraining_tp"),
    *("quantization_config", "transformers.js_config", "is_llama_config", "tokenizer_class"),
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("original_max_position_embeddings", "bos_token_id", "max_length", "max_sequence_length"),
    *("ff_factor", "model_max_length", "unsloth_version", "tokenizer_model_max_length"),
)

# Fields that change the arithmetic, and the value at which they do not.
_NEUTRAL: Mapping[str, object] = {
    "apply_residual_connection_post_layernorm": False,
    "rope_interleaved": False,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "qk_layernorm": False,
    "use_qk_norm": False,
    "no_rope_layers": None,
    "num_experts": 0,
    "num_local_experts": 0,
    "use_mrope": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}


class _Common(TypedDict):
    """Fields that every family reads alike."""

    vocab_size: int
    dtype: str
    eos_ids: tuple[int, ...]
    unknown: tuple[str, ...]


def _falcon(fields: Fields, raw: Mapping[str, object], model_type: str) -> ModelConfig:
    """Falcon-RW, 7B, 40B, 180B and Falcon2-11B, under today's names and those of 2023."""
    num_heads = fields.count("num_attention_heads", "n_head", high=1024)
    num_layers = fields.count("num_hidden_layers", "n_layer", high=1024)
    hidden_size = fields.count("hidden_size", "n_embed", high=2**17)
    head_dim = _even_share(fields, hidden_size, num_heads)
    kv_given = fields.integer("num_kv_heads", "n_head_kv", low=1, high=num_heads, default=None)
    # In 2023 the 40B's architecture went by its model type; the flag came later.
    new_decoder = fields.flag("new_decoder_architecture", default=model_type == "RefinedWeb")
    multi_query = fields.flag("multi_query", default=True)
    parallel = fields.flag("parallel_attn", default=True) or new_decoder
    norms = fields.integer("num_ln_in_parallel_attn", low=1, high=2, default=None)
    if norms == 2 and parallel and not new_decoder:
        raise fields.error(
            "num_ln_in_parallel_attn", "is 2, but only new_decoder_architecture has two norms"
        )
    own_kv_heads = 1 if multi_query else num_heads
    num_kv_heads = (kv_given or num_heads) if new_decoder else own_kv_heads
    max_position = fields.count(
        "max_position_embeddings", "seq_length", "n_positions", high=MAX_POSITION, default=2048
    )
    bias = fields.flag("bias", default=False)
    alibi = fields.flag("alibi", default=False)
    if alibi:
        _refuse_rope(fields, raw)
    return ModelConfig(
        family="falcon",
        model_type=model_type,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_size=fields.count("ffn_hidden_size", high=2**20, default=4 * hidden_size),
        max_position=max_position,
        norm_eps=fields.number("layer_norm_epsilon", low=1e-12, high=0.1, default=1e-5),
        activation=fields.choice("activation", choices=ACTIVATIONS, default="gelu"),
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        rope=None if alibi else _rope(fields, raw, head_dim, max_position),
        windows=(None,) * num_layers,
        parallel_block=parallel,
        num_norms=(norms or 2) if new_decoder else 1 if parallel else 2,
        **_common(fields, default_end=11),
    )


def _llama(fields: Fields, raw: Mapping[str, object], model_type: str) -> ModelConfig:
    """Llama 2/3, SmolLM2 and Falcon3 (model type llama), Mistral and Qwen2."""
    num_heads = fields.count("num_attention_heads", high=1024)
    num_layers = fields.count("num_hidden_layers", high=1024)
    hidden_size = fields.count("hidden_size", high=2**17)
    head_dim = fields.integer("head_dim", low=1, high=1024, default=None)
    if head_dim is None:
        head_dim = _even_share(fields, hidden_size, num_heads)
    kv_heads = num_heads
    if not fields.has("num_key_value_heads"):
        kv_heads = _ABSENT_KV_HEADS.get(model_type, num_heads)
    max_position = fields.count(
        "max_position_embeddings", high=MAX_POSITION, default=_DEFAULT_POSITIONS[model_type]
    )
    # Qwen2 always has biases on q, k and v; Mistral never has any; Llama says so in its config.
    bias = fields.flag("attention_bias", default=False)
    mlp_bias = fields.flag("mlp_bias", default=False)
    if model_type != "llama" and (bias or mlp_bias):
        raise fields.error("attention_bias/mlp_bias", f"is true, which {model_type} does not have")
    return ModelConfig(
        family="llama",
        model_type=model_type,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.count("num_key_value_heads", high=num_heads, default=kv_heads),
        head_dim=head_dim,
        mlp_size=fields.count("intermediate_size", high=2**20),
        max_position=max_position,
        norm_eps=fields.number("rms_norm_eps", low=1e-12, high=0.1, default=1e-6),
        activation=fields.choice("hidden_act", choices=ACTIVATIONS, default="silu"),
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        qkv_bias=bias or model_type == "qwen2",
        out_bias=bias,
        mlp_bias=mlp_bias,
        rope=_rope(fields, raw, head_dim, max_position),
        windows=_windows(fields, model_type, num_layers),
        parallel_block=False,
        num_norms=2,
        **_common(fields, default_end=None),
    )


# What transformers takes where a file does not state a field; null means something else.
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768}
_ABSENT_KV_HEADS = {"mistral": 8, "qwen2": 32}
_ABSENT_WINDOW = {"mistral": 4096, "qwen2": 4096}


def _common(fields: Fields, *, default_end: int | None) -> _Common:
    """What all families share; called last, since it also takes stock of what nobody read."""
    vocab_size = fields.count("vocab_size", high=2**22)
    for name, neutral in _NEUTRAL.items():
        fields.must_be(name, neutral, "longwing does not build that arithmetic")
    end = fields.ids("eos_token_id", high=vocab_size)
    if not end and default_end is not None and default_end < vocab_size:
        end = (default_end,)
    dtype = fields.choice("dtype", "torch_dtype", choices=_DTYPES, default="auto")
    fields.skip(_HARMLESS)
    return _Common(
        vocab_size=vocab_size,
        dtype="" if dtype == "auto" else dtype,
        eos_ids=end,
        unknown=fields.left_over(),
    )


def _refuse_rope(fields: Fields, raw: Mapping[str, object]) -> None:
    """ALiBi models have no rotary settings; transformers writes the neutral ones all the same."""
    for name in ("rope_scaling", "rope_parameters"):
        value = raw.get(name)
        neutral = isinstance(value, Mapping) and value.get("rope_type", "default") == "default"
        if value is not None and not neutral:
            raise fields.error(name, "is given, but this model uses ALiBi, not RoPE")


def _rope(
    fields: Fields, raw: Mapping[str, object], head_dim: int, max_position: int
) -> RopeConfig:
    """The rotary settings, in either dialect."""
    if head_dim % 2:
        raise fields.error("head_dim", f"is {head_dim}; rotary positions need an even one")
    try:
        return RopeConfig.from_hf(raw, head_dim=head_dim, max_position=max_position)
    except ConfigError as error:
        raise ConfigError(error.reason, file=fields.file, remedy=error.remedy) from None


_DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")


def _windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Per layer, the sliding window or None, as each family's config spells it."""
    size = fields.integer("sliding_window", low=0, high=MAX_POSITION, default=None) or None
    if not fields.has("sliding_window"):
        size = _ABSENT_WINDOW.get(model_type)
    in_use = fields.flag("use_sliding_window", default=model_type == "mistral")
    first = fields.integer("max_window_layers", low=0, high=2**20, default=None)
    kinds = fields.words(
        "layer_types", choices=("full_attention", "sliding_attention"), length=num_layers
    )
    if kinds is None:
        start = (28 if first is None else first) if model_type == "qwen2" else 0
        kinds = tuple(
            "sliding_attention" if in_use and size and layer >= start else "full_attention"
            for layer in range(num_layers)
        )
    if "sliding_attention" in kinds and size is None:
        raise fields.error("layer_types", "names sliding_attention, but sliding_window is not set")
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def _even_share(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """head_dim where the config leaves it out."""
    if hidden_size % num_heads:
        raise fields.error(
            "hidden_size", f"is {hidden_size}, not a multiple of the {num_heads} attention heads"
        )
    return hidden_size // num_heads


def end_ids(generation_config: Mapping[str, object], vocab_size: int) -> tuple[int, ...]:
    """Tokens that end an answer by generation_config.json; chat models often say it only there.

    Raises:
        ConfigError: what stands there are no token ids.
    """
    fields = Fields(generation_config, "generation_config.json")
    return fields.ids("eos_token_id", high=vocab_size)


FAMILIES: Mapping[str, Callable[[Fields, Mapping[str, object], str], ModelConfig]] = {
    "falcon": _falcon,
    "RefinedWeb": _falcon,
    "RefinedWebModel": _falcon,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
}
"""The model types that config.json may name."""

"""Falcon-RW, 7B, 40B, 180B and Falcon2-11B.

Three kinds of block: sequential with ALiBi (RW), parallel with one norm (7B, 11B), parallel with
two (40B, 180B). In a parallel block attention and MLP read the same token and add to one residual,
so ranks that share a model meet once in it, and twice in a sequential one.

Shape key: T packed tokens, D model dim, N query heads, K KV heads, H head dim.

The one idea: `query_key_value` is laid out as K groups of [N / K queries, one key, one value], each
H wide. With K = 8 that is the 40B, with K = 1 the 7B's multi-query, with K = N the RW's per-head
triple: one split serves all. (transformers 5.23, models/falcon/modeling_falcon.py, `_split_heads`.)
"""

from torch import Tensor, nn

from longwing.kernels import AttentionInputs, AttentionSpec, alibi_slopes, narrowed
from longwing.layers import Attention, Embedding, Linear, Rotation, activation
from longwing.models.config import ModelConfig
from longwing.models.decoder import Decoder, Stage
from longwing.parallel import Group


class Falcon(Decoder):
    """A Falcon; tensors are named as tiiuae's checkpoints name them."""

    EMBEDDING = "transformer.word_embeddings"
    BLOCKS = "transformer.h"
    NORM = "transformer.ln_f"

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__(config, context)
        self.transformer = nn.Module()
        self.transformer.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.transformer.h = nn.ModuleList(
            FalconBlock(config, layer) for layer in range(config.num_layers)
        )
        self.transformer.ln_f = _layer_norm(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.stages = _stages(config)


class FalconBlock(nn.Module):
    """One decoder block of any of the three kinds."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel = config.parallel_block
        self.shared_norm = config.num_norms == 1
        if self.shared_norm:
            self.input_layernorm = _layer_norm(config)
        elif self.parallel:
            self.ln_attn = _layer_norm(config)
            self.ln_mlp = _layer_norm(config)
        else:
            self.input_layernorm = _layer_norm(config)
            self.post_attention_layernorm = _layer_norm(config)
        self.self_attention = FalconAttention(config, layer)
        self.mlp = FalconMLP(config)
        self.group = Group()

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        """(T, D) -> (T, D), or (S, D) of the tokens that attend."""
        residual_TD = narrowed(hidden_TD, inputs)
        if not self.parallel:
            attended_TD = self.self_attention(self.input_layernorm(hidden_TD), rotation, inputs)
            hidden_TD = residual_TD + self.group.all_reduce(attended_TD)
            mlp_TD = self.mlp(self.post_attention_layernorm(hidden_TD))
            return hidden_TD + self.group.all_reduce(mlp_TD)
        if self.shared_norm:
            for_attention_TD = self.input_layernorm(hidden_TD)
            for_mlp_TD = narrowed(for_attention_TD, inputs)
        else:
            for_attention_TD, for_mlp_TD = self.ln_attn(hidden_TD), self.ln_mlp(residual_TD)
        attended_TD = self.self_attention(for_attention_TD, rotation, inputs)
        return residual_TD + self.group.all_reduce(self.mlp(for_mlp_TD) + attended_TD)


class FalconAttention(nn.Module):
    """The fused projection, its split into heads, attention, and the way back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads = config.num_heads + 2 * config.num_kv_heads
        self.head_dim = config.head_dim
        self.group_heads = config.num_heads // config.num_kv_heads + 2
        self.query_key_value = Linear(
            config.hidden_size, heads * config.head_dim, bias=config.qkv_bias
        )
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.out_bias)
        self.attention = Attention(
            layer,
            AttentionSpec(
                scale=config.head_dim**-0.5,
                alibi_slopes_N=None if config.rope else alibi_slopes(config.num_heads),
            ),
        )

    def forward(
        self, x_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        """(T, D) -> (T, D), or (S, D) of the tokens that attend."""
        groups = self.query_key_value(x_TD).unflatten(-1, (-1, self.group_heads, self.head_dim))
        q_TNH = groups[:, :, :-2].flatten(1, 2)
        k_TKH, v_TKH = groups[:, :, -2], groups[:, :, -1]
        return self.dense(self.attention(q_TNH, k_TKH, v_TKH, rotation, inputs))


class FalconMLP(nn.Module):
    """Up, activation, down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.mlp_size, bias=config.mlp_bias)
        self.dense_4h_to_h = Linear(config.mlp_size, config.hidden_size, bias=config.mlp_bias)
        self.act_name = config.activation
        self.act = activation(config.activation)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x_TD)))


def _layer_norm(config: ModelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def _stages(config: ModelConfig) -> tuple[Stage, ...]:
    """In a parallel block both branches read the residual alone, so two stages do."""
    qkv, out = "self_attention.query_key_value", "self_attention.dense"
    up, down = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    if not config.parallel_block:
        return (((qkv,),), ((out,),), ((up,),), ((down,),))
    first: Stage = ((qkv, up),) if config.num_norms == 1 else ((qkv,), (up,))
    return (first, ((out,), (down,)))

"""Llama 2 and 3, SmolLM2, Falcon3, Mistral and Qwen2: one sequential block with RMSNorm and a gate.

What sets them apart (biases on q, k, v; sliding windows; RoPE settings; tied embeddings) is data in
`ModelConfig`.

Shape key: T packed tokens, D model dim, N query heads, K KV heads, H head dim.
"""

from torch import Tensor, nn

from longwing.kernels import AttentionInputs, AttentionSpec, narrowed
from longwing.layers import Attention, Embedding, Linear, RMSNorm, Rotation, activation
from longwing.models.config import ModelConfig
from longwing.models.decoder import Decoder
from longwing.parallel import Group


class Llama(Decoder):
    """A model of the Llama family; tensors are named as Hugging Face checkpoints name them."""

    EMBEDDING = "model.embed_tokens"
    BLOCKS = "model.layers"
    NORM = "model.norm"

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__(config, context)
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(
            LlamaBlock(config, layer) for layer in range(config.num_layers)
        )
        self.model.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.stages = (
            (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
            (("self_attn.o_proj",),),
            (("mlp.gate_proj", "mlp.up_proj"),),
            (("mlp.down_proj",),),
        )


class LlamaBlock(nn.Module):
    """Norm, attention, add; norm, gated MLP, add."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = LlamaMLP(config)
        self.group = Group()

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        """(T, D) -> (T, D), or (S, D) of the tokens that attend."""
        attended_TD = self.self_attn(self.input_layernorm(hidden_TD), rotation, inputs)
        hidden_TD = narrowed(hidden_TD, inputs) + self.group.all_reduce(attended_TD)
        mlp_TD = self.mlp(self.post_attention_layernorm(hidden_TD))
        return hidden_TD + self.group.all_reduce(mlp_TD)


class LlamaAttention(nn.Module):
    """Three projections, attention, and the way back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.out_bias)
        self.attention = Attention(
            layer,
            AttentionSpec(scale=config.head_dim**-0.5, window=config.windows[layer]),
        )

    def forward(
        self, x_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        """(T, D) -> (T, D), or (S, D) of the tokens that attend."""
        q_TNH, k_TKH, v_TKH = (
            projection(x_TD).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.attention(q_TNH, k_TKH, v_TKH, rotation, inputs))


class LlamaMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.mlp_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.mlp_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.mlp_size, config.hidden_size, bias=config.mlp_bias)
        self.act_name = config.activation
        self.act = activation(config.activation)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.down_proj(self.act(self.gate_proj(x_TD)) * self.up_proj(x_TD))

"""`StreamedLlamaBlock`: a block of the Llama family of few launches.

Shape key: T packed tokens, D model dim, F MLP dim, N query heads, K KV heads, H head dim, I, O in
and out features of a linear, S sequences where each one's last token alone attends.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longwing.kernels import AttentionInputs, narrowed
from longwing.kernels.digits import Activations
from longwing.kernels.streamed import stackable
from longwing.layers import Linear, Rotation
from longwing.layers.lora import LoRALinear, base_of
from longwing.models.fused_norm import FusedNorm
from longwing.models.llama import LlamaBlock
from longwing.models.streamed_block import add_product, attention_digits
from longwing.models.streamed_linear import StreamedLinear, packed_of


class StreamedLlamaBlock(nn.Module):
    """A `LlamaBlock` of four products, two norms and a gate."""

    def __init__(self, block: LlamaBlock, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        self.group = block.group
        self.head_dim = attention.head_dim
        self.attention = attention.attention
        self.act = mlp.act_name
        self.attention_norm = FusedNorm(block.input_layernorm)
        self.mlp_norm = FusedNorm(block.post_attention_layernorm)
        self.qkv = _stacked((attention.q_proj, attention.k_proj, attention.v_proj), dtype)
        self.attention_out = StreamedLinear((attention.o_proj,), dtype)
        self.gate_up = _stacked((mlp.gate_proj, mlp.up_proj), dtype)
        self.mlp_out = StreamedLinear((mlp.down_proj,), dtype)

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        """(T, D) -> (T, D), written over what is given; or (S, D) of the tokens that attend."""
        from longwing.kernels import fused_triton

        by_digits = _take_digits(self.qkv, len(hidden_TD))
        normed_TD = self.attention_norm(hidden_TD, digits=by_digits)
        q_TNH, k_TKH, v_TKH = (
            x_TO.unflatten(-1, (-1, self.head_dim)) for x_TO in _each(self.qkv, normed_TD)
        )
        hidden_TD = narrowed(hidden_TD, inputs)
        T = len(hidden_TD)
        digits = attention_digits(self.attention, self.attention_out, q_TNH, inputs, T)
        attended_TD = self.attention(q_TNH, k_TKH, v_TKH, rotation, inputs, digits=digits)
        add_product(hidden_TD, self.attention_out, digits or attended_TD, self.group)
        normed_TD = self.mlp_norm(hidden_TD, digits=_take_digits(self.gate_up, T))
        gate_TF, up_TF = _each(self.gate_up, normed_TD)
        by_digits = self.mlp_out.takes_digits(T)
        gated = fused_triton.gated_digits if by_digits else fused_triton.gated
        gated_TF: Activations = gated(gate_TF, up_TF, self.act)
        return add_product(hidden_TD, self.mlp_out, gated_TF, self.group)


def _stacked(
    linears: Sequence[Linear | LoRALinear], dtype: torch.dtype
) -> StreamedLinear | nn.ModuleList:
    """Linears of one input as one product, or as several where their formats differ."""
    if stackable([packed_of(base_of(linear)) for linear in linears]):
        return StreamedLinear(linears, dtype)
    return nn.ModuleList(StreamedLinear((linear,), dtype) for linear in linears)


def _take_digits(stacked: nn.Module, num_tokens: int) -> bool:
    """Whether a linear, or each of a list of them, takes its input as digits."""
    if isinstance(stacked, StreamedLinear):
        return stacked.takes_digits(num_tokens)
    return all(_take_digits(linear, num_tokens) for linear in stacked.children())


def _each(stacked: StreamedLinear | nn.ModuleList, x_TI: Activations) -> tuple[Tensor, ...]:
    if isinstance(stacked, StreamedLinear):
        return stacked.each(x_TI)
    return tuple(one(x_TI) for one in stacked)

"""`stream_weights`: a loaded model made fast on a GPU, for inference only and for good.

Packed weights go into the layout that a GPU streams (`kernels/streamed.py`), and blocks whose
linears are all packed are rebuilt of few launches. What a model computes stays the same; its module
and tensor names do not, so whoever quantises, tunes or saves a model takes it before. What the
kernels have no form for (groups under 32, float32 activations) stays as it is and runs through the
reference. The checkpoint's own layout is freed block by block, so the peak is one block above the
model.

Shape key: T packed tokens, D model dim, F MLP dim, N query heads, K KV heads, H head dim, I, O in
and out features of a linear.

The one idea: a decoder block reads its weights once for a token, and everything else is done on the
way. Linears that read the same input are one product; what is added to the residual is added by the
product that gives it; and a Falcon's MLP runs beside its attention, both ending in one sum.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from longwing.kernels import AttentionInputs, PackedWeight, StreamedWeight, chooses_triton
from longwing.kernels.streamed import fits, stackable, stream, take_outputs
from longwing.layers import Linear, RMSNorm, Rotation
from longwing.models.decoder import Decoder
from longwing.models.falcon import FalconBlock
from longwing.models.llama import LlamaBlock


def stream_weights(model: Decoder) -> int:
    """Lay out packed linears anew and rebuild their blocks, in place; how many linears there were.

    Does nothing where activations are not of 16 bits, or not on a GPU.
    """
    if not chooses_triton(model.embedding.weight):
        return 0
    dtype, num = model.dtype, 0
    for index, block in enumerate(model.blocks):
        linears = [module for module in block.modules() if isinstance(module, Linear)]
        if isinstance(block, FalconBlock | LlamaBlock) and all(
            _can_stream(linear) for linear in linears
        ):
            num += len(linears)
            model.blocks[index] = _rebuilt(block, dtype)
        else:
            num += sum(_stream_alone(linear, dtype) for linear in linears)
    num += _stream_alone(model.lm_head, dtype)
    owner, _, leaf = model.NORM.rpartition(".")
    setattr(model.get_submodule(owner), leaf, FusedNorm(model.get_submodule(model.NORM)))
    return num


def _rebuilt(block: FalconBlock | LlamaBlock, dtype: torch.dtype) -> nn.Module:
    if isinstance(block, FalconBlock):
        return StreamedFalconBlock(block, dtype)
    return StreamedLlamaBlock(block, dtype)


def _can_stream(linear: Linear) -> bool:
    packed = linear.packed
    return packed is not None and fits(packed)


def _stream_alone(linear: Linear, dtype: torch.dtype) -> bool:
    """Lay out a linear that keeps its place; whether it could be."""
    packed = linear.packed
    if packed is None or not fits(packed):
        return False
    linear.set_streamed(stream([packed], dtype))
    return True


class StreamedLinear(nn.Module):
    """A packed linear, or several of one input side by side.

    Args:
        linears: packed.
        dtype: of the activations.
        order_O: outputs in another order; for one linear.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        linears: Sequence[Linear],
        dtype: torch.dtype,
        *,
        order_O: Tensor | None = None,
    ) -> None:
        super().__init__()
        parts = [_packed(linear) for linear in linears]
        biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
        if order_O is not None:
            order_O = order_O.to(parts[0].qweight_WN.device)
            parts = [take_outputs(part, order_O) for part in parts]
            biases = [None if bias_O is None else bias_O[order_O] for bias_O in biases]
        self.weight = stream(parts, dtype)
        bias_O = _bias(biases, self.weight)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    def forward(
        self,
        x_TI: Tensor,
        *,
        act: str = "",
        more_TO: Tensor | None = None,
        out_TO: Tensor | None = None,
        beside: bool = False,
        arranged: bool = False,
        arrange: bool = False,
    ) -> Tensor:
        """act(x @ weight + bias) + more, (T, I) -> (T, O), for one; see `packed_matmul`."""
        from longwing.kernels import wna16_triton  # only where there is Triton

        return wna16_triton.packed_matmul(
            x_TI,
            self.weight,
            bias_N=self.bias,
            act=act,
            more_TN=more_TO,
            out_TN=out_TO,
            beside=beside,
            arranged=arranged,
            arrange=arrange,
        )

    def each(self, x_TI: Tensor) -> tuple[Tensor, ...]:
        """The (T, O) of each; rows lie apart."""
        from longwing.kernels import wna16_triton

        return wna16_triton.packed_matmul_many(x_TI, self.weight, bias_N=self.bias)


class StreamedFalconBlock(nn.Module):
    """A `FalconBlock` of any kind: parallel with one or two norms, or sequential."""

    def __init__(self, block: FalconBlock, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = block.self_attention, block.mlp
        self.parallel = block.parallel
        self.attention = attention.attention
        self.act = mlp.act_name
        if not block.parallel:
            self.norm = FusedNorm(block.input_layernorm)
            self.mlp_norm = FusedNorm(block.post_attention_layernorm)
        elif block.shared_norm:
            self.norm = FusedNorm(block.input_layernorm)
        else:
            self.norm = FusedNorm(block.ln_attn, block.ln_mlp)
        self.head_dim = attention.head_dim
        order_O, self.heads = _queries_first(*attention.groups, self.head_dim)
        self.qkv = StreamedLinear((attention.query_key_value,), dtype, order_O=order_O)
        self.up = StreamedLinear((mlp.dense_h_to_4h,), dtype)
        self.attention_out = StreamedLinear((attention.dense,), dtype)
        self.mlp_out = StreamedLinear((mlp.dense_4h_to_h,), dtype)
        self.out_bias = _sum_of_biases(self.attention_out, self.mlp_out) if block.parallel else None

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        """(T, D) -> (T, D), written over what is given."""
        if self.parallel:
            return self._parallel(hidden_TD, rotation, inputs)
        attended_TD = self._attend(self.qkv(self.norm(hidden_TD)), rotation, inputs)
        self.attention_out(attended_TD, more_TO=hidden_TD, out_TO=hidden_TD)
        up_TF = self.up(self.mlp_norm(hidden_TD), act=self.act)
        return self.mlp_out(up_TF, more_TO=hidden_TD, out_TO=hidden_TD)

    def _parallel(
        self, hidden_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        """Attention on one branch, the MLP on the other; both end in one sum."""
        from longwing.kernels import wna16_triton

        T = len(hidden_TD)
        outs = (self.attention_out.weight, self.mlp_out.weight)
        normed = all(wna16_triton.arranges(x.weight, T) for x in (self.qkv, self.up))
        activated = wna16_triton.arranges(outs[1], T)
        for_attention_TD, for_mlp_TD = self.norm.both(hidden_TD, arrange=normed)
        total = wna16_triton.SumOfProducts(outs, hidden_TD, hidden_TD, self.out_bias)
        up_TF = hidden_TD.new_empty(T, self.up.weight.parts[0])

        def mlp() -> None:
            self.up(
                for_mlp_TD,
                act=self.act,
                out_TO=up_TF,
                beside=True,
                arranged=normed,
                arrange=activated,
            )
            total.add(1, up_TF, arranged=activated)

        side = Branch(hidden_TD.device)
        side.run(mlp)
        qkv_TO = self.qkv(for_attention_TD, beside=True, arranged=normed)
        total.add(0, self._attend(qkv_TO, rotation, inputs))
        side.join()
        return hidden_TD

    def _attend(
        self, qkv_TO: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        heads_TXH = qkv_TO.unflatten(-1, (-1, self.head_dim))
        return self.attention(*heads_TXH.split(self.heads, 1), rotation, inputs)


class StreamedLlamaBlock(nn.Module):
    """A `LlamaBlock` of four products, two norms and a gate."""

    def __init__(self, block: LlamaBlock, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
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
        """(T, D) -> (T, D), written over what is given."""
        from longwing.kernels import fused_triton

        q_TNH, k_TKH, v_TKH = (
            x_TO.unflatten(-1, (-1, self.head_dim))
            for x_TO in _each(self.qkv, self.attention_norm(hidden_TD))
        )
        attended_TD = self.attention(q_TNH, k_TKH, v_TKH, rotation, inputs)
        self.attention_out(attended_TD, more_TO=hidden_TD, out_TO=hidden_TD)
        gate_TF, up_TF = _each(self.gate_up, self.mlp_norm(hidden_TD))
        gated_TF = fused_triton.gated(gate_TF, up_TF, self.act)
        return self.mlp_out(gated_TF, more_TO=hidden_TD, out_TO=hidden_TD)


class FusedNorm(nn.Module):
    """A LayerNorm or RMSNorm as one launch; or two LayerNorms of one input."""

    def __init__(self, norm: nn.Module, second: nn.LayerNorm | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.second = second

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), under the first."""
        from longwing.kernels import fused_triton

        if isinstance(self.norm, RMSNorm):
            return fused_triton.rms_norm(x_TD, self.norm.weight, self.norm.eps)
        return self.both(x_TD)[0]

    def both(self, x_TD: Tensor, *, arrange: bool = False) -> tuple[Tensor, Tensor]:
        """(T, D) under each LayerNorm; the same twice if there is one. See `layer_norms`."""
        from longwing.kernels import fused_triton

        first, second = self.norm, self.second
        if not isinstance(first, nn.LayerNorm):  # unreachable: only Falcons ask for both
            raise RuntimeError(f"a {type(first).__name__} where LayerNorms are needed")
        return fused_triton.layer_norms(
            x_TD,
            (first.weight, first.bias),
            None if second is None else (second.weight, second.bias),
            first.eps,
            arrange=arrange,
        )


class Branch:
    """A second line of work, where a CUDA graph is being captured; elsewhere the same line.

    In a graph two branches run beside each other, and the GPU fills the gaps of one with the other:
    attention waits for memory where a product streams. The line that is captured on has the higher
    priority (`engine/graphs.py`). What runs here must write to tensors that were there before and
    stay until `join`: the allocator knows nothing of other lines.
    """

    def __init__(self, device: torch.device) -> None:
        self._main = self._side = None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._main, self._side = torch.cuda.current_stream(), _side_stream(device)

    def run(self, call: Callable[..., object], *args: object, only_beside: bool = False) -> None:
        """Do this after what has been begun so far; not at all if it helps only beside others."""
        if self._main is None or self._side is None:
            if not only_beside:
                call(*args)
            return
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            call(*args)

    def join(self) -> None:
        """Let what follows wait for all that was run here."""
        if self._main is not None and self._side is not None:
            self._main.wait_stream(self._side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _packed(linear: Linear) -> PackedWeight:
    packed = linear.packed
    if packed is None:  # unreachable: only blocks of packed linears are rebuilt
        raise RuntimeError("a Linear without a packed weight cannot be streamed")
    return packed


def _queries_first(num_kv_heads: int, group: int, H: int) -> tuple[Tensor, tuple[int, int, int]]:
    """The order of `query_key_value`'s outputs that brings queries, keys and values together.

    A checkpoint has them by KV head, and to gather a token's queries from there is a copy. Also
    returns how many heads of each there are.
    """
    rows = torch.arange(num_kv_heads * group * H, device="cpu").view(num_kv_heads, group, H)
    order_O = torch.cat([part.flatten() for part in (rows[:, :-2], rows[:, -2], rows[:, -1])])
    return order_O, (num_kv_heads * (group - 2), num_kv_heads, num_kv_heads)


def _bias(biases: Sequence[Tensor | None], weight: StreamedWeight) -> Tensor | None:
    """(N,) biases, each where its part begins, 0 elsewhere; None if there are none."""
    if all(bias_O is None for bias_O in biases):
        return None
    bias_N = torch.zeros(weight.starts[-1], dtype=weight.dtype, device=weight.words.device)
    for start, bias_O in zip(weight.starts, biases, strict=False):
        if bias_O is not None:
            bias_N[start : start + len(bias_O)] = bias_O
    return bias_N


def _sum_of_biases(one: StreamedLinear, other: StreamedLinear) -> Tensor | None:
    biases = [linear.bias for linear in (one, other) if linear.bias is not None]
    return torch.stack([bias.detach() for bias in biases]).sum(0) if biases else None


def _stacked(linears: Sequence[Linear], dtype: torch.dtype) -> StreamedLinear | nn.ModuleList:
    """Linears of one input as one product, or as several where their formats differ."""
    if stackable([_packed(linear) for linear in linears]):
        return StreamedLinear(linears, dtype)
    return nn.ModuleList(StreamedLinear((linear,), dtype) for linear in linears)


def _each(stacked: StreamedLinear | nn.ModuleList, x_TI: Tensor) -> tuple[Tensor, ...]:
    if isinstance(stacked, StreamedLinear):
        return stacked.each(x_TI)
    return tuple(one(x_TI) for one in stacked)

"""`prepare`: a loaded model made fast on a CPU, for inference only and for good.

Weights go into the forms of `kernels/cpu.py`, and Llama blocks, which on small models spend as much
time on calling operations as on multiplying, are rebuilt of fewer and larger ones. What a model
computes stays the same; its module and tensor names do not, so whoever quantises, tunes or saves a
model takes it unprepared.

Shape key: T packed tokens, D model dim, N query heads, K KV heads, H head dim, F MLP dim, O out
features.

The one idea: linears that read the same input become one, and the rows of q and k are reordered so
that a rotation is one complex multiplication (`kernels.turn`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longwing.errors import RequestError
from longwing.kernels import (
    AttentionInputs,
    CpuWeight,
    DenseWeight,
    Int4Weight,
    Int8Weight,
    PackedWeight,
    StreamedWeight,
    dequantize,
    narrowed,
    paired,
    turn,
)
from longwing.kernels.cpu import fast_bfloat16, offers_int8
from longwing.layers import Linear, RMSNorm, Rotation
from longwing.layers.lora import LoRALinear, LowRankSum, added_by, base_of
from longwing.models.decoder import Decoder
from longwing.models.llama import LlamaBlock


@dataclass(frozen=True, kw_only=True)
class WeightForms:
    """What a model's matrices become.

    Attributes:
        narrow: keep packed weights in 4 bits, for few tokens.
        wide: type of the matrices for many tokens; None leaves packed weights to `narrow`.
        head: type of the output head; int8 rounds its activations too.
    """

    narrow: bool
    wide: torch.dtype | None
    head: torch.dtype


def weight_forms(name: str) -> WeightForms:
    """The forms that a name means on this processor.

    Args:
        name: "float32": exact, every sum in float32. "fast": 4-bit weights in 4 bits, everything
            in bfloat16 where the processor multiplies it and float32 where not, the head in 8
            bits; 2.5 bytes a packed weight. "small": as "fast" without the second copy of packed
            weights: 0.6 bytes each, and long prompts several times slower.

    Raises:
        RequestError: no such name.
    """
    fast = torch.bfloat16 if fast_bfloat16() else torch.float32
    head = torch.int8 if offers_int8() else fast
    forms = {
        "fast": WeightForms(narrow=True, wide=fast, head=head),
        "small": WeightForms(narrow=True, wide=None, head=head),
        "float32": WeightForms(narrow=False, wide=torch.float32, head=torch.float32),
    }
    if name not in forms:
        raise RequestError(f'weights "{name}" are not one of {", ".join(forms)}')
    return forms[name]


def prepare(model: Decoder, weights: str = "fast") -> Decoder:
    """Make a model fast on the CPU, in place; returns it. It cannot be saved or tuned afterwards.

    Keys lie in the cache in an order of their own, so pages are of no use to an unprepared model.

    Args:
        model: on the CPU; packed where its weights should stay packed (`unpack=False`).
        weights: "fast", "small" or "float32", see `weight_forms`.

    Raises:
        RequestError: the model is on another device, or there is no such form.
    """
    forms = weight_forms(weights)
    if model.device.type != "cpu":
        raise RequestError(f"a model on {model.device} cannot be prepared for the CPU")
    for index, block in enumerate(model.blocks):
        if isinstance(block, LlamaBlock):
            model.blocks[index] = FastLlamaBlock(block, forms)
        else:
            _replace_linears(block, forms)
    owner, leaf = (model.lm_head, "base") if _is_adapted(model.lm_head) else (model, "lm_head")
    head = getattr(owner, leaf)
    if head.weight is not None:
        int8 = forms.head == torch.int8
        wide = Int8Weight(head.weight) if int8 else DenseWeight(head.weight, forms.head)
        setattr(owner, leaf, FastLinear(CpuWeight(wide=wide, bias_N=head.bias)))
    return model


def weight_bytes(model: Decoder) -> int:
    """Bytes that a model's weights take, prepared or not."""
    # By storage: a head that a rank shares is a view of its rows of the embedding.
    stored = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    found = sum({storage.data_ptr(): storage.nbytes() for storage in stored}.values())
    matrices = {
        id(part): part.nbytes
        for module in model.modules()
        for part in vars(module).values()
        if isinstance(part, CpuWeight | StreamedWeight)
    }
    return found + sum(matrices.values())


class FastLinear(nn.Module):
    """A linear map in the forms of the CPU, in a `Linear`'s place."""

    def __init__(self, matrix: CpuWeight) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x_TI: Tensor) -> Tensor:
        """(T, I) -> (T, O), in x's dtype."""
        return self.matrix.matmul(x_TI).to(x_TI.dtype)


class AdaptedWeight(nn.Module):
    """A `CpuWeight` and what adapters add to its product, in a `CpuWeight`'s place.

    Args:
        matrix: the bases.
        added: the adapters.
        sizes: outputs of each linear that the matrix is made of.
    """

    def __init__(self, matrix: CpuWeight, added: LowRankSum, sizes: Sequence[int]) -> None:
        super().__init__()
        self.matrix = matrix
        self.added = added
        self.sizes = list(sizes)

    def matmul(self, x_TI: Tensor) -> Tensor:
        """(T, I) -> (T, O) float32."""
        out_TO = self.matrix.matmul(x_TI).float()
        self.added.add_to(out_TO.split(self.sizes, 1), x_TI)
        return out_TO


class FastLlamaBlock(nn.Module):
    """A `LlamaBlock` as about twenty operations, four of them matrix multiplications."""

    def __init__(self, block: LlamaBlock, forms: WeightForms) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        self.group = block.group
        H = self.head_dim = attention.head_dim
        q_size, kv_size = attention.q_proj.out_features, attention.k_proj.out_features
        self.sizes = (q_size + kv_size, kv_size)
        self.num_heads = q_size // H
        turned_O = (torch.arange(q_size + kv_size).view(-1, H)[:, paired(H)]).flatten()
        rows_O = torch.cat((turned_O, torch.arange(kv_size) + q_size + kv_size))
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = _arranged(qkv, forms, rows_O)
        self.out = _arranged((attention.o_proj,), forms)
        self.gate_up = _arranged((mlp.gate_proj, mlp.up_proj), forms)
        self.down = _arranged((mlp.down_proj,), forms)
        self.attention = attention.attention
        self.act = mlp.act
        self.attention_norm = FastRMSNorm(block.input_layernorm)
        self.mlp_norm = FastRMSNorm(block.post_attention_layernorm)

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        """(T, D) -> (T, D), written over what is given; or (S, D) of the tokens that attend."""
        if rotation is None:  # unreachable: every Llama has rotary positions
            raise RuntimeError("a Llama block needs a rotation")
        qkv_TO = self.qkv.matmul(self.attention_norm(hidden_TD)).float()
        qk_TO, v_TO = qkv_TO.split(self.sizes, 1)
        T, H = len(qkv_TO), self.head_dim
        turned_TNH = turn(qk_TO.view(T, -1, H), rotation.turns_T1F)
        q_TNH, k_TKH = turned_TNH[:, : self.num_heads], turned_TNH[:, self.num_heads :]
        v_TKH = v_TO.view(T, -1, H)
        attended_TD = self.attention.forward(q_TNH, k_TKH, v_TKH, None, inputs)
        hidden_TD = narrowed(hidden_TD, inputs)
        hidden_TD += self.group.all_reduce(self.out.matmul(attended_TD))
        gate_TF, up_TF = self.gate_up.matmul(self.mlp_norm(hidden_TD)).chunk(2, 1)
        hidden_TD += self.group.all_reduce(self.down.matmul(self.act(gate_TF).mul_(up_TF)))
        return hidden_TD


class FastRMSNorm:
    """`RMSNorm` in four operations, float32 throughout.

    x / sqrt(|x|^2 / D + eps) * w is x * (w sqrt(D)) / hypot(|x|, sqrt(D eps)).
    """

    def __init__(self, norm: RMSNorm) -> None:
        D = len(norm.weight)
        self.weight_D = norm.weight.detach().float() * D**0.5
        self.floor = torch.tensor((D * norm.eps) ** 0.5)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        length_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        return (x_TD * self.weight_D).div_(torch.hypot(length_T1, self.floor))


def _replace_linears(block: nn.Module, forms: WeightForms) -> None:
    """Give a block's linears the forms of the CPU, one by one."""
    for name, module in list(block.named_modules()):
        if isinstance(module, Linear):
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, FastLinear(_as_one((module,), forms)))


def _is_adapted(linear: nn.Module) -> bool:
    return isinstance(linear, LoRALinear)


def _arranged(
    linears: Sequence[Linear | LoRALinear], forms: WeightForms, rows_O: Tensor | None = None
) -> CpuWeight | AdaptedWeight:
    """Linears that share their input as one matrix, its outputs in the order of rows_O.

    No linear's outputs may leave its place among the others.
    """
    sizes = [linear.out_features for linear in linears]
    matrix = _as_one([base_of(linear) for linear in linears], forms, rows_O)
    added = added_by(linears, None if rows_O is None else _orders(rows_O, sizes))
    return matrix if added is None else AdaptedWeight(matrix, added, sizes)


def _orders(rows_O: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The order of all outputs as that of each linear's own."""
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [own_O - start for own_O, start in zip(rows_O.split(list(sizes)), starts, strict=True)]


def _as_one(
    linears: Sequence[Linear], forms: WeightForms, rows_O: Tensor | None = None
) -> CpuWeight:
    """Linears without adapters as one matrix."""
    parts = [linear.packed for linear in linears]
    narrow = wide = None
    packed = [part for part in parts if part is not None]
    if forms.narrow and len(packed) == len(parts) and _stackable(packed):
        narrow = Int4Weight(packed, rows_O)
    if narrow is None or forms.wide is not None:
        dense_OI = torch.cat([_dense(linear) for linear in linears])
        if rows_O is not None:
            dense_OI = dense_OI[rows_O]
        dtype = forms.wide or (torch.bfloat16 if fast_bfloat16() else torch.float32)
        wide = DenseWeight(dense_OI, dtype)
    bias_O = _bias(linears)
    if bias_O is not None and rows_O is not None:
        bias_O = bias_O[rows_O]
    return CpuWeight(narrow=narrow, wide=wide, bias_N=bias_O)


def _stackable(parts: Sequence[PackedWeight]) -> bool:
    """Whether packed matrices can be one: each fits the kernel, groups and input order agree."""
    first = parts[0]
    return all(
        Int4Weight.fits(part)
        and part.group_size == first.group_size
        and (part.g_idx_K is None) == (first.g_idx_K is None)
        and (part.g_idx_K is None or torch.equal(part.g_idx_K, first.g_idx_K))  # type: ignore[arg-type]
        for part in parts
    )


def _dense(linear: Linear) -> Tensor:
    """(O, I) float32 weight, made dense if packed."""
    if linear.weight is not None:
        return linear.weight.detach().float()
    packed = linear.packed
    if packed is None:  # unreachable: a Linear is dense or packed
        raise RuntimeError("a Linear with neither a dense nor a packed weight")
    return dequantize(packed, torch.float32).T


def _bias(linears: Sequence[Linear]) -> Tensor | None:
    """The biases of stacked linears, zeros for one without; None if none has any."""
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [
            torch.zeros(linear.out_features) if bias is None else bias.detach().float()
            for linear, bias in ((linear, linear.bias) for linear in linears)
        ]
    )

"""`StreamedFalconBlock`: a Falcon block of few launches, its MLP beside its attention.

Shape key: T packed tokens, D model dim, F MLP dim, N query heads, K KV heads, H head dim, O out
features of a linear, S sequences where each one's last token alone attends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longwing.kernels import AttentionInputs, attends_in_triton, narrowed
from longwing.kernels.digits import Activations, Digits
from longwing.kernels.norm_fold import FoldedNorm, Scaled
from longwing.kernels.wna16_cut import ParallelBlock
from longwing.layers import Rotation
from longwing.models.branch import Branch
from longwing.models.falcon import FalconBlock
from longwing.models.fused_norm import FusedNorm, Handover
from longwing.models.streamed_block import add_product, attention_digits
from longwing.models.streamed_linear import StreamedLinear


class StreamedFalconBlock(nn.Module):
    """A `FalconBlock` of any kind: parallel with one or two norms, or sequential."""

    def __init__(self, block: FalconBlock, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = block.self_attention, block.mlp
        self.parallel = block.parallel
        self.group = block.group
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
        group_heads = attention.group_heads
        num_groups = attention.query_key_value.out_features // (group_heads * self.head_dim)
        order_O, self.heads = _queries_first(num_groups, group_heads, self.head_dim)
        for_attention, for_mlp = self.norm.each() if block.parallel else (None, None)
        self.qkv = StreamedLinear(
            (attention.query_key_value,), dtype, order_O=order_O, norm=for_attention
        )
        self.up = StreamedLinear((mlp.dense_h_to_4h,), dtype, norm=for_mlp)
        self.attention_out = StreamedLinear((attention.dense,), dtype)
        self.mlp_out = StreamedLinear((mlp.dense_4h_to_h,), dtype)
        self.out_bias = _sum_of_biases(self.attention_out, self.mlp_out) if block.parallel else None
        # Where adapters add to the sum, or ranks in NCCL, it is not yet what the next norm reads.
        self.ends_in_its_sum = (
            block.parallel
            and (block.group.size == 1 or block.group.peers is not None)
            and self.attention_out.added is None
            and self.mlp_out.added is None
        )
        self.folds_its_norms = self.qkv.folds and self.up.folds
        self.shares = ParallelBlock.of(
            attention_in=self.qkv.weight,
            attention_out=self.attention_out.weight,
            mlp_in=self.up.weight,
            mlp_out=self.mlp_out.weight,
        )
        self.incoming: Handover | None = None
        self.outgoing: Handover | None = None

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        """(T, D) -> (T, D), written over what is given; or (S, D) of the tokens that attend."""
        if self.parallel:
            return self._parallel(hidden_TD, rotation, inputs)
        normed_TD = self.norm(hidden_TD, digits=self.qkv.takes_digits(len(hidden_TD)))
        qkv_TO = self.qkv(normed_TD)
        hidden_TD = narrowed(hidden_TD, inputs)
        T = len(hidden_TD)
        attended_TD, digits, arranged = self._attend(qkv_TO, rotation, inputs, T)
        add_product(
            hidden_TD, self.attention_out, digits or attended_TD, self.group, arranged=arranged
        )
        normed_TD = self.mlp_norm(hidden_TD, digits=self.up.takes_digits(T))
        digits = self._digits_between(hidden_TD)
        up_TF = self.up(normed_TD, act=self.act, digits=digits)
        return add_product(hidden_TD, self.mlp_out, digits or up_TF, self.group)

    def _parallel(
        self, hidden_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs | None
    ) -> Tensor:
        """Attention on one branch, the MLP on the other; both end in one sum."""
        from longwing.kernels import wna16_triton

        normed = self._normed(hidden_TD, None if self.incoming is None else self.incoming.take())
        for_mlp = normed
        if inputs is not None and inputs.ends_S is not None:
            hidden_TD = narrowed(hidden_TD, inputs)
            for_mlp = self._normed(hidden_TD, None)
        T = len(hidden_TD)
        outs = (self.attention_out.weight, self.mlp_out.weight)
        activated = self.mlp_out.arranges(T) and self.up.added is None
        alone = self.group.size == 1
        # Ranks add up what they have before the residual, which each has whole.
        sum_TD = hidden_TD if alone else torch.empty_like(hidden_TD)
        more_TD = hidden_TD if alone else None
        norms_D = self._norms_that_follow(T)
        total = wna16_triton.SumOfProducts(
            *(outs, more_TD, sum_TD, self.out_bias),
            norms_N=norms_D if alone else (),
            beside=(self.shares.attention_out, self.shares.mlp_out),
        )
        up_TF = hidden_TD.new_empty(T, self.up.weight.parts[0])
        up_digits = self._digits_between(hidden_TD)

        def mlp() -> None:
            self.up(
                for_mlp.mlp_TD,
                norm=for_mlp.mlp_norm,
                act=self.act,
                out_TO=up_TF,
                beside=self.shares.mlp_in,
                digits=up_digits,
                arranged=for_mlp.arranged,
                arrange=activated,
            )
            total.add(1, up_digits or up_TF, arranged=activated)

        with total:
            side = Branch(hidden_TD.device)
            side.run(mlp)
            qkv_TO = self.qkv(
                normed.attention_TD,
                norm=normed.attention_norm,
                beside=self.shares.attention_in,
                arranged=normed.arranged,
            )
            attended_TD, digits, attended = self._attend(qkv_TO, rotation, inputs, T)
            total.add(0, digits or attended_TD, arranged=attended)
            side.join()
        self.attention_out.finished(sum_TD, attended_TD)
        self.mlp_out.finished(sum_TD, up_TF)
        scaled = total.scaled if alone else self.group.add_sum(hidden_TD, sum_TD, norms_D)
        if self.outgoing is not None:
            self.outgoing.scaled = scaled
        return hidden_TD

    def _normed(self, hidden_TD: Tensor, scaled: Scaled | None) -> "_Normed":
        """What both branches read; if the block before has left it, there is nothing to launch."""
        if scaled is not None:
            return _Normed(
                attention_TD=scaled.digits[0],
                mlp_TD=scaled.digits[-1],
                attention_norm=self.qkv.folded(scaled),
                mlp_norm=self.up.folded(scaled),
            )
        T = len(hidden_TD)
        arranged = self.qkv.arranges(T) and self.up.arranges(T)
        by_digits = self.qkv.takes_digits(T) and self.up.takes_digits(T)
        attention_TD, mlp_TD = self.norm.both(hidden_TD, arrange=arranged, digits=by_digits)
        return _Normed(attention_TD=attention_TD, mlp_TD=mlp_TD, arranged=arranged)

    def _norms_that_follow(self, num_tokens: int) -> Sequence[Tensor]:
        """Weights of the next block's norms, where the end of this one's sum is to fold them in."""
        if self.outgoing is None:
            return ()
        ends = self.attention_out, self.mlp_out
        if self.group.size == 1 and not all(end.leaves_digits(num_tokens) for end in ends):
            return ()
        return self.outgoing.norms_for(num_tokens)

    def _digits_between(self, hidden_TD: Tensor) -> Digits | None:
        """Room for the MLP's activations as digits, if they are to be such."""
        T = len(hidden_TD)
        if not (self.mlp_out.takes_digits(T) and self.up.leaves_digits(T)):
            return None
        features = self.up.weight.parts[0]
        return Digits.room(T, features, hidden_TD.dtype, hidden_TD.device)

    def _attend(
        self,
        qkv_TO: Tensor,
        rotation: Rotation | None,
        inputs: AttentionInputs | None,
        num_tokens: int,
    ) -> tuple[Tensor, Digits | None, bool]:
        """Attention's rows, the same as digits if there are any, and whether they are arranged.

        There are num_tokens of them: those that attend.
        """
        heads_TXH = qkv_TO.unflatten(-1, (-1, self.head_dim))
        heads = heads_TXH.split(self.heads, 1)
        out = self.attention_out
        digits = attention_digits(self.attention, out, heads[0], inputs, num_tokens)
        arrange = (
            inputs is not None
            and out.arranges(num_tokens)
            and attends_in_triton(heads_TXH, inputs.pages[self.attention.layer])
        )
        attended_TD = self.attention(*heads, rotation, inputs, digits=digits, arrange=arrange)
        return attended_TD, digits, arrange


@dataclass(frozen=True, kw_only=True)
class _Normed:
    """What the branches of a parallel block read, and what is still to be done to it.

    Attributes:
        attention_TD: for attention.
        mlp_TD: for the MLP.
        attention_norm: the norm that its product has to finish; None if it is done.
        mlp_norm: as attention_norm.
        arranged: whether both lie in the order of a product of many tokens.
    """

    attention_TD: Activations
    mlp_TD: Activations
    attention_norm: FoldedNorm | None = None
    mlp_norm: FoldedNorm | None = None
    arranged: bool = False


def _queries_first(num_kv_heads: int, group: int, H: int) -> tuple[Tensor, tuple[int, int, int]]:
    """The order of `query_key_value`'s outputs that brings queries, keys and values together.

    A checkpoint has them by KV head, and to gather a token's queries from there is a copy. Also
    returns how many heads of each there are.
    """
    rows = torch.arange(num_kv_heads * group * H, device="cpu").view(num_kv_heads, group, H)
    order_O = torch.cat([part.flatten() for part in (rows[:, :-2], rows[:, -2], rows[:, -1])])
    return order_O, (num_kv_heads * (group - 2), num_kv_heads, num_kv_heads)


def _sum_of_biases(one: StreamedLinear, other: StreamedLinear) -> Tensor | None:
    biases = [linear.bias for linear in (one, other) if linear.bias is not None]
    return torch.stack([bias.detach() for bias in biases]).sum(0) if biases else None

"""`Linear`, dense or packed behind one face, and `Embedding`.

Which of the two a linear is, its tensors say: the loader either fills `weight` or calls
`set_packed`, and for inference on a GPU `set_streamed` follows. Nothing above asks.

Shape key: T packed tokens, I in features, O out features, V vocabulary, D model dim; K, N, G, W as
in kernels/wna16.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwing.kernels import PackedWeight, StreamedWeight, dequantize, packed_matmul, take_rows
from longwing.parallel import Shard


class Linear(nn.Module):
    """x @ weight.T + bias, (T, I) -> (T, O), with a dense or a packed weight.

    Attributes:
        in_features: I; of a part its own, and so is out_features.
        out_features: O.
        shard: which part of a linear this is, where a group shares one; None for all of it.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._bits = self._group_size = 0
        self.streamed: StreamedWeight | None = None
        self.shard: Shard | None = None

    def take_part(self, shard: Shard) -> None:
        """Become a part of the whole that it was; before it has been given any values."""
        self.shard = shard
        self.in_features = shard.ins.stop - shard.ins.start
        self.out_features = shard.outs.stop - shard.outs.start
        if self.weight is not None:
            self.weight = nn.Parameter(self.weight.new_empty(self.out_features, self.in_features))
        if self.bias is not None:
            own_O = self.bias.new_empty(self.out_features)
            self.bias = nn.Parameter(own_O) if shard.has_bias else None

    @property
    def packed(self) -> PackedWeight | None:
        """The packed weight as checkpoints have it; None when it is dense, or streamed."""
        if self.weight is not None or self.streamed is not None:
            return None
        return PackedWeight(
            bits=self._bits,
            group_size=self._group_size,
            qweight_WN=self.get_buffer("qweight"),
            zeros_GN=self.get_buffer("zeros"),
            scales_GN=self.get_buffer("scales"),
            g_idx_K=self.get_buffer("g_idx") if self._buffers["g_idx"] is not None else None,
        )

    def set_packed(self, packed: PackedWeight) -> None:
        """Replace the weight by a packed one of the same shape; the tensors become buffers."""
        self.weight = None
        self._bits, self._group_size = packed.bits, packed.group_size
        self.register_buffer("qweight", packed.qweight_WN)
        self.register_buffer("zeros", packed.zeros_GN)
        self.register_buffer("scales", packed.scales_GN)
        self.register_buffer("g_idx", packed.g_idx_K)

    def set_streamed(self, streamed: StreamedWeight) -> None:
        """Replace a packed weight by the same in a GPU's layout; for inference alone."""
        self.streamed = streamed
        for name in ("qweight", "zeros", "scales", "g_idx"):
            delattr(self, name)

    def set_dense(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        """Fill `weight` with the values of a packed matrix."""
        dense_OI = dequantize(packed, dtype).T.contiguous()
        self.weight = nn.Parameter(dense_OI, requires_grad=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        """(T, I) -> (T, O), in x's dtype."""
        if self.weight is not None:
            return F.linear(x_TI, self.weight, self.bias)
        if self.streamed is not None:
            from longwing.kernels import wna16_triton  # only where there is Triton

            out_TO = wna16_triton.packed_matmul(x_TI, self.streamed)
            return out_TO if self.bias is None else out_TO + self.bias
        packed = self.packed
        if packed is None:  # unreachable: weight is None exactly when one of the others is set
            raise RuntimeError("a Linear with neither a dense nor a packed weight")
        out_TO = packed_matmul(x_TI, packed)
        return out_TO if self.bias is None else out_TO + self.bias

    @property
    def bits(self) -> int:
        """Width of a packed weight; 0 for a dense one."""
        return self._bits

    @property
    def group_size(self) -> int:
        """Inputs that share a scale in a packed weight; 0 for a dense one."""
        return self._group_size

    def extra_repr(self) -> str:
        """Sizes and format, for print(model)."""
        kind = "dense" if self.weight is not None else f"{self._bits}-bit group {self._group_size}"
        return f"{self.in_features} -> {self.out_features}, {kind}"


class Embedding(nn.Module):
    """Token ids to vectors, (T,) -> (T, D)."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens_T: Tensor) -> Tensor:
        """(T,) -> (T, D)."""
        if torch.is_grad_enabled():
            return F.embedding(tokens_T, self.weight)
        return take_rows(tokens_T, self.weight)[0]

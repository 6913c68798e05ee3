"""`FusedNorm`: a norm as one launch, and `Handover`: none at all, where the block before helps.

Shape key: T packed tokens, D model dim.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from longwing.kernels.digits import Activations
from longwing.kernels.norm_fold import Scaled
from longwing.layers import RMSNorm
from longwing.models.streamed_linear import StreamedLinear


class FusedNorm(nn.Module):
    """A LayerNorm or RMSNorm as one launch; or two LayerNorms of one input."""

    def __init__(self, norm: nn.Module, second: nn.LayerNorm | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.second = second

    def forward(self, x_TD: Tensor, *, digits: bool = False) -> Activations:
        """(T, D) -> (T, D), under the first; as digits, if that is asked for."""
        from longwing.kernels import fused_triton

        if not isinstance(self.norm, RMSNorm):
            return self.both(x_TD, digits=digits)[0]
        norm = fused_triton.rms_norm_digits if digits else fused_triton.rms_norm
        return norm(x_TD, self.norm.weight, self.norm.eps)

    def each(self) -> tuple[nn.LayerNorm, nn.LayerNorm]:
        """The two LayerNorms; one twice if there is one."""
        if not isinstance(self.norm, nn.LayerNorm):  # unreachable: only Falcons ask for them
            raise RuntimeError(f"a {type(self.norm).__name__} where LayerNorms are needed")
        return self.norm, self.second or self.norm

    def weights(self) -> tuple[Tensor, ...]:
        """(D,) of each LayerNorm there is."""
        first, second = self.each()
        return (first.weight,) if second is first else (first.weight, second.weight)

    def both(
        self, x_TD: Tensor, *, arrange: bool = False, digits: bool = False
    ) -> tuple[Activations, Activations]:
        """(T, D) under each LayerNorm; the same twice if there is one. See `layer_norms`."""
        from longwing.kernels import fused_triton

        first, second = self.norm, self.second
        if not isinstance(first, nn.LayerNorm):  # unreachable: only Falcons ask for both
            raise RuntimeError(f"a {type(first).__name__} where LayerNorms are needed")
        one = (first.weight, first.bias)
        other = None if second is None else (second.weight, second.bias)
        if digits:
            return fused_triton.layer_norm_digits(x_TD, one, other, first.eps)
        return fused_triton.layer_norms(x_TD, one, other, first.eps, arrange=arrange)


class Handover:
    """From one block to the next: its result under that one's norms, where few tokens are read.

    Args:
        weights_D: of those norms.
        readers: the products that read it.

    Attributes:
        scaled: what the one block has left; None where the next is to norm for itself.
    """

    def __init__(self, weights_D: Sequence[Tensor], readers: Sequence[StreamedLinear]) -> None:
        self.weights_D = weights_D
        self.readers = readers
        self.scaled: Scaled | None = None

    def norms_for(self, num_tokens: int) -> Sequence[Tensor]:
        """The norms' weights, if so many tokens can do without the norms."""
        taken = all(reader.takes_digits(num_tokens) for reader in self.readers)
        return self.weights_D if taken else ()

    def take(self) -> Scaled | None:
        """What was left, once."""
        scaled, self.scaled = self.scaled, None
        return scaled

"""A row through the model: rotation document by document, blocks checkpointed, and the loss.

Shape key: T tokens of a row, D model dim, V vocabulary.

The one idea: of each block only its input is kept; on the way back the block runs once more. So
memory is one hidden state a block plus all of one block, for a third more arithmetic.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longwing.kernels import dequantize
from longwing.layers import Linear, Rotation
from longwing.models import Decoder
from longwing.tune.attention import Borders
from longwing.tune.loss import cross_entropy
from longwing.tune.packing import Row


class Pass(nn.Module):
    """How a model is gone through: a row in, its loss out. On a GPU products are in bfloat16.

    A module round the model, because what is sharded is gathered where a module is called.

    Args:
        model: prepared with `attention.install`, and not yet sharded.

    Attributes:
        model: the same.
        dtype: number type of products: bfloat16 on a GPU, the weights' own on a CPU.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model
        self.dtype = torch.bfloat16 if model.device.type == "cuda" else model.dtype
        self._hidden_dtype = model.dtype

    def forward(self, row: Row) -> Tensor:
        """Sum over the row of each token's weighted loss, float32, with a way back."""
        device = self.model.device
        on_gpu = device.type == "cuda"
        # Each weight is used once a pass: remembering its copy would only keep all of them.
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            hidden_TD = self._hidden(row, device)
        head = self.model.lm_head
        return cross_entropy(
            hidden_TD,
            _head(head, self.dtype),
            row.targets_T.to(device),
            row.weights_T.to(device),
            bias_V=head.bias,
            dtype=self.dtype,
        )

    def _hidden(self, row: Row, device: torch.device) -> Tensor:
        """(T, D) after the final norm."""
        borders = Borders.of(row.lengths, device)
        # A sharded embedding comes in the type that it was gathered in.
        hidden_TD = self.model.embedding(row.tokens_T.to(device)).to(self._hidden_dtype)
        rotation = rotation_of(self.model, row.lengths)
        for block in self.model.blocks:
            hidden_TD = checkpoint(
                block,
                hidden_TD,
                rotation,
                borders,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing is drawn at random
            )
        final: Tensor = self.model.get_submodule(self.model.NORM)(hidden_TD)
        return final


def rotation_of(model: Decoder, lengths: tuple[int, ...]) -> Rotation | None:
    """Each token turned by its place in its document, on the rung that would serve the document."""
    rotary = model.rotary
    if rotary is None:
        return None
    tables = [rotary.table(rotary.rung_for(length, 0), length) for length in lengths]
    cos_TF, sin_TF = (
        torch.cat([table[side][:length] for table, length in zip(tables, lengths, strict=True)])
        for side in (0, 1)
    )
    return Rotation(cos_TF=cos_TF, sin_TF=sin_TF)


def _head(head: Linear, dtype: torch.dtype) -> Tensor:
    """(V, D) the output matrix; a packed one is made dense for the moment."""
    if head.weight is not None:
        return head.weight
    packed = head.packed
    if packed is None:  # unreachable: tuning streams no weights
        raise RuntimeError("the output head has no weight")
    return dequantize(packed, dtype).T

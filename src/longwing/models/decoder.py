"""`Decoder`: what every model is to the rest of the house, whatever its family.

Token ids in, hidden states out, logits on request. Families fill in blocks and say what their
tensors are called; module names are the checkpoint's tensor names, so no map between the two
exists.

Shape key: T packed tokens, D model dim, V vocabulary, F rotary frequencies.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from longwing.errors import RequestError
from longwing.kernels import AttentionInputs
from longwing.layers import Embedding, Linear, Rotation
from longwing.models.config import MAX_POSITION, ModelConfig
from longwing.parallel import Group
from longwing.rope import RotaryTables

Stage = tuple[tuple[str, ...], ...]
"""Linears of a block that can be quantised on one reading of its input: names inside the block, in
groups that share their input."""


class Decoder(nn.Module):
    """A decoder-only language model over packed tokens.

    The same object serves inference (with `inputs`: tokens of many sequences, keys and values in
    pages), calibration and tuning (without: one sequence, causal, nothing remembered).

    Attributes:
        config: what the model is; the whole of it, whatever part of it this is.
        group: the processes that run it together, each with its part; of one unless it was split.
        context: the longest sequence it is set up for, in tokens.
        rotary: the RoPE tables of that context; None for ALiBi models.
        EMBEDDING, BLOCKS, NORM: where a family keeps its parts, as dotted module names.
        stages: the linears of a block in the order in which they see their input, for quantising.
    """

    EMBEDDING: str
    BLOCKS: str
    NORM: str

    stages: tuple[Stage, ...]
    lm_head: Linear

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.config = config
        self.group = Group()
        if type(context) is not int or not 1 <= context <= MAX_POSITION:
            raise RequestError(
                f"context is {context!r}; a number of tokens from 1 to {MAX_POSITION:,} is needed"
            )
        self.context = context
        self.rotary = RotaryTables(config.rope, context) if config.rope else None

    @property
    def embedding(self) -> Embedding:
        """The token embedding."""
        return self.get_submodule(self.EMBEDDING)  # type: ignore[return-value]

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order; each maps (hidden_TD, rotation, inputs) to hidden_TD.

        Where inputs say that only the ends attend, to theirs: (T, D) to (S, D).
        """
        return self.get_submodule(self.BLOCKS)  # type: ignore[return-value]

    @property
    def num_heads(self) -> int:
        """Query heads of this part."""
        return self.config.num_heads // self.group.size

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of this part: what its pages hold."""
        return self.config.num_kv_heads // self.group.size

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the hidden states."""
        return self.embedding.weight.dtype

    def place_tables(self, device: torch.device) -> None:
        """Make the RoPE tables live where the weights do."""
        if self.config.rope is not None:
            self.rotary = RotaryTables(self.config.rope, self.context, device=device)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Every linear map with its checkpoint name, the output head last."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                yield name, module

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        inputs: AttentionInputs | None = None,
        *,
        ends_only: bool = False,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens_T: (T,) token ids, sequence after sequence.
            positions_T: (T,) each token's place in its own sequence.
            inputs: the sequences and their pages; None means one sequence, causal, without a cache.
            ends_only: only each sequence's last token is wanted, (S, D). Of the others the last
                block makes keys and values, and no more: a prompt takes less by what attention, its
                way out and the MLP take in one block. Not where adapters differ between tokens.

        Returns:
            hidden_TD in the weights' dtype.

        Raises:
            ValueError: ends_only without inputs.
        """
        if ends_only and inputs is None:
            raise ValueError("which tokens are sequences' last is known from inputs alone")
        hidden_TD = self.embedding(tokens_T)
        rotation = self.rotation(positions_T, inputs)
        *earlier, last = self.blocks
        for block in earlier:
            hidden_TD = block(hidden_TD, rotation, inputs)
        if ends_only and inputs is not None and len(tokens_T) > len(inputs.context_lens_S):
            inputs = inputs.ends()
        hidden_TD = last(hidden_TD, rotation, inputs)
        norm = self.get_submodule(self.NORM)
        return norm(hidden_TD)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) -> (T, V) float32; of a group, the whole row on every rank."""
        return self.head(hidden_TD).float()

    def head(self, hidden_TD: Tensor) -> Tensor:
        """The same logits in the number type that the output head gives."""
        own_TV = self.lm_head(hidden_TD)
        if own_TV.shape[1] < self.config.vocab_size:
            own_TV = self.group.all_gather(own_TV, 1)
        return own_TV

    def rotation(self, positions_T: Tensor, inputs: AttentionInputs | None) -> Rotation | None:
        """How each token is turned: as `inputs` says, else by the rung that holds these tokens."""
        if self.rotary is None:
            return None
        if inputs is not None:
            if inputs.cos_TF is None or inputs.sin_TF is None:
                raise ValueError("a rotary model needs cos_TF and sin_TF in its attention inputs")
            return Rotation(cos_TF=inputs.cos_TF, sin_TF=inputs.sin_TF)
        rung = self.rotary.rung_for(len(positions_T), 0)
        cos_TF, sin_TF = self.rotary.rows(rung, positions_T)
        return Rotation(cos_TF=cos_TF, sin_TF=sin_TF)

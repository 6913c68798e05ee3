"""`Blocks`: a dense model of which one block at a time is in memory, and the next is being read.

Whoever walks through a model fetches its blocks in order and drops each when it is done with it.
Nothing here computes.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from longwing.checkpoint import Checkpoint
from longwing.layers import Embedding
from longwing.models import Filler, ModelConfig, empty_model, take_inventory


class Blocks:
    """A model's blocks, one at a time.

    Args:
        checkpoint: the dense model.
        config: its settings.
        longest: tokens of the longest sequence it will be shown.
        device: where a fetched block lies.
        dtype: its number type.

    Attributes:
        model: the model; storage-less but for what was fetched.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        *,
        longest: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = empty_model(config, max(longest, config.context))
        self.model.place_tables(device)
        self.device = device
        self.dtype = dtype
        self._inventory = take_inventory(self.model, checkpoint)
        self._filler = Filler(
            model=self.model, checkpoint=checkpoint, device=device, dtype=dtype, unpack=False
        )
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._ahead: dict[int, Future[None]] = {}

    def __len__(self) -> int:
        return len(self.model.blocks)

    def prefix(self, index: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.model.BLOCKS}.{index}."

    @contextmanager
    def embedding(self) -> Iterator[Embedding]:
        """The token embedding, in memory for so long."""
        self._filler.fill(self._inventory, f"{self.model.EMBEDDING}.")
        yield self.model.embedding
        self.model.embedding.to("meta")

    def fetch(self, index: int) -> nn.Module:
        """Have a block, and begin to read the one after it.

        Raises:
            CheckpointError: a weight is not finite, or cannot be read.
        """
        for wanted in range(index, min(index + 2, len(self))):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._reader.submit(self._fill, wanted)
        self._ahead[index].result()
        return self.model.blocks[index]

    def drop(self, index: int) -> None:
        """A block is of no more use."""
        if self._ahead.pop(index, None) is not None:
            self.model.blocks[index].to("meta")

    @torch.inference_mode()
    def _fill(self, index: int) -> None:
        """Read one block's tensors onto the device."""
        self._filler.fill(self._inventory, self.prefix(index))

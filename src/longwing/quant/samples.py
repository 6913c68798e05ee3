"""`Samples`: the calibration samples' hidden states, on their way through the blocks.

`Samples` is what a walk asks of whoever holds them; `HeldSamples` holds them in this process. A
holder reads the blocks itself, and is told of the linears that were quantised; what comes back are
the sums that the solver needs. Where the samples lie moves no bit of the result.

Shape key: T tokens of a sample, D model dim, K in features of a linear.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from longwing.errors import CheckpointError
from longwing.kernels import PackedWeight
from longwing.layers import Linear, Rotation
from longwing.models import Stage
from longwing.quant.blocks import Blocks
from longwing.quant.statistics import Statistics

Advance = Callable[[int], None]
"""Called with how many more samples have gone through one pass."""


class Samples(Protocol):
    """The samples, wherever they are. Blocks come in order: enter, work in it, leave."""

    def __len__(self) -> int:
        """How many there are."""

    def begin(self) -> None:
        """Embed them."""

    def enter(self, index: int) -> None:
        """They stand before block `index`, whose weights are the dense model's."""

    def gather(self, stage: Stage, advance: Advance, *, last: bool) -> list[Statistics]:
        """What the linears of a stage are fed: one Statistics for each of its groups.

        Args:
            stage: linears by their names in the block, which every earlier stage has settled.
            advance: told of each pass.
            last: no stage of the block comes after it.

        Raises:
            CheckpointError: an input is not finite; names sample and layer.
        """

    def settle(self, packed: Mapping[str, PackedWeight]) -> None:
        """From now on these linears of the block compute what a reader of the file will."""

    def leave(self, advance: Advance) -> None:
        """Carry them through the block."""


class HeldSamples:
    """Samples held by this process.

    Args:
        blocks: the model; it may be shared with whoever solves.
        samples: token ids, (T,) each.
        drift: also carry them through the untouched blocks, for the methods that compare.
        working_bytes: what the device needs beside the samples.
        memory: bytes of the device that may be used; None is nearly all of it.
        first: the number of the first one, for messages.
    """

    def __init__(
        self,
        blocks: Blocks,
        samples: Sequence[Tensor],
        *,
        drift: bool,
        working_bytes: int = 0,
        memory: int | None = None,
        first: int = 0,
    ) -> None:
        self._blocks = blocks
        self._samples = samples
        self._drift = drift
        self._working_bytes = working_bytes
        self._memory = memory
        self._first = first
        self._index = 0
        self._block: nn.Module | None = None
        self._untouched: nn.Module | None = None
        self._hidden: list[Tensor] = []
        self._full: list[Tensor] = []  # the same samples, untouched by quantising
        self._rotations: dict[int, Rotation | None] = {}

    def __len__(self) -> int:
        return len(self._samples)

    @torch.inference_mode()
    def begin(self) -> None:
        """Embed the samples."""
        device = self._blocks.device
        with self._blocks.embedding() as embedding:
            for sample_T in self._samples:
                self._hidden.append(self._park(embedding(sample_T.to(device))))
                if len(sample_T) not in self._rotations:
                    positions_T = torch.arange(len(sample_T), device=device)
                    rotation = self._blocks.model.rotation(positions_T, None)
                    self._rotations[len(sample_T)] = rotation
        if self._drift:
            # Copies: parked samples are written over in place.
            self._full = [self._park(hidden_TD.to(device)) for hidden_TD in self._hidden]

    @torch.inference_mode()
    def enter(self, index: int) -> None:
        """Have the block, and with `drift` a copy that stays as it is."""
        self._index = index
        self._block = self._blocks.fetch(index)
        self._untouched = copy.deepcopy(self._block) if self._drift else None

    @torch.inference_mode()
    def gather(self, stage: Stage, advance: Advance, *, last: bool) -> list[Statistics]:
        """Pass after pass, each added to the sums before the next."""
        gathered = [
            Statistics(self.in_features(group[0]), device=self._blocks.device, drift=self._drift)
            for group in stage
        ]
        for number, fed in self.feed(stage, last=last):
            for group, stats, (x_TK, x_fp_TK) in zip(stage, gathered, fed, strict=True):
                with self.blamed(number, group[0]):
                    stats.add(x_TK, x_fp_TK)
            advance(1)
        return gathered

    @torch.inference_mode()
    def settle(self, packed: Mapping[str, PackedWeight]) -> None:
        """Put the quantised values into the block."""
        for name, weight in packed.items():
            linear = self._linear(name)
            linear.set_dense(weight.to(self._blocks.device), self._blocks.dtype)

    @torch.inference_mode()
    def leave(self, advance: Advance) -> None:
        """Every sample through the block, in place."""
        block, untouched = self._present(), self._untouched
        for number, hidden_TD in enumerate(self._hidden):
            self._hidden[number] = self._park(self._through(block, hidden_TD), hidden_TD)
            if untouched is not None:  # no stage was gathered on the way
                full_TD = self._full[number]
                self._full[number] = self._park(self._through(untouched, full_TD), full_TD)
            advance(1)
        self._block = self._untouched = None

    def feed(
        self, stage: Stage, *, last: bool
    ) -> Iterator[tuple[int, list[tuple[Tensor, Tensor | None]]]]:
        """Each sample's number, and for each group its input and that of the untouched block.

        On the last stage the untouched block takes its samples through.
        """
        firsts = [group[0] for group in stage]
        block = self._present()
        for number, hidden_TD in enumerate(self._hidden):
            inputs, _ = self._inputs(block, firsts, hidden_TD)
            full: dict[str, Tensor] = {}
            if self._untouched is not None:
                full_TD = self._full[number]
                full, out_TD = self._inputs(self._untouched, firsts, full_TD, whole=last)
                if out_TD is not None:
                    self._full[number] = self._park(out_TD, full_TD)
            yield number, [(inputs[name], full.get(name)) for name in firsts]
        if last and self._untouched is not None:
            self._untouched.to("meta")  # it has done its work, and the solver needs the room
            self._untouched = None

    def in_features(self, name: str) -> int:
        """K of a linear of the block."""
        return self._linear(name).in_features

    @contextmanager
    def blamed(self, number: int, name: str) -> Iterator[None]:
        """Say of which sample and linear an input is that cannot be used."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(
                f"calibration sample {self._first + number}: {error.reason}",
                tensor=self._blocks.prefix(self._index) + name,
            ) from error

    def _inputs(
        self, block: nn.Module, names: Sequence[str], hidden_TD: Tensor, *, whole: bool = False
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What each named linear is fed for one sample, and with `whole` the block's output.

        Without it the pass stops once all have been fed.
        """
        caught: dict[str, Tensor] = {}

        def catch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
            def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
                caught[name] = args[0]
                if len(caught) == len(names) and not whole:
                    raise _AllCaughtError

            return hook

        hooks: list[RemovableHandle] = [
            block.get_submodule(name).register_forward_pre_hook(catch(name)) for name in names
        ]
        try:
            return caught, self._through(block, hidden_TD)
        except _AllCaughtError:
            return caught, None
        finally:
            for handle in hooks:
                handle.remove()

    def _through(self, block: nn.Module, hidden_TD: Tensor) -> Tensor:
        rotation = self._rotations[len(hidden_TD)]
        moved_TD = hidden_TD.to(self._blocks.device, non_blocking=True)
        out_TD: Tensor = block(moved_TD, rotation, None)
        return out_TD

    def _park(self, hidden_TD: Tensor, before: Tensor | None = None) -> Tensor:
        """Where a sample waits for the next block: on the device while there is ample room.

        Else in pinned host memory, which copies several times faster and is used again (`before`)
        from block to block. Where it waits moves no number, so a resumed run may park elsewhere.
        """
        device = self._blocks.device
        if device.type != "cuda":
            return hidden_TD
        if before is not None and not before.is_cuda:
            return before.copy_(hidden_TD)
        total = torch.cuda.get_device_properties(device).total_memory * 9 // 10
        total = min(total, self._memory or total)
        parked = sum(hidden.nbytes for hidden in (*self._hidden, *self._full) if hidden.is_cuda)
        if parked + hidden_TD.nbytes + self._working_bytes < total:
            return hidden_TD
        return torch.empty_like(hidden_TD, device="cpu", pin_memory=True).copy_(hidden_TD)

    def _present(self) -> nn.Module:
        if self._block is None:
            raise RuntimeError("the samples are in no block")
        return self._block

    def _linear(self, name: str) -> Linear:
        linear: Linear = self._present().get_submodule(name)  # type: ignore[assignment]
        return linear


class _AllCaughtError(Exception):
    """Ends a forward pass whose rest nobody needs."""

"""`Walk`: a model's blocks, one at a time, from disk through the solver.

Only one block is in memory as numbers to compute with (two for the methods that compare with full
precision), and the next one, which is read ahead (`blocks.py`). Between blocks the samples' hidden
states wait with whoever holds them (`samples.py`). Inside a block, linears are solved stage by
stage (`Decoder.stages`), and each stage is fed by the stages already quantised: the paper's
true-sequential order.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longwing.errors import CheckpointError
from longwing.kernels import PackedWeight
from longwing.layers import Linear
from longwing.models import Decoder, Stage
from longwing.quant.blocks import Blocks
from longwing.quant.gptq import solve
from longwing.quant.journal import BlockResult, LayerReport
from longwing.quant.samples import Samples
from longwing.quant.spec import QuantSpec
from longwing.quant.statistics import Statistics

log = logging.getLogger(__name__)

Step = Callable[[int, int], None]
"""Called with (steps done, steps in all) within a block."""


class Walk:
    """Quantises the blocks of one model, in order, and leaves them behind.

    Args:
        blocks: the dense model.
        samples: what it is shown; None for "rtn", which looks at weights alone.
        spec: what to do to each linear.
        min_zero: smallest zero point of the format to be written.
        true_sequential: feed each stage by the quantised ones before it.
    """

    def __init__(
        self,
        blocks: Blocks,
        samples: Samples | None,
        spec: QuantSpec,
        *,
        min_zero: int,
        true_sequential: bool,
    ) -> None:
        self.num_blocks = len(blocks)
        self._blocks = blocks
        self._samples = samples
        self._spec = spec
        self._min_zero = min_zero
        stages = blocks.model.stages
        self._stages = stages if true_sequential else _merged(stages)

    @property
    def model(self) -> Decoder:
        """The model, without storage but for the block that is worked on."""
        return self._blocks.model

    def begin(self) -> None:
        """Embed the samples."""
        if self._samples is not None:
            self._samples.begin()

    @torch.inference_mode()
    def block(self, index: int, known: BlockResult | None, step: Step) -> BlockResult:
        """Quantise block `index`, or take it as known, and carry the samples through it.

        Args:
            index: blocks must come in order.
            known: what a journal has of this block.
            step: told how far the block is.

        Raises:
            CheckpointError: a weight or an activation is not finite, or a layer cannot be solved;
                names the layer, and the sample where it is one's fault.
        """
        samples, prefix = self._samples, self._blocks.prefix(index)
        total = (len(self._stages) + 1) * max(0 if samples is None else len(samples), 1)
        progress = _Steps(step, total)
        if samples is not None:
            samples.enter(index)
        if known is None:
            result = self._solved(index, progress)
        else:
            result = known
            if samples is not None:
                samples.settle(
                    {name.removeprefix(prefix): packed for name, packed in known.packed.items()}
                )
        if samples is not None and index + 1 < self.num_blocks:
            samples.leave(progress.advance)
        step(total, total)
        self._blocks.drop(index)
        return result

    def _solved(self, index: int, progress: "_Steps") -> BlockResult:
        """Stage by stage: gather what the linears are fed, solve them, put the results in."""
        prefix = self._blocks.prefix(index)
        block = self._blocks.fetch(index)
        packed: dict[str, PackedWeight] = {}
        reports: list[LayerReport] = []
        for stage in self._stages:
            gathered: Sequence[Statistics | None] = [None] * len(stage)
            if self._samples is not None:
                last = stage is self._stages[-1]
                gathered = self._samples.gather(stage, progress.advance, last=last)
            found: dict[str, PackedWeight] = {}
            for group, stats in zip(stage, gathered, strict=True):
                for name in group:
                    found[name], report = self._solve(block, name, prefix, stats)
                    reports.append(report)
            if self._samples is not None:
                self._samples.settle(found)
            packed |= {prefix + name: weight for name, weight in found.items()}
        return BlockResult(packed=packed, reports=tuple(reports))

    def _solve(
        self, block: nn.Module, name: str, prefix: str, stats: Statistics | None
    ) -> tuple[PackedWeight, LayerReport]:
        """One linear; its packed weight is on the host."""
        started = time.perf_counter()
        try:
            solved = solve(_dense(block, name), stats, self._spec, min_zero=self._min_zero)
        except CheckpointError as error:
            raise CheckpointError(
                error.reason, tensor=prefix + name, remedy=error.remedy
            ) from error
        weight = solved.weight.to(torch.device("cpu"))
        for note in solved.notes:
            log.info("%s: %s", prefix + name, note)
        return weight, LayerReport(
            name=prefix + name,
            error=solved.error,
            added_error=solved.added_error,
            damp_percent=solved.damp_percent,
            seconds=time.perf_counter() - started,
            notes=solved.notes,
        )


def _dense(block: nn.Module, name: str) -> Tensor:
    """A linear's weights as numbers, (O, I)."""
    linear: Linear = block.get_submodule(name)  # type: ignore[assignment]
    if linear.weight is None:
        raise RuntimeError("a linear of the model being quantised is packed already")
    return linear.weight


def _merged(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """All linears of a block on one reading: quicker, and blind to what the block itself loses."""
    return (tuple(group for stage in stages for group in stage),)


class _Steps:
    """Counts the steps of one block for whoever shows them."""

    def __init__(self, step: Step, total: int) -> None:
        self._step, self._total, self._done = step, total, 0

    def advance(self, num: int) -> None:
        self._done += num
        self._step(min(self._done, self._total), self._total)

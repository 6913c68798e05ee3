"""`Walk`: a model's blocks, one at a time, from disk through the solver.

Only one block is in memory as numbers to compute with (two for the methods that compare with full
precision), and the next one, which is read ahead. Between blocks the samples' hidden states wait in
host memory, or on the device where they fit. Inside a block, linears are solved stage by stage
(`Decoder.stages`), and each stage is fed by the stages already quantised: the paper's
true-sequential order.

Shape key: T tokens of a sample, D model dim, O and I out and in features.
"""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from longwing.checkpoint import Checkpoint
from longwing.errors import CheckpointError
from longwing.kernels import PackedWeight
from longwing.layers import Linear, Rotation
from longwing.models import Filler, ModelConfig, Stage, empty_model, take_inventory
from longwing.quant.calibration import Calibration
from longwing.quant.estimate import working_bytes
from longwing.quant.gptq import solve
from longwing.quant.journal import BlockResult, LayerReport
from longwing.quant.spec import QuantSpec
from longwing.quant.statistics import Statistics

log = logging.getLogger(__name__)

Step = Callable[[int, int], None]
"""Called with (steps done, steps in all) within a block."""


class Walk:
    """Reads, quantises and leaves behind the blocks of one model, in order.

    Args:
        checkpoint: the dense model.
        config: its settings.
        calibration: the samples; None for "rtn", which looks at weights alone.
        spec: what to do to each linear.
        min_zero: smallest zero point of the format to be written.
        true_sequential: feed each stage by the quantised ones before it.
        device: where to compute.
        dtype: number type to compute the model in.
        memory: bytes of the device that may be used; None is nearly all of it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        calibration: Calibration | None,
        spec: QuantSpec,
        *,
        min_zero: int,
        true_sequential: bool,
        device: torch.device,
        dtype: torch.dtype,
        memory: int | None = None,
    ) -> None:
        longest = 1 if calibration is None else calibration.longest
        self.model = empty_model(config, max(longest, config.context))
        self.model.place_tables(device)
        self.num_blocks = config.num_layers
        self.calibration = calibration
        self.spec = spec
        self.device = device
        self._min_zero = min_zero
        self._memory = memory
        self._inventory = take_inventory(self.model, checkpoint)
        self._filler = Filler(
            model=self.model, checkpoint=checkpoint, device=device, dtype=dtype, unpack=False
        )
        self._stages = self.model.stages if true_sequential else _merged(self.model.stages)
        self._working_bytes = working_bytes(self.model, spec, longest, dtype.itemsize)
        self._hidden: list[Tensor] = []
        self._full: list[Tensor] = []  # the same samples, untouched by quantising
        self._rotations: dict[int, Rotation | None] = {}
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._ahead: Future[None] | None = None

    @torch.inference_mode()
    def begin(self) -> None:
        """Embed the samples."""
        if self.calibration is None:
            return
        self._filler.fill(self._inventory, f"{self.model.EMBEDDING}.")
        for sample_T in self.calibration.samples:
            self._hidden.append(self._park(self.model.embedding(sample_T.to(self.device))))
            if len(sample_T) not in self._rotations:
                positions_T = torch.arange(len(sample_T), device=self.device)
                self._rotations[len(sample_T)] = self.model.rotation(positions_T, None)
        self.model.embedding.to("meta")
        if self.spec.needs_drift:
            # Copies: parked samples are written over in place.
            self._full = [self._park(hidden_TD.to(self.device)) for hidden_TD in self._hidden]

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
        prefix = f"{self.model.BLOCKS}.{index}."
        self._fetch(index)
        block = self.model.blocks[index]
        untouched = copy.deepcopy(block) if self.spec.needs_drift else None
        num_passes = len(self._stages) + 1
        total = num_passes * max(len(self._hidden), 1)
        progress = _Steps(step, total)
        if known is None:
            result = self._solved(block, untouched, prefix, progress)
        else:
            if untouched is not None:
                self._carry(untouched, self._full, None)
            result = known
            for name, packed in known.packed.items():
                linear = block.get_submodule(name.removeprefix(prefix))
                self._settle(linear, packed.to(self.device))  # type: ignore[arg-type]
        if index + 1 < self.num_blocks:
            self._carry(block, self._hidden, progress)
        step(total, total)
        block.to("meta")
        return result

    def _fetch(self, index: int) -> None:
        """Have block `index`, and begin to read the one after it."""
        if self._ahead is None:
            self._ahead = self._reader.submit(self._fill, index)
        self._ahead.result()
        if index + 1 < self.num_blocks:
            self._ahead = self._reader.submit(self._fill, index + 1)

    @torch.inference_mode()
    def _fill(self, index: int) -> None:
        """Read one block's tensors onto the device."""
        self._filler.fill(self._inventory, f"{self.model.BLOCKS}.{index}.")

    def _solved(
        self, block: nn.Module, untouched: nn.Module | None, prefix: str, progress: "_Steps"
    ) -> BlockResult:
        """Stage by stage: gather what the linears are fed, solve them, put the results in.

        On the way the untouched block takes its own samples through.
        """
        packed, reports = {}, []
        for stage in self._stages:
            gathered = self._statistics(block, untouched, stage, prefix, progress)
            for group, stats in zip(stage, gathered, strict=True):
                for name in group:
                    linear: Linear = block.get_submodule(name)  # type: ignore[assignment]
                    started = time.perf_counter()
                    try:
                        solved = solve(_dense(linear), stats, self.spec, min_zero=self._min_zero)
                    except CheckpointError as error:
                        raise CheckpointError(
                            error.reason, tensor=prefix + name, remedy=error.remedy
                        ) from error
                    self._settle(linear, solved.weight)
                    packed[prefix + name] = solved.weight.to(torch.device("cpu"))
                    reports.append(
                        LayerReport(
                            name=prefix + name,
                            error=solved.error,
                            added_error=solved.added_error,
                            damp_percent=solved.damp_percent,
                            seconds=time.perf_counter() - started,
                            notes=solved.notes,
                        )
                    )
                    for note in solved.notes:
                        log.info("%s: %s", prefix + name, note)
        return BlockResult(packed=packed, reports=tuple(reports))

    def _statistics(
        self,
        block: nn.Module,
        untouched: nn.Module | None,
        stage: Stage,
        prefix: str,
        progress: "_Steps",
    ) -> list[Statistics | None]:
        """One Statistics for each group of a stage; None where no calibration is needed."""
        if self.calibration is None:
            return [None] * len(stage)
        firsts = [group[0] for group in stage]
        gathered = [
            Statistics(_in_features(block, name), device=self.device, drift=self.spec.needs_drift)
            for name in firsts
        ]
        last = stage is self._stages[-1]
        for number, hidden_TD in enumerate(self._hidden):
            inputs, _ = self._inputs(block, firsts, hidden_TD)
            full: dict[str, Tensor] = {}
            if untouched is not None:
                full, out_TD = self._inputs(untouched, firsts, self._full[number], whole=last)
                if out_TD is not None:
                    self._full[number] = self._park(out_TD, self._full[number])
            for name, stats in zip(firsts, gathered, strict=True):
                try:
                    stats.add(inputs[name], full.get(name))
                except CheckpointError as error:
                    raise CheckpointError(
                        f"calibration sample {number}: {error.reason}", tensor=prefix + name
                    ) from error
            progress.advance()
        if last and untouched is not None:
            untouched.to("meta")  # it has done its work, and the solver needs the room
        return list(gathered)

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

    def _carry(self, block: nn.Module, hidden: list[Tensor], progress: "_Steps | None") -> None:
        """Every sample's hidden states through a block, in place."""
        for number, hidden_TD in enumerate(hidden):
            hidden[number] = self._park(self._through(block, hidden_TD), hidden_TD)
            if progress is not None:
                progress.advance()

    def _through(self, block: nn.Module, hidden_TD: Tensor) -> Tensor:
        rotation = self._rotations[len(hidden_TD)]
        out_TD: Tensor = block(hidden_TD.to(self.device, non_blocking=True), rotation, None)
        return out_TD

    def _park(self, hidden_TD: Tensor, before: Tensor | None = None) -> Tensor:
        """Where a sample waits for the next block: on the device while there is ample room.

        Else in pinned host memory, which copies several times faster and is used again (`before`)
        from block to block. Where it waits moves no number, so a resumed run may park elsewhere.
        """
        if self.device.type != "cuda":
            return hidden_TD
        if before is not None and not before.is_cuda:
            return before.copy_(hidden_TD)
        total = torch.cuda.get_device_properties(self.device).total_memory * 9 // 10
        total = min(total, self._memory or total)
        parked = sum(hidden.nbytes for hidden in (*self._hidden, *self._full) if hidden.is_cuda)
        if parked + hidden_TD.nbytes + self._working_bytes < total:
            return hidden_TD
        return torch.empty_like(hidden_TD, device="cpu", pin_memory=True).copy_(hidden_TD)

    def _settle(self, linear: Linear, packed: PackedWeight) -> None:
        """Give a linear the values that a reader of the file will compute with."""
        linear.set_dense(packed, _dense(linear).dtype)


def _dense(linear: Linear) -> Tensor:
    """A linear's weights as numbers, (O, I)."""
    if linear.weight is None:
        raise RuntimeError("a linear of the model being quantised is packed already")
    return linear.weight


def _in_features(block: nn.Module, name: str) -> int:
    linear: Linear = block.get_submodule(name)  # type: ignore[assignment]
    return linear.in_features


def _merged(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """All linears of a block on one reading: quicker, and blind to what the block itself loses."""
    return (tuple(group for stage in stages for group in stage),)


class _AllCaughtError(Exception):
    """Ends a forward pass whose rest nobody needs."""


class _Steps:
    """Counts the steps of one block for whoever shows them."""

    def __init__(self, step: Step, total: int) -> None:
        self._step, self._total, self._done = step, total, 0

    def advance(self) -> None:
        self._done += 1
        self._step(min(self._done, self._total), self._total)

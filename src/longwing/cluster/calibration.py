"""The calibration samples of a quantising run, spread over workers. Knows no Ray.

Each worker holds some of the samples and reads every block itself (`Share`); the solver stays where
it is, and asks `SpreadSamples` as it would ask samples of its own (`longwing.quant.samples`).

The one idea: sums depend on their order, and the result is to be that of one process to the bit. So
a panel of H, zero at first, travels from worker to worker in the order of the samples, and each
adds its own to it, as the one process would have. While the second worker adds to the first panel,
the first is at the second one. The passes through the model, most of the work, need no order.

Shape key: T tokens of a sample, K in features of a linear.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longwing.checkpoint import Checkpoint
from longwing.cluster.worker import Promise, Worker, WorkerLostError
from longwing.errors import CalibrationError
from longwing.kernels import PackedWeight
from longwing.models import DTYPES, ModelConfig, Stage
from longwing.quant.blocks import Blocks
from longwing.quant.calibration import Calibration
from longwing.quant.rotation import rotated
from longwing.quant.samples import Advance, HeldSamples
from longwing.quant.spec import QuantSpec
from longwing.quant.statistics import Panel, Rows, Statistics, inputs_of


class SpreadSamples:
    """Samples held by workers: `longwing.quant.samples.Samples`.

    Args:
        hire: begins a worker; given what makes the object it holds.
        num_workers: how many, at most one a sample.
        folder: the dense model, at the same path everywhere.
        calibration: the samples.
        spec: the run's settings.
        device: "cpu" or "cuda": what workers compute on, which must be what the solver does.
        dtype: number type of the model, a name of `DTYPES`.
        memory: bytes of its GPU that each may use; None is nearly all.
    """

    def __init__(
        self,
        hire: Callable[[Callable[[], object]], Worker],
        num_workers: int,
        folder: Path,
        calibration: Calibration,
        spec: QuantSpec,
        *,
        device: str,
        dtype: str,
        memory: int | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._drift = spec.needs_drift
        self._num_samples = len(calibration.samples)
        shares = split([len(sample) for sample in calibration.samples], num_workers)
        self._sizes = [len(share) for share in shares]
        self._workers = [
            hire(
                partial(
                    Share,
                    folder,
                    [calibration.samples[number].numpy() for number in share],
                    spec,
                    first=share.start,
                    longest=calibration.longest,
                    device=device,
                    dtype=dtype,
                    memory=memory,
                )
            )
            for share in shares
        ]

    def __len__(self) -> int:
        return self._num_samples

    def begin(self) -> None:
        """Embed the samples, each worker its own."""
        self._all("begin")

    def enter(self, index: int) -> None:
        """Have every worker read the block."""
        self._all("enter", index)

    def gather(self, stage: Stage, advance: Advance, *, last: bool) -> list[Statistics]:
        """The sums of all workers, in the order of the samples."""
        fed = self._all("feed", stage, last, advance=advance)
        gathered = [
            Statistics(in_features, device=self._device, drift=self._drift)
            for in_features, _ in fed[0]
        ]
        travelling = []
        for group, stats in enumerate(gathered):
            stats.num_tokens = sum(own[group][1] for own in fed)
            for panel in stats.panels:
                rows: Promise | None = None
                for worker in self._workers:
                    rows = worker.ask("add", group, panel.start, rows)
                travelling.append((panel, rows))
        for panel, promise in travelling:
            panel.set_rows(self._result(self._workers[-1], promise))
        return gathered

    def settle(self, packed: Mapping[str, PackedWeight]) -> None:
        """Put the quantised values into every worker's block."""
        self._all("settle", packed)

    def leave(self, advance: Advance) -> None:
        """Every sample through the block."""
        self._all("leave", advance=advance)

    def _all(self, what: str, *args: object, advance: Advance | None = None) -> list[Any]:
        """Ask all workers, and wait for all; if several fail, it is the first one's fault."""
        promises = [worker.ask(what, *args) for worker in self._workers]
        answers = []
        for worker, promise, size in zip(self._workers, promises, self._sizes, strict=True):
            answers.append(self._result(worker, promise))
            if advance is not None:
                advance(size)
        return answers

    def _result(self, worker: Worker, promise: Promise | None) -> Any:
        try:
            return None if promise is None else worker.result(promise)
        except WorkerLostError as error:
            raise CalibrationError(
                f"a worker was lost, and the samples that it held: {error}; finished blocks are on "
                "record, and the same command goes on with them"
            ) from error


class Share:
    """Some of the samples, in a worker, with a model of its own.

    Args:
        folder: the dense model.
        samples: token ids, (T,) each.
        spec: the run's settings.
        first: the number of the first sample.
        longest: tokens of the longest sample of all shares, which decides the RoPE rung.
        device: where to compute.
        dtype: number type, a name of `DTYPES`.
        memory: bytes of the device that may be used.
    """

    def __init__(
        self,
        folder: Path,
        samples: Sequence[NDArray[np.int64]],
        spec: QuantSpec,
        *,
        first: int,
        longest: int,
        device: str,
        dtype: str,
        memory: int | None,
    ) -> None:
        checkpoint = rotated(Checkpoint.open(folder), spec.rotate)
        config = ModelConfig.from_hf(checkpoint.config)
        place, kind = torch.device(device), DTYPES[dtype]
        self._blocks = Blocks(checkpoint, config, longest=longest, device=place, dtype=kind)
        tokens = [torch.tensor(sample) for sample in samples]
        kept = self._kept_bytes(sum(map(len, tokens)), spec, kind)
        room = torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else 0
        self._keep_at = place if kept < room // 3 else torch.device("cpu")
        self._held = HeldSamples(
            self._blocks,
            tokens,
            drift=spec.needs_drift,
            working_bytes=room // 2,  # two blocks, one pass, and what was kept
            memory=memory,
            first=first,
        )
        self._drift = spec.needs_drift
        self._index = 0
        self._kept: list[list[tuple[Tensor, Tensor | None]]] = []  # by group, then by sample

    def begin(self) -> None:
        """Embed the samples."""
        self._held.begin()

    def enter(self, index: int) -> None:
        """Read a block."""
        self._index = index
        self._held.enter(index)

    @torch.inference_mode()
    def feed(self, stage: Stage, last: bool) -> list[tuple[int, int]]:
        """Pass all samples as far as a stage, and keep what it is fed.

        Returns:
            for each group of the stage K and the number of tokens.
        """
        self._kept = [[] for _ in stage]
        for number, fed in self._held.feed(stage, last=last):
            for group, kept, (x_TK, x_fp_TK) in zip(stage, self._kept, fed, strict=True):
                with self._held.blamed(number, group[0]):
                    x, drift = inputs_of(x_TK, x_fp_TK)
                at = self._keep_at
                kept.append((x.to(at), None if drift is None else drift.to(at)))
        return [
            (self._held.in_features(group[0]), sum(len(x) for x, _ in kept))
            for group, kept in zip(stage, self._kept, strict=True)
        ]

    @torch.inference_mode()
    def add(self, group: int, start: int, rows: Rows | None) -> Rows:
        """Add what was kept to a panel of a group's sums.

        Args:
            group: its number in the stage.
            start: the panel's first row.
            rows: the sums over all earlier samples; None if there are none.
        """
        device = self._blocks.device
        in_features = self._kept[group][0][0].shape[-1]
        panel = Panel.zero(in_features, start, drift=self._drift, device=device)
        if rows is not None:
            panel.set_rows(rows)
        for x, drift in self._kept[group]:
            panel.add(x.to(device), None if drift is None else drift.to(device))
        return panel.to_rows()

    def settle(self, packed: Mapping[str, PackedWeight]) -> None:
        """Put quantised values into the block; what was kept for their sake may go."""
        self._kept = []
        self._held.settle(packed)

    def leave(self) -> None:
        """Carry the samples through the block."""
        self._held.leave(lambda _: None)
        self._blocks.drop(self._index)

    def _kept_bytes(self, num_tokens: int, spec: QuantSpec, dtype: torch.dtype) -> int:
        """The most that a stage is fed."""
        linears = dict(self._blocks.model.blocks[0].named_modules())
        widths = [
            sum(int(linears[group[0]].in_features) for group in stage)
            for stage in self._blocks.model.stages
        ]
        return num_tokens * sum(widths) * dtype.itemsize * (2 if spec.needs_drift else 1)


def split(lengths: Sequence[int], num: int) -> list[range]:
    """Samples to workers: runs of them, none empty, with about as many tokens each."""
    num = min(num, len(lengths))
    ends = list(accumulate(lengths))
    bounds = [0]
    for place in range(1, num):
        wanted = bisect_left(ends, ends[-1] * place / num) + 1
        bounds.append(min(max(wanted, bounds[-1] + 1), len(lengths) - (num - place)))
    return [range(start, stop) for start, stop in pairwise([*bounds, len(lengths)])]

"""`Journal`: what a quantising run has finished, so that a killed one goes on and loses nothing.

A folder beside the target holds one file a finished block, each written whole or not at all, and
`journal.json`, which says by a fingerprint what they are the work of. A run with any other model,
text, setting, device kind or version does not continue it.

The layout of a block's file is the journal's own (packed weights as the kernels hold them), so that
the format of the result is chosen when it is written.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longwing.checkpoint import TensorFile, new_file, parse_object, write_tensor_file
from longwing.errors import CheckpointError
from longwing.kernels import PackedWeight

_STATE = "journal.json"
_FINISHED = "finished"
_PARTS = ("qweight", "zeros", "scales", "g_idx")


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What quantising one linear gave.

    Attributes:
        name: the layer, by its checkpoint name.
        error: relative squared error at its output over the calibration; None for "rtn".
        added_error: as `Solved.added_error`.
        damp_percent: the damping that it took.
        seconds: time of the solver.
        notes: what was unusual.
    """

    name: str
    error: float | None
    added_error: float | None
    damp_percent: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """One finished block: its packed linears by checkpoint name, and their reports in order."""

    packed: Mapping[str, PackedWeight]
    reports: tuple[LayerReport, ...]


class Journal:
    """The finished blocks of one run; make it with `opened`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def opened(
        cls, target: Path, facts: Mapping[str, object], *, restart: bool = False
    ) -> Iterator["Journal"]:
        """The journal of a target, begun or continued, while no other process has it.

        Args:
            target: the folder the run will make.
            facts: everything the result depends on, as JSON values.
            restart: forget what is there.

        Raises:
            CheckpointError: another run is at work, or what is there is of other facts.
        """
        folder = _folder(target)
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as fault:
            raise CheckpointError(
                f"cannot be made: {fault.strerror}", file=str(folder), remedy="check permissions"
            ) from fault
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CheckpointError(
                    "another run is quantising into this target", file=str(target)
                ) from None
            journal = cls(folder)
            journal._begin(facts)
            yield journal

    @property
    def num_done(self) -> int:
        """Blocks finished, without a gap."""
        done = 0
        while self._file(done).exists():
            done += 1
        return done

    def commit(self, block: int, result: BlockResult) -> None:
        """Put a finished block on record; it is on disk when this returns."""
        tensors = {
            f"{name}.{part}": tensor
            for name, packed in result.packed.items()
            for part, tensor in _tensors(packed).items()
        }
        layouts = {name: [w.bits, w.group_size] for name, w in result.packed.items()}
        metadata = {
            "layouts": json.dumps(layouts),
            "reports": json.dumps([asdict(report) for report in result.reports]),
        }
        write_tensor_file(self._file(block), tensors, metadata)

    def read(self, block: int) -> BlockResult:
        """A finished block, as it was committed."""
        file = TensorFile.open(self._file(block))
        packed = {}
        for name, (bits, group_size) in json.loads(file.metadata["layouts"]).items():
            parts = {
                part: file.read(f"{name}.{part}")
                for part in _PARTS
                if f"{name}.{part}" in file.tensors
            }
            packed[name] = PackedWeight(
                bits=bits,
                group_size=group_size,
                qweight_WN=parts["qweight"],
                zeros_GN=parts["zeros"],
                scales_GN=parts["scales"],
                g_idx_K=parts.get("g_idx"),
            )
        reports = tuple(
            LayerReport(**{**report, "notes": tuple(report["notes"])})
            for report in json.loads(file.metadata["reports"])
        )
        return BlockResult(packed=packed, reports=reports)

    def finish(self) -> None:
        """Say that the result is about to appear: from then on the journal is of no more use."""
        (self.folder / _FINISHED).touch()

    def remove(self) -> None:
        """The result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @classmethod
    def remove_finished(cls, target: Path) -> None:
        """Remove what a run left that was killed just after its result appeared."""
        if (_folder(target) / _FINISHED).exists():
            cls(_folder(target)).remove()

    def _begin(self, facts: Mapping[str, object]) -> None:
        """Write down the facts, or compare them with those that are there."""
        state = self.folder / _STATE
        wanted = {"fingerprint": _fingerprint(facts), "facts": dict(facts)}
        if not state.exists():
            with new_file(state) as stream:
                stream.write(json.dumps(wanted, indent=1, sort_keys=True).encode() + b"\n")
            return
        found = parse_object(state.read_bytes(), _STATE)
        if found.get("fingerprint") == wanted["fingerprint"]:
            return
        before = found.get("facts")
        differing = _differences(before if isinstance(before, dict) else {}, facts)
        raise CheckpointError(
            f"an unfinished run is of {differing}",
            file=str(self.folder),
            remedy="finish it with the same settings, or give --restart to begin anew",
        )

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"


def _folder(target: Path) -> Path:
    """Where the journal of a target is."""
    return target.absolute().with_name(f".{target.name}.quantizing")


def _tensors(packed: PackedWeight) -> dict[str, Any]:
    tensors = {
        "qweight": packed.qweight_WN,
        "zeros": packed.zeros_GN,
        "scales": packed.scales_GN,
        "g_idx": packed.g_idx_K,
    }
    return {part: tensor.cpu() for part, tensor in tensors.items() if tensor is not None}


def _fingerprint(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """What an earlier run had otherwise, in words."""
    names = sorted({*before, *now})
    changed = [name for name in names if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}, not {now.get(name)!r}" for name in changed)

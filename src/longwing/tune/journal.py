"""`Journal`: the state of an unfinished run, so that a stopped one goes on as if it had not been.

A folder beside the target: `journal.json` says by a fingerprint which run it is of, and the files
of `state.py` hold weights and moments after some step. `log.jsonl` has a line a step, and is cut
back to the state when a run goes on.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longwing.checkpoint import TensorFile, new_file, parse_object
from longwing.errors import CheckpointError
from longwing.tune.group import Group
from longwing.tune.learner import Learner
from longwing.tune.state import State, commit, has_state, write_part

_FACTS = "journal.json"
LOG = "log.jsonl"


class Journal:
    """One run's record; make it with `opened`.

    Attributes:
        folder: where it is.
    """

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
            facts: everything its result depends on, as JSON values.
            restart: forget what is there.

        Raises:
            CheckpointError: another run is at work, or what is there is of other facts.
        """
        folder = journal_folder(target)
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as fault:
            raise CheckpointError(
                f"cannot be made: {fault.strerror}",
                file=str(folder),
                remedy=f"make {folder.parent} first, or check its permissions",
            ) from fault
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CheckpointError(
                    "another run is tuning into this target", file=str(target)
                ) from None
            journal = cls(folder)
            journal._begin(facts)
            try:
                yield journal
            finally:
                if not has_state(folder):  # finished, or failed before there was anything
                    shutil.rmtree(folder, ignore_errors=True)

    def save(self, learner: Learner, steps: int, group: Group) -> None:
        """Put the state after `steps` steps on disk; every process calls it."""
        if learner.sharded or not group.rank:
            write_part(self.folder, learner.state(first=not group.rank), steps, group.rank)
        if learner.sharded:
            group.wait()  # until all parts are there
        if not group.rank:
            commit(self.folder, steps, group.size if learner.sharded else 1)

    def restore(self, learner: Learner) -> int:
        """Take up the state, if there is one; the steps it has behind it."""
        if not has_state(self.folder):
            return 0
        found = self.saved()
        learner.restore(found)
        return found.steps

    def saved(self) -> State:
        """What was saved last."""
        return State.open(self.folder)

    def log(self, record: Mapping[str, object]) -> None:
        """Append one line to the log."""
        with (self.folder / LOG).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The log's lines. One that a kill cut short is left out."""
        if not (self.folder / LOG).exists():
            return []
        lines = (self.folder / LOG).read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def remove(self) -> None:
        """The result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def cut_log(self, steps: int) -> None:
        """Forget what the log says of later steps: they will be gone through again."""
        kept = [record for record in self.records() if record["step"] <= steps]
        with new_file(self.folder / LOG) as stream:
            stream.writelines(json.dumps(record).encode() + b"\n" for record in kept)

    def _begin(self, facts: Mapping[str, object]) -> None:
        """Write down the facts, or compare them with those that are there."""
        file = self.folder / _FACTS
        wanted = {"fingerprint": _fingerprint(facts), "facts": dict(facts)}
        if not (file.exists() and has_state(self.folder)):
            with new_file(file) as stream:
                stream.write(json.dumps(wanted, indent=1, sort_keys=True).encode() + b"\n")
            return
        found = parse_object(file.read_bytes(), _FACTS)
        if found.get("fingerprint") == wanted["fingerprint"]:
            return
        before = found.get("facts")
        differing = _differences(before if isinstance(before, dict) else {}, facts)
        raise CheckpointError(
            f"an unfinished run is of {differing}",
            file=str(self.folder),
            remedy="finish it with the same settings, or give --restart to begin anew",
        )


def journal_folder(target: Path) -> Path:
    """Where the journal of a target is."""
    return target.absolute().with_name(f".{target.name}.tuning")


def weights_fingerprint(shards: Mapping[str, TensorFile]) -> str:
    """What tells one set of weight files from another without reading them: headers and sizes."""
    digest = hashlib.sha256()
    for name in sorted(shards):
        info = shards[name].tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape} {info.offset}\n".encode())
    return digest.hexdigest()


def _fingerprint(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """What an earlier run had otherwise, in words."""
    names = sorted({*before, *now})
    changed = [name for name in names if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}, not {now.get(name)!r}" for name in changed)

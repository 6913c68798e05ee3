"""Files and folders that appear whole or not at all.

Everything this room writes goes through `new_file` or `new_folder`: bytes go to a
`.NAME.partial-XXXX` beside the target, are forced to disk, and only then take the target's name. A
full disk, Ctrl-C or a kill at any byte leaves the old state or the new one, and perhaps a
`.partial-` leftover, which readers refuse to open (`is_partial`).
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from longwing.errors import CheckpointError

_PARTIAL = re.compile(r"\.(partial|incomplete)(-|$)")


def is_partial(name: str) -> bool:
    """A file or folder of this name is an unfinished write (ours) or download (the Hub's)."""
    return _PARTIAL.search(name) is not None


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file `path` when the block ends without an exception.

    An existing file is replaced in one step; whoever has it open keeps reading the old bytes.

    Raises:
        CheckpointError: the system refuses to write (disk full, no permission); nothing was
            changed.
    """
    partial = _partial_beside(path)
    try:
        with open(partial, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync(path.parent)
    except OSError as fault:
        raise CheckpointError(
            f"cannot be written: {fault.strerror}",
            file=path.name,
            remedy=f"check free space and permissions of {path.parent}",
        ) from fault
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an exception.

    It lies beside the target, so that the last step is a rename on one volume. With an exception it
    is removed, and the target is as it was.

    Args:
        target: the folder to make; its parent must exist.
        overwrite: replace an existing model folder (one that is empty or holds a config.json; any
            other is refused, so that a slip of the pen does not delete a home folder). Between two
            renames there is an instant without a target; a kill just then leaves the old folder
            beside it as `.NAME.replaced-XXXX`.

    Raises:
        CheckpointError: the target exists (or may not be replaced), or the system refuses to write.
    """
    target = target.absolute()
    _check_target(target, overwrite)
    partial = _partial_beside(target)
    try:
        partial.mkdir()
    except OSError as fault:
        raise CheckpointError(
            f"cannot be made: {fault.strerror}",
            file=str(target),
            remedy=f"make {target.parent} first, or choose another place",
        ) from fault
    try:
        yield partial
        _check_target(target, overwrite)
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise CheckpointError(
            "exists already", file=str(target), remedy="choose another name, or ask to overwrite it"
        )
    replaceable = target.is_dir() and not target.is_symlink()
    if not replaceable or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise CheckpointError(
            "is not a model folder (no config.json in it), so it will not be replaced",
            file=str(target),
            remedy="choose another name, or remove it yourself",
        )


def _publish(partial: Path, target: Path) -> None:
    """Force all of `partial` to disk and give it the target's name, moving an old target aside."""
    aside = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    try:
        for folder, _, names in os.walk(partial, topdown=False):
            for name in names:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        if target.exists():
            target.rename(aside)
        try:
            partial.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
        _sync(target.parent)
    except OSError as fault:
        raise CheckpointError(
            f"cannot be written: {fault.strerror}",
            file=str(target),
            remedy=f"check free space and permissions of {target.parent}",
        ) from fault
    shutil.rmtree(aside, ignore_errors=True)


def _partial_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Which files a model folder may lead to, and how they are opened.

A folder from the internet can hold links, and an index that names files; both are a stranger's
words. The rule here decides for every file that this room opens: the real file lies inside the
folder, or the folder is a snapshot of the Hugging Face cache (`models--*/snapshots/REVISION`) and
the real file lies in that same model's `blobs`. Anything else is refused, whatever it points to.

Files are opened without blocking and must be regular: a FIFO would hang the reader for ever.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longwing.checkpoint.strict_json import parse_object
from longwing.errors import CheckpointError, ConfigError

MAX_SETTINGS_BYTES = 4 * 2**20
"""The largest settings file (config.json and its kind); real ones have a few kilobytes."""


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, once it is known to be a regular file that lies where it may.

    Raises:
        CheckpointError: missing, a dangling link, not a regular file, or leaving the folder.
    """
    path = folder / name
    try:
        home, real = folder.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError:
        reason = "is a link to a file that is not there" if path.is_symlink() else "is missing"
        raise CheckpointError(reason, file=name, remedy="download the model again") from None
    except (OSError, RuntimeError, ValueError) as fault:
        raise CheckpointError(f"cannot be found: {fault}", file=name) from None
    if not (real.is_relative_to(home) or _is_blob_of(home, real)):
        raise CheckpointError(
            "leads out of the model folder",
            file=name,
            remedy="copy the file it points to into the folder, if you trust that file",
        )
    if not real.is_file():
        raise CheckpointError("is not a regular file", file=name)
    return path


def _is_blob_of(home: Path, real: Path) -> bool:
    """`home` is a snapshot in the Hugging Face cache, and `real` a blob of the same model."""
    snapshots, model = home.parent, home.parent.parent
    return (
        snapshots.name == "snapshots"
        and model.name.startswith("models--")
        and real.parent == model / "blobs"
    )


@contextmanager
def opened(path: Path, file: str) -> Iterator[int]:
    """A read-only descriptor of a regular file; every OSError inside becomes a CheckpointError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError("is not a regular file", file=file)
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise CheckpointError("is missing", file=file) from None
    except OSError as fault:
        raise CheckpointError(f"cannot be read: {fault.strerror}", file=file) from None


def read_bytes(folder: Path, name: str, limit: int) -> bytes:
    """The whole of a small file of the folder.

    Raises:
        CheckpointError: `inside` refuses it, it is longer than `limit` bytes, or reading fails.
    """
    with opened(inside(folder, name), name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CheckpointError(f"has {size:,} bytes; the limit is {limit:,}", file=name)
        with open(descriptor, "rb", closefd=False) as stream:
            # A file that grows between the two calls is cut at what was promised.
            return stream.read(size)


def read_settings(folder: Path, name: str) -> dict[str, object]:
    """The JSON object in a settings file of the folder.

    Raises:
        CheckpointError: the file cannot be read; ConfigError when its JSON is not acceptable.
    """
    return parse_object(read_bytes(folder, name, MAX_SETTINGS_BYTES), name, ConfigError)

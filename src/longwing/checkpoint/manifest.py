"""`longwing.manifest.json`: what a finished folder holds, so that later damage can be seen.

Holds the writing of the manifest, last of all files, and the check of a folder against it. A
manifest lies beside what it describes, so it proves integrity, not origin: whoever can replace a
file can replace it too.

    {"manifest": 1, "tool": "longwing", "version": "0.1.0",
     "files": {"config.json": {"size": 1234, "sha256": "..."}, ...},
     "meta": {...}}

Hidden files and folders (`.git`, the Hub's `.cache`) are left out on both sides.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from longwing.checkpoint.paths import inside, opened, read_bytes
from longwing.checkpoint.publish import new_file
from longwing.checkpoint.strict_json import parse_object, show
from longwing.errors import CheckpointError

MANIFEST = "longwing.manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_manifest(folder: Path, meta: Mapping[str, object]) -> None:
    """Hash every file of the folder and write the manifest, whole or not at all.

    Cost: reads everything once.

    Args:
        folder: the finished folder; nothing may be written to it afterwards.
        meta: what else should be on record (JSON values): source, settings, calibration digest.

    Raises:
        CheckpointError: a file cannot be read, leads out of the folder, or the disk is full.
    """
    files = {}
    for name in _file_names(folder):
        size, digest = _digest(folder, name, None)
        files[name] = {"size": size, "sha256": digest}
    manifest = {
        "manifest": 1,
        "tool": "longwing",
        "version": _version(),
        "files": files,
        "meta": dict(meta),
    }
    with new_file(folder / MANIFEST) as stream:
        stream.write(json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")


def check_manifest(
    folder: Path, progress: Callable[[int], None] | None = None
) -> list[CheckpointError]:
    """Compare a folder with its manifest; [] when every byte is as it was written.

    Cost: reads everything once, except files whose size already tells.

    Args:
        folder: the folder.
        progress: called with the number of bytes hashed since its last call.

    Returns:
        One error a file: changed, missing, not listed, or leading out of the folder. A manifest
        that is missing or cannot be understood is one error on its own.
    """
    try:
        listed = _read_manifest(folder)
    except CheckpointError as error:
        return [error]
    errors = []
    for name, (size, digest) in listed.items():
        try:
            _check_file(folder, name, size, digest, progress)
        except CheckpointError as error:
            errors.append(error)
    errors += [
        CheckpointError(
            f"is not listed in {MANIFEST}", file=name, remedy="remove it, if it is not yours"
        )
        for name in _file_names(folder)
        if name not in listed
    ]
    return errors


def _check_file(
    folder: Path, name: str, size: int, digest: str, progress: Callable[[int], None] | None
) -> None:
    """Raise CheckpointError unless the file has this size and SHA-256."""
    found_size = inside(folder, name).stat().st_size
    if found_size != size:
        raise CheckpointError(
            f"has {found_size:,} bytes; {MANIFEST} says {size:,}",
            file=name,
            remedy="restore it, or download it again",
        )
    _, found = _digest(folder, name, progress)
    if found != digest:
        raise CheckpointError(
            f"has SHA-256 {found[:16]}...; {MANIFEST} says {digest[:16]}...",
            file=name,
            remedy="restore it, or download it again",
        )


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, SHA-256 in hex)."""

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(
            reason, file=MANIFEST, remedy="write it again from a folder you trust"
        )

    raw = parse_object(read_bytes(folder, MANIFEST, MAX_MANIFEST_BYTES), MANIFEST)
    if raw.get("manifest") != 1:
        raise refuse(f"is of version {show(raw.get('manifest'))}; only 1 is known")
    files = raw.get("files")
    if not isinstance(files, dict):
        raise refuse(f'"files" is {show(files)}, not an object')
    listed = {}
    for name, entry in files.items():
        if not name.isprintable() or not _is_plain(name):
            raise refuse(f"file name {show(name)} is not a plain relative path")
        if not isinstance(entry, dict):
            raise refuse(f"{name}: entry is {show(entry)}, not an object")
        size, digest = entry.get("size"), entry.get("sha256")
        if type(size) is not int or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise refuse(f"{name}: entry is {show(entry)}; size and sha256 are needed")
        listed[name] = (size, digest)
    return listed


def _is_plain(name: str) -> bool:
    """A relative path without '.', '..' or backslashes."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and str(path) == name
        and ".." not in path.parts
        and "\\" not in name
    )


def _file_names(folder: Path) -> Iterator[str]:
    """Relative names of all files below the folder but hidden ones and the manifest, in order."""
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            relative = (Path(base) / name).relative_to(folder).as_posix()
            if not name.startswith(".") and relative != MANIFEST:
                yield relative


def _digest(folder: Path, name: str, progress: Callable[[int], None] | None) -> tuple[int, str]:
    """Size and SHA-256 of a file of the folder."""
    digest, size = hashlib.sha256(), 0
    with (
        opened(inside(folder, name), name) as descriptor,
        open(descriptor, "rb", closefd=False) as stream,
    ):
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if progress is not None:
                progress(len(chunk))
    return size, digest.hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("longwing")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

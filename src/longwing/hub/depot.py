"""Where files of the Hub lie on this machine: the cache, or a folder the user names.

A depot has two places. In the `store` bytes grow (`*.partial`) and verified files rest; in the
`folder` they have their names. Files get their names when all of them rest, so a folder with a
name is a whole model. In the cache the store is `blobs` and names are links into it, in
huggingface_hub's layout, so that other programs share the files; in a target folder the store is
its `.partial` sub-folder, files move out of it, and it goes when the pull is complete.
"""

import difflib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from huggingface_hub import constants
from huggingface_hub.file_download import are_symlinks_supported, repo_folder_name
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # lazily exported

from longwing.errors import HubError
from longwing.hub.repository import COMMIT, WEIGHTS, RemoteFile
from longwing.hub.trouble import some

_UNFINISHED = ".partial"


@dataclass(frozen=True, kw_only=True)
class Depot:
    """The places of one pull; see the top of this file."""

    store: Path
    folder: Path
    lock: Path
    is_linked: bool

    @classmethod
    def in_cache(cls, repo: str, commit: str) -> Self:
        """The Hugging Face cache; on a disk without links, names are files as in a target."""
        home = _home(repo)
        return cls(
            store=home / "blobs",
            folder=home / "snapshots" / commit,
            lock=home.parent / ".locks" / home.name / "longwing.lock",
            is_linked=are_symlinks_supported(home.parent),
        )

    @classmethod
    def at(cls, target: Path, files: Sequence[RemoteFile]) -> Self:
        """A folder of the user's, new or of an earlier pull of the same model."""
        folder = Path(target).absolute()
        if folder.exists() and not folder.is_dir():
            raise HubError(f"{folder} is a file; give a folder")
        ours = {file.name for file in files}
        foreign = [p.name for p in folder.glob("*") if p.suffix in WEIGHTS and p.name not in ours]
        if foreign:
            raise HubError(
                f"{folder} already holds other weights ({some(sorted(foreign))}), which a loader "
                "would mix up with these; give an empty folder"
            )
        store = folder / _UNFINISHED
        return cls(store=store, folder=folder, lock=store / "lock", is_linked=False)

    @contextmanager
    def reserved(self, repo: str) -> Iterator[None]:
        """Make the store, for one pull at a time: two would write the same partial files."""
        self.store.mkdir(parents=True, exist_ok=True)
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(self.lock, timeout=0.1))
            except TimeoutError as error:
                raise HubError(f"another pull of {repo} is running; wait for its end") from error
            yield

    def resting(self, file: RemoteFile) -> Path:
        """Where a verified file waits for its name; linked names share equal content."""
        name = file.digest if self.is_linked else f"{file.digest[:16]}.{file.name}"
        return self.store / name

    def partial(self, file: RemoteFile) -> Path:
        """Where the file grows. The name holds the digest, so two versions never mix."""
        resting = self.resting(file)
        return resting.with_name(f"{resting.name}.partial")

    def held(self, file: RemoteFile) -> Path | None:
        """A file that is already here and has the right size; its content is not judged."""
        for path in (self.resting(file), self.folder / file.name):
            if path.is_file() and path.stat().st_size == file.size:
                return path
        return None

    def num_missing_bytes(self, file: RemoteFile) -> int:
        """What is still to come of a file, after what an interrupted pull left."""
        partial = self.partial(file)
        return max(0, file.size - (partial.stat().st_size if partial.is_file() else 0))

    def place(self, file: RemoteFile) -> bool:
        """Give a resting file its name; True if a file with other content had it until now."""
        named, resting = self.folder / file.name, self.resting(file)
        if not resting.is_file():
            return False  # it has its name already
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.is_linked:
            had_other = named.is_file()
            os.replace(resting, named)
            return had_other
        if not (named.exists() and named.samefile(resting)):
            link = self.store / f"{file.digest}.link"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(resting, self.folder))
            os.replace(link, named)
        return False

    def finish(self, revision: str, commit: str) -> None:
        """All files have their names: remove the store, or let the branch point to them."""
        if self.store.name == _UNFINISHED:
            shutil.rmtree(self.store, ignore_errors=True)
        elif revision != commit:
            ref = self.store.parent / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            new = ref.with_name(f"{ref.name}.tmp")
            new.write_text(commit)
            os.replace(new, ref)


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse now what would fail hours later.

    Raises:
        HubError: the disk of `folder` (which exists) has less than `num_bytes` free.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise HubError(
            f"not enough disk space in {folder}: {num_bytes / 1e9:.2f} GB are still to be "
            f"downloaded, {free / 1e9:.2f} GB are free; make room, or use another disk (a target "
            "folder, or HF_HOME)"
        )


def is_unfinished(folder: Path) -> bool:
    """Whether a pull into this folder stopped on its way."""
    return (folder / _UNFINISHED).is_dir()


def cached_snapshot(repo: str, commit: str) -> Path:
    """The cache's folder for a commit, whether it exists or not."""
    return _home(repo) / "snapshots" / commit


def cached_commits(repo: str) -> list[str]:
    """Every commit of which the cache has at least something."""
    return sorted(path.name for path in _home(repo).glob("snapshots/*") if path.is_dir())


def cached_commit(repo: str, revision: str) -> str | None:
    """The commit that a revision meant when it was last pulled, if it is in the cache."""
    commit = revision
    if not COMMIT.fullmatch(revision):
        ref = _home(repo) / "refs" / revision
        commit = ref.read_text(errors="replace").strip() if ref.is_file() else ""
    return commit if commit in cached_commits(repo) else None


def missing_files(folder: Path) -> list[str]:
    """What a snapshot lacks: targets of links, settings, weights, shards that its index names.

    Other programs fill the cache too, a file at a time, so presence of the folder proves nothing.
    """
    names = {path.name for path in folder.iterdir()}
    present = {name for name in names if (folder / name).is_file()}
    missing = {name for name in names if not (folder / name).exists()}
    if not any(name.endswith(WEIGHTS) for name in names):
        missing.add("any weights")
    has_settings = {"config.json", "adapter_config.json"} & present
    if not has_settings and not any(name.endswith(".gguf") for name in present):
        missing.add("config.json")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            missing |= {str(shard) for shard in shards} - present
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a broken index is for the checkpoint reader to name
    return sorted(missing)


def did_you_mean(model: str) -> str:
    """The end of a sentence: folders and cached repositories with a similar name, if any."""
    parent = Path(os.path.expanduser(model)).parent
    names = [str(path) for path in parent.glob("*") if path.is_dir()]
    for home in Path(constants.HF_HUB_CACHE).glob("models--*"):
        names.append(home.name.removeprefix("models--").replace("--", "/"))
    close = difflib.get_close_matches(model, names, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _home(repo: str) -> Path:
    """The folder of one repository in huggingface_hub's cache."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")

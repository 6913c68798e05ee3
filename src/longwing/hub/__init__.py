"""Bring a model from the Hugging Face Hub to this machine: the only room that reaches the network.

    pulled = pull("owner/name")          # safetensors, JSON and tokenizer files, verified
    folder = find("owner/name")          # the same folder later, offline

What happens in a pull: one request lists the repository at a commit (names, sizes, digests); the
names are judged and files that can carry code are left behind (repository.py); free disk space is
compared with the need; the bytes arrive in `*.partial` files whose digest is taken as they grow
(transfer.py); a file whose digest is the Hub's is set to rest; only when all rest do they get
their names, and only then does the branch point to them (depot.py). So a folder that has a name is
whole, and an interrupted pull (Ctrl-C, power, network) goes on where it stopped. Whatever goes
wrong ends as a HubError with its remedy (trouble.py).

Tokens, cache layout, proxies, offline mode and the other HF_* variables are huggingface_hub's
business. Its downloader is not used: in 2.4 it deletes a partial file when it is interrupted, and
20 GB of a 22 GB file are worth keeping. For the same reason bytes travel over plain HTTP with
Range requests, not through hf_xet; what `hf download` has put into the cache is found and reused.

Nothing here runs, imports or unpickles what it downloads, and no telemetry is sent.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longwing.errors import HubError
from longwing.hub.depot import (
    Depot,
    cached_commit,
    cached_commits,
    cached_snapshot,
    did_you_mean,
    is_unfinished,
    missing_files,
    require_space,
)
from longwing.hub.repository import (
    checked_endpoint,
    is_repo_name,
    list_files,
    parse_name,
    request_headers,
    select,
)
from longwing.hub.transfer import PullProgress, Transfer
from longwing.hub.trouble import TROUBLE, explain, some

__all__ = ["PullProgress", "PulledModel", "find", "pull"]


@dataclass(frozen=True, kw_only=True)
class PulledModel:
    """A model that is now on this machine, every file verified against the Hub's digests."""

    path: Path
    """The folder to load."""
    repo: str
    """`owner/name`. Show it: look-alike owners are how bad models are spread."""
    revision: str
    """The commit sha, 40 hex digits; `repo@revision` names this content for good."""
    num_files: int
    num_bytes: int
    num_fetched_bytes: int
    """How many bytes came over the network this time; 0 if the model was already here."""
    replaced: tuple[str, ...]
    """Files of a target folder that had other content than the Hub's and were written over."""

    @property
    def owner(self) -> str:
        """The account that published the model."""
        return self.repo.split("/")[0]


def pull(
    repo: str,
    *,
    revision: str | None = None,
    target: Path | None = None,
    include: Sequence[str] = (),
    progress: PullProgress | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    check: bool = True,
    num_streams: int = 4,
) -> PulledModel:
    """Download a model's safetensors, JSON, tokenizer and licence files, and verify each.

    Files in sub-folders are not taken, nor anything that can carry code (.py, .bin, .pt, ...).

    Args:
        repo: `owner/name`, `owner/name@revision` or `owner/name:branch`.
        revision: branch, tag or commit; main if neither this nor `repo` says one.
        target: folder to fill with plain files; None: the Hugging Face cache.
        include: which weight files, as patterns (`gptq_model-4bit*`, `*.gguf`). Empty: every
            .safetensors. The only way to get .gguf. Other files come in any case.
        progress: see PullProgress.
        token: a Hub token; None: HF_TOKEN or the one `hf auth login` stored.
        endpoint: address of the Hub; None: HF_ENDPOINT or https://huggingface.co.
        check: read files that are already here again and compare digests (about a second a GB);
            False trusts their size. What is downloaded is always verified.
        num_streams: files on their way at once.

    Raises:
        HubError: for everything that goes wrong, with the remedy. What has arrived is kept, and
            the next pull continues from it; so too after KeyboardInterrupt, which passes through.
    """
    repo, revision = parse_name(repo, revision)
    endpoint = checked_endpoint(endpoint)
    headers = request_headers(token)
    try:
        commit, listing = list_files(repo, revision, endpoint, headers)
        files = select(repo, listing, include)
        depot = Depot.in_cache(repo, commit) if target is None else Depot.at(target, files)
        with depot.reserved(repo):
            transfer = Transfer(depot, f"{endpoint}/{repo}/resolve/{commit}", headers)
            absent = transfer.settle(files, check=check, progress=progress)
            require_space(depot.store, sum(depot.num_missing_bytes(file) for file in absent))
            num_fetched_bytes = transfer.fetch(absent, num_streams)
            replaced = [file.name for file in files if depot.place(file)]
            depot.finish(revision, commit)
    except TROUBLE as error:
        raise explain(error, repo, revision, endpoint) from error
    return PulledModel(
        path=depot.folder,
        repo=repo,
        revision=commit,
        num_files=len(files),
        num_bytes=sum(file.size for file in files),
        num_fetched_bytes=num_fetched_bytes,
        replaced=tuple(replaced),
    )


def find(model: str) -> Path:
    """The folder of a model on this machine; never touches the network.

    Args:
        model: a folder, or `owner/name[@revision]` of something in the Hugging Face cache.

    Raises:
        HubError: it is not here, or here only in part; says what to run.
    """
    try:
        return _folder(model) or _snapshot(model)
    except OSError as error:
        raise HubError(f"{model!r} cannot be read: {error}") from error


def _folder(model: str) -> Path | None:
    path = Path(os.path.expanduser(model))
    if model and path.is_dir():
        if is_unfinished(path):
            raise HubError(f"{model}: an unfinished pull; run the same longwing pull again")
        return path
    if path.is_file():
        raise HubError(f"{model} is a file; give the folder that holds it")
    return None


def _snapshot(model: str) -> Path:
    if not is_repo_name(model):
        raise HubError(
            f"{model!r} is neither a folder nor a name on the Hub (owner/name or "
            f"owner/name@revision){did_you_mean(model)}"
        )
    repo, revision = parse_name(model)
    command = f"longwing pull {repo}" + ("" if revision == "main" else f"@{revision}")
    commit = cached_commit(repo, revision)
    if commit is None:
        others = [f"{repo}@{other}" for other in cached_commits(repo)]
        here = f"; here are {some(others)}" if others else ""
        hint = did_you_mean(model)
        raise HubError(f"{model} is not on this machine; run: {command}{here}{hint}")
    snapshot = cached_snapshot(repo, commit)
    if missing := missing_files(snapshot):
        raise HubError(f"{model} is only partly here, without {some(missing)}; run: {command}")
    return snapshot

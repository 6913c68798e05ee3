"""A repository on the Hub: its name as typed, its files as listed, and which of them to take.

Neither the user's text nor the server's answer is trusted: both become addresses and file names,
so both are checked here, before anything is fetched or written. What passes: a flat folder of
weights in formats that are only data, with their settings, tokenizer and licence.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from urllib.parse import quote, urlsplit

from huggingface_hub import constants, get_session, get_token, hf_raise_for_status

from longwing.errors import HubError
from longwing.hub.trouble import some

WEIGHTS = (".safetensors", ".gguf")
COMMIT = re.compile(r"[0-9a-f]{40}")

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:[@:](?P<revision>.*))?", re.DOTALL)
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_.+-]+)*")
_HUB_URL = re.compile(r"https?://[^/]+/(?P<repo>[^/]+/[^/?#]+)")
_FILE_NAME = re.compile(r"[\w(\[][\w .,+@()\[\]=-]*")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

_INDEX = ".safetensors.index.json"  # model.safetensors.index.json lists model-00001-of-...
_PLAIN_DATA = (".json", ".jinja", ".txt", ".md", ".tiktoken")
_SENTENCEPIECE = frozenset({"tokenizer.model", "spiece.model", "sentencepiece.bpe.model"})
_LEGAL = ("license", "licence", "notice", "copying")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file as the Hub lists it.

    `digest` is the content's sha256 for files in LFS, and git's blob id (a sha1) for small ones;
    huggingface_hub's cache names blobs by the same rule.
    """

    name: str
    size: int
    digest: str

    def new_hash(self) -> "hashlib._Hash":
        """An empty hash of the kind of `digest`; git hashes a header before the content."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


Listing = dict[str, RemoteFile | None]
"""Files by path; None where the server does not say size and digest."""


def is_repo_name(text: str) -> bool:
    """Whether the text has the form of `owner/name`, with or without a revision."""
    return _REPO.fullmatch(text) is not None


def parse_name(repo: str, revision: str | None = None) -> tuple[str, str]:
    """(`owner/name`, revision) from `owner/name[@revision]` and a revision given beside it."""
    if url := _HUB_URL.match(repo):
        raise HubError(f"{repo!r} is an address; give its owner/name: {url['repo']}")
    match = _REPO.fullmatch(repo)
    if match is None or "--" in match["repo"] or ".." in match["repo"]:
        remedy = "give owner/name, for example tiiuae/falcon-7b"
        if repo.startswith((".", "/", "~")) or "\\" in repo or repo.count("/") > 1:
            remedy += "; a folder needs no pull, pass it where a model is asked for"
        raise HubError(f"{repo!r} is not the name of a repository on the Hub; {remedy}")
    inside = match["revision"]
    if None not in (inside, revision) and inside != revision:
        raise HubError(f"two revisions: {inside!r} in the name, {revision!r} beside it; give one")
    chosen = next((text for text in (inside, revision) if text is not None), "main")
    if not _REVISION.fullmatch(chosen) or ".." in chosen or len(chosen) > 200:
        raise HubError(f"{chosen!r} is not a revision; give a branch, a tag or a commit sha")
    return match["repo"], chosen


def checked_endpoint(endpoint: str | None) -> str:
    """The Hub's address without its last slash; None: what HF_ENDPOINT says."""
    address = (endpoint or constants.ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(address)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise HubError(f"{address!r} is not the address of a Hub; set HF_ENDPOINT to https://...")
    return address


def request_headers(token: str | None) -> dict[str, str]:
    """Who asks, and nothing else about this machine; with the token, where there is one."""
    headers = {"user-agent": "longwing"}
    if token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        try:
            token = get_token()
        except Exception as error:  # logins by browser and by CI each fail in their own way
            raise HubError(f"the Hub login has expired ({error}); set HF_TOKEN") from error
    if token is None:
        return headers
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise HubError("the Hub token is empty or holds spaces or control characters; set HF_TOKEN")
    return {**headers, "authorization": f"Bearer {token}"}


def list_files(
    repo: str, revision: str, endpoint: str, headers: dict[str, str]
) -> tuple[str, Listing]:
    """(commit sha, every file of the repository at that commit), in one request.

    Raises:
        HubError: the answer is not a Hub's, or not a safe one.
        TROUBLE: the request failed (see trouble.py).
    """
    response = get_session().get(
        f"{endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}",
        params={"blobs": "true"},
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        follow_redirects=True,
    )
    hf_raise_for_status(response)
    try:
        answer = response.json()
        commit = str(answer["sha"])
        listing = {str(entry["rfilename"]): _remote_file(entry) for entry in answer["siblings"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{endpoint} did not answer as a Hub does ({type(error).__name__}: {error}); "
            "check HF_ENDPOINT, or for a login page between you and the network"
        ) from error
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
        raise HubError(f"{endpoint} answers commit {commit!r} for {repo}@{revision}; do not use it")
    for path in listing:
        if not path or path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise HubError(
                f"{repo} lists a file {path!r}, which would be written outside the model's folder; "
                "do not use this repository"
            )
    return commit, listing


def _remote_file(entry: dict[str, object]) -> RemoteFile | None:
    lfs = entry.get("lfs")
    size, digest = entry.get("size"), entry.get("blobId")
    if isinstance(lfs, dict):
        size, digest = lfs.get("size"), lfs.get("sha256")
    # The digest becomes a file name in the cache: its form is a matter of safety.
    if not isinstance(size, int) or size < 0 or not _DIGEST.fullmatch(str(digest)):
        return None
    return RemoteFile(name=str(entry["rfilename"]), size=size, digest=str(digest))


def select(repo: str, listing: Listing, include: Sequence[str]) -> list[RemoteFile]:
    """The files to take, small ones first, so that a refusal comes before the gigabytes.

    Args:
        repo: for messages.
        listing: of list_files.
        include: see longwing.hub.pull.
    """
    top = [path for path in listing if "/" not in path]
    weights = _weights(repo, listing, top, include)
    files = []
    for name in weights + [name for name in top if _is_plain(name, weights)]:
        file = listing[name]
        if not _FILE_NAME.fullmatch(name):
            raise HubError(f"{repo} lists a file {name!r}, a name that longwing will not write")
        if file is None:
            raise HubError(f"the server does not say size and digest of {name}; check HF_ENDPOINT")
        files.append(file)
    return sorted(files, key=lambda file: (file.size, file.name))


def _weights(repo: str, listing: Listing, top: list[str], include: Sequence[str]) -> list[str]:
    patterns = (include,) if isinstance(include, str) else tuple(include)
    if not patterns:
        dense = [name for name in top if name.endswith(".safetensors")]
        if not dense:
            raise HubError(_no_safetensors(repo, listing))
        return dense
    weights = [name for name in top if name.endswith(WEIGHTS)]
    chosen = [name for name in weights if any(fnmatchcase(name, p) for p in patterns)]
    if not chosen:
        raise HubError(
            f"no weight file of {repo} matches {some(patterns)}; it has {some(weights) or 'none'} "
            f"(taken are {' and '.join(WEIGHTS)}; .bin and .pt can run code when loaded)"
        )
    return chosen


def _is_plain(name: str, weights: list[str]) -> bool:
    """Settings, tokenizers, templates, licences: data that no loader executes.

    The index of shards that are not taken stays behind: a loader would look for them.
    """
    if name.endswith(_INDEX):
        return any(weight.startswith(f"{name.removesuffix(_INDEX)}-") for weight in weights)
    is_legal = "." not in name and name.lower().startswith(_LEGAL)
    return is_legal or name in _SENTENCEPIECE or name.endswith(_PLAIN_DATA)


def _no_safetensors(repo: str, listing: Listing) -> str:
    """What the repository has instead, and what to do about it."""
    kinds = Counter(PurePosixPath(path).suffix or path for path in listing)
    has = ", ".join(f"{count} {kind!r}" for kind, count in kinds.most_common(8)) or "no files"
    nested = {str(PurePosixPath(path).parent) for path in listing if path.endswith(WEIGHTS[0])}
    if nested:
        remedy = f"its safetensors are in sub-folders ({some(sorted(nested))}), which are not taken"
    elif ".gguf" in kinds:
        remedy = "take its GGUF with include '*.gguf' and run longwing convert on it"
    else:
        remedy = "look for a safetensors version: .bin and .pt files can run code when loaded"
    return f"{repo} has no .safetensors files, but {has}; {remedy}"

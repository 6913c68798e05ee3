"""What goes wrong on the way to the Hub, in sentences with a remedy.

Exceptions of huggingface_hub, of its HTTP client and of the file system end here: `explain` turns
each into a HubError. A server's own words are quoted only after they are made safe to print.
"""

import errno
from collections.abc import Sequence

from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from longwing.errors import HubError

# Root of what the HTTP client raises: httpx2's in huggingface_hub 2, httpx's in 1.
_HttpError: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]

TROUBLE: tuple[type[Exception], ...] = (_HttpError, OSError)
"""Every exception that `explain` is for."""

_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_CONTINUES = "run the pull again, it continues where it stopped"


class CutShortError(ConnectionError):
    """The server ended its answer in good order, but before the last byte."""


def may_pass(error: Exception) -> bool:
    """Whether trying again can help: lost connections and overloaded servers, not refusals."""
    if isinstance(error, hub_errors.HfHubHTTPError):
        return error.response.status_code in _PASSING_STATUS
    return isinstance(error, (_HttpError, CutShortError))


def explain(error: Exception, repo: str, revision: str, endpoint: str) -> HubError:
    """The HubError for one of TROUBLE that a pull of `repo` met."""
    page = f"{endpoint}/{repo}"
    match error:
        case hub_errors.OfflineModeIsEnabled():
            text = (
                f"{repo} cannot be pulled while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; "
                "unset it, or give a folder that is already on this machine"
            )
        case hub_errors.GatedRepoError():
            text = (
                f"{repo} is gated: open {page} with your account, accept its licence, then set "
                "HF_TOKEN to a token of that account (or run: hf auth login)"
            )
        case hub_errors.RepositoryNotFoundError():
            text = (
                f"there is no model {repo} at {endpoint}, or it is private; check the spelling, or "
                "set HF_TOKEN to a token that may read it"
            )
        case hub_errors.RevisionNotFoundError():
            text = f"{repo} has no revision {revision!r}; its branches and tags: {page}/tree/main"
        case hub_errors.HfHubHTTPError():
            text = _explain_status(error, repo, page)
        case OSError() if not isinstance(error, ConnectionError | TimeoutError):
            text = _explain_disk(error, repo)
        case _:
            what = "no answer" if "Timeout" in type(error).__name__ else "no connection"
            said = _tidy(str(error)) or type(error).__name__
            text = (
                f"{what} from {endpoint} ({said}); check the network, the proxy settings and "
                f"HF_ENDPOINT, then {_CONTINUES}"
            )
    return HubError(text)


def _explain_status(error: hub_errors.HfHubHTTPError, repo: str, page: str) -> str:
    status = error.response.status_code
    said = f"{status}: {_tidy(error.server_message or '')}".removesuffix(": ")
    if status in (401, 403):
        return (
            f"the Hub refuses access to {repo} ({said}); check that HF_TOKEN is valid and that its "
            f"account may read {page}"
        )
    if status == 404:
        return f"a file that {repo} lists is not there ({said}); look at {page}/tree/main"
    if status == 429:
        return f"the Hub limits your requests ({said}); set HF_TOKEN or wait, then {_CONTINUES}"
    if status >= 500:
        return f"the Hub is in trouble ({said}); wait some minutes, then {_CONTINUES}"
    return f"the Hub does not answer for {repo} ({said}); look at {page}"


def _explain_disk(error: OSError, repo: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or constants.HF_HUB_CACHE
        return f"the disk is full (at {where}); make room, then {_CONTINUES}"
    return (
        f"{repo} cannot be stored ({error}); give another target folder, or set HF_HOME to a "
        "folder you may write to"
    )


def some(names: Sequence[str]) -> str:
    """A list for a sentence, cut to five; names may be a server's."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(_tidy(name) for name in names[:5]) + more


def _tidy(text: str) -> str:
    """A server's words, safe for a terminal: one line, printable, short."""
    line = " ".join(text.split())[:200]
    return "".join(char for char in line if char.isprintable())

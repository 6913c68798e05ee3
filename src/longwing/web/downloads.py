"""`Downloads`: `longwing pull` as child processes, their progress, and what became of them.

The child does the talking to the Hub, with the operator's own settings (HF_TOKEN, HF_ENDPOINT,
HF_HOME…); a request gives a name and nothing else. What has arrived stays when a pull is cancelled
or fails, and the next pull of the name goes on from there.
"""

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from longwing.errors import HubError, LongwingError, OverloadedError
from longwing.web.child import Child

MAX_RUNNING = 2
MAX_KEPT = 50
"""Downloads that are remembered."""
_SPEED_S = 5.0
"""Seconds over which the speed is taken."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(
    rf"(?P<repo>(?P<owner>{_PART})/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_.+/-]*))?"
)
"""What is passed on at all; the child judges it again."""
_PATTERN = re.compile(r"[\w*?][\w.*?+-]*", re.ASCII)


class RunningError(LongwingError):
    """It runs already, or does not."""


@dataclass(kw_only=True)
class Download:
    """One pull.

    Attributes:
        name: owner/name[@revision], as asked for.
        owner: whose it is.
        revision: branch, tag or commit; None: main.
        include: patterns of weight files.
        state: "running", "done", "failed" or "cancelled".
        done_bytes, total_bytes: of all its files; 0 until the list of files has come.
        file: what grew last.
        bytes_per_s: of late; None while nobody knows.
        started_at, ended_at: seconds since 1970.
        error: why it failed.
    """

    name: str
    owner: str
    revision: str | None
    include: tuple[str, ...] = ()
    state: str = "running"
    done_bytes: int = 0
    total_bytes: int = 0
    file: str = ""
    bytes_per_s: float | None = None
    started_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, object]:
        """As the page gets it."""
        return asdict(self)


class Downloads:
    """All downloads of this server's life."""

    def __init__(self) -> None:
        self._kept: dict[str, Download] = {}
        self._running: dict[str, tuple[Child, asyncio.Task[None]]] = {}

    @property
    def num_running(self) -> int:
        """Downloads under way."""
        return len(self._running)

    def all(self) -> list[Download]:
        """Every download, the newest first."""
        return sorted(self._kept.values(), key=lambda download: -download.started_at)

    def begin(self, name: str, include: Sequence[str] = ()) -> Download:
        """Start a pull, or go on with one.

        Raises:
            RunningError: it runs already.
            OverloadedError: enough others do.
            HubError: that is no name on the Hub, or no pattern.
        """
        parts = _NAME.fullmatch(name)
        if parts is None or "--" in parts["repo"] or ".." in name or len(name) > 300:
            raise HubError(f"{name!r} is not the name of a model on the Hub; give owner/name")
        for pattern in include:
            if not _PATTERN.fullmatch(pattern):
                raise HubError(f"{pattern!r} is not a pattern of file names, such as *.safetensors")
        if name in self._running:
            raise RunningError(f"{name} is being downloaded already")
        if self.num_running >= MAX_RUNNING:
            raise OverloadedError(f"{MAX_RUNNING} downloads are under way, the most at a time", 10)
        download = Download(
            name=name, owner=parts["owner"], revision=parts["revision"], include=tuple(include)
        )
        self._kept.pop(name, None)
        self._kept[name] = download
        for old in [one.name for one in self.all()[MAX_KEPT:] if one.state != "running"]:
            del self._kept[old]
        speed: deque[tuple[float, int]] = deque()
        arguments = ["pull", name, "--progress-json"]
        arguments += [f"--include={pattern}" for pattern in include]
        child = Child(arguments, lambda line: _hear(download, line, speed))
        task = asyncio.create_task(self._watch(download, child), name=f"download {name}")
        self._running[name] = child, task
        return download

    async def cancel(self, name: str) -> Download:
        """Stop a pull; what has arrived is kept.

        Raises:
            KeyError: there was never one.
            RunningError: it has ended.
        """
        download = self._kept[name]
        if name not in self._running:
            raise RunningError(f"{name} is not being downloaded: it is {download.state}")
        child, task = self._running[name]
        await child.stop()
        await asyncio.wait([task])
        return download

    async def close(self) -> None:
        """Stop every pull."""
        await asyncio.gather(*(self.cancel(name) for name in list(self._running)))

    async def _watch(self, download: Download, child: Child) -> None:
        """Until it ends; then say how."""
        if await child.wait():
            download.state = "done"
        elif child.was_stopped:
            download.state = "cancelled"
        else:
            download.state, download.error = "failed", child.complaint
        download.bytes_per_s, download.ended_at = None, time.time()
        del self._running[download.name]


def _hear(download: Download, line: str, speed: deque[tuple[float, int]]) -> None:
    """Take a line of `longwing pull --progress-json`."""
    try:
        said: Any = json.loads(line)
        done, total, file = int(said["done"]), int(said["total"]), str(said["file"])
    except (ValueError, KeyError, TypeError):
        return  # the last line is the result
    download.done_bytes, download.total_bytes, download.file = done, total, file
    now = time.monotonic()
    speed.append((now, done))
    while now - speed[0][0] > _SPEED_S:
        speed.popleft()
    since, then = speed[0]
    if now - since >= 1:
        download.bytes_per_s = max(0.0, (done - then) / (now - since))

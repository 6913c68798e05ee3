"""Bytes on their way: from the Hub to files that rest, verified, in a depot.

The idea: the length of a partial file is the whole state of its download. It is written without
a buffer and only ever grows at its end, so after anything (Ctrl-C, a lost line, kill -9) the next
request asks for `Range: bytes=<length>-`. The digest is taken while bytes pass; a file rests only
if it is the Hub's. Lost connections and overloaded servers are tried again, and only tries that
bring no byte use up the patience.
"""

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import quote

from huggingface_hub import constants, get_session, hf_raise_for_status

from longwing.errors import HubError
from longwing.hub.depot import Depot
from longwing.hub.repository import RemoteFile
from longwing.hub.trouble import TROUBLE, CutShortError, may_pass

RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # between tries that brought nothing
MAX_REQUEST_BYTES = 16 * 2**30  # the Hub does not answer with more than 50 GB at once
_READ_BYTES = 2**20


class PullProgress(Protocol):
    """Told how far a pull is; called from worker threads, one call at a time, about once a MiB."""

    def __call__(self, done_bytes: int, total_bytes: int, file: str) -> None:
        """`done_bytes` of the `total_bytes` of all files are here; `file` just grew.

        What was here before the pull counts as done once it is verified. The count goes back when
        bytes turn out to be wrong. A pull that succeeds ends with done == total.
        """


class Transfer:
    """One pull's traffic: which files are absent, then their arrival.

    Args:
        depot: where files grow and rest; it must be reserved.
        url: of the commit; a file's name is put behind it.
        headers: who asks.
    """

    def __init__(self, depot: Depot, url: str, headers: dict[str, str]) -> None:
        self._depot = depot
        self._url = url
        self._headers = headers
        self._meter = _Meter(0, None)
        self._halt = threading.Event()
        self._lines: set[socket.socket] = set()  # that workers read from just now

    def settle(
        self, files: Sequence[RemoteFile], *, check: bool, progress: PullProgress | None
    ) -> list[RemoteFile]:
        """The files that must be fetched: not here, or here with a wrong digest (if `check`)."""
        distinct = list({self._depot.resting(file): file for file in files}.values())
        self._meter = _Meter(sum(file.size for file in distinct), progress)
        return [file for file in distinct if not self._is_here(file, check)]

    def _is_here(self, file: RemoteFile, check: bool) -> bool:
        path = self._depot.held(file)
        if path is None:
            return False
        if not check:
            self._meter.add(file.size, file.name)
            return True
        with _Growing(path, file, self._meter, mode="rb") as found:
            if found.is_right():
                return True
            self._meter.add(-found.len, file.name)
        if path == self._depot.resting(file):
            path.unlink()  # a damaged blob; a named file stays until its successor rests
        return False

    def fetch(self, absent: Sequence[RemoteFile], num_streams: int) -> int:
        """Bring every file to rest, `num_streams` at a time; returns the bytes that came."""
        with ThreadPoolExecutor(max(1, num_streams), thread_name_prefix="longwing-pull") as pool:
            jobs = [pool.submit(self._fetch_file, file) for file in absent]
            try:
                return sum(job.result() for job in as_completed(jobs))
            except BaseException:  # Ctrl-C too: the workers come to an end, what arrived stays
                self._halt.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for line in tuple(self._lines):
                    with suppress(OSError):
                        line.shutdown(socket.SHUT_RDWR)
                raise

    def _fetch_file(self, file: RemoteFile) -> int:
        path = self._depot.partial(file)
        mode = "r+b" if path.exists() else "w+b"
        with _Growing(path, file, self._meter, mode=mode) as growing:
            for is_resumed in (growing.len > 0, False):
                self._grow(growing, file)
                if growing.is_right():
                    growing.keep()
                    break
                growing.restart()
                if not is_resumed:
                    raise HubError(
                        f"{file.name}: the bytes that arrived are not those the Hub lists (digest "
                        f"{file.digest}); pull again, and do not use this server if it stays so"
                    )
        os.replace(path, self._depot.resting(file))
        return growing.num_fetched_bytes

    def _grow(self, growing: "_Growing", file: RemoteFile) -> None:
        """Ask until the file has its size, or nothing more comes."""
        waits = iter(RETRY_WAITS_S)
        while growing.len < file.size:
            fetched_before = growing.num_fetched_bytes
            try:
                self._request(growing, file)
            except TROUBLE as error:
                if growing.num_fetched_bytes > fetched_before:
                    waits = iter(RETRY_WAITS_S)
                wait_s = next(waits, None) if may_pass(error) else None
                if wait_s is None:
                    raise
                if self._halt.wait(wait_s):
                    raise _Halted from error

    def _request(self, growing: "_Growing", file: RemoteFile) -> None:
        """One request for the bytes that are missing."""
        start, end = growing.len, min(file.size, growing.len + MAX_REQUEST_BYTES)
        headers = {**self._headers, "accept-encoding": "identity"}
        if start > 0 or end < file.size:
            headers["range"] = f"bytes={start}-{end - 1}"
        with (
            get_session().stream(
                "GET",
                f"{self._url}/{quote(file.name)}",
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                follow_redirects=True,  # to the CDN; the client drops the token on the way
            ) as response,
            self._open_line(response),
        ):
            hf_raise_for_status(response)
            is_rest = response.headers.get("content-range", "").startswith(f"bytes {start}-")
            if start > 0 and not (response.status_code == 206 and is_rest):
                growing.restart()  # the server starts at the first byte, so must the file
            begun = growing.len
            for chunk in response.iter_bytes():
                if self._halt.is_set():
                    raise _Halted
                growing.append(chunk)
        if growing.len == begun:
            raise CutShortError(f"the server sent {begun} of {file.size} bytes of {file.name}")

    @contextmanager
    def _open_line(self, response: Any) -> Iterator[None]:
        """Make known where a worker waits, so that Ctrl-C need not wait for a silent server."""
        stream = response.extensions.get("network_stream")
        line = stream.get_extra_info("socket") if stream else None
        if line is None:
            yield
            return
        self._lines.add(line)
        try:
            yield
        finally:
            self._lines.discard(line)


class _Growing:
    """A file, and the running digest of what it holds.

    Opening it digests what is there already; that is counted as done, and not as fetched.
    """

    def __init__(self, path: Path, file: RemoteFile, meter: "_Meter", *, mode: str) -> None:
        self.len = 0
        self.num_fetched_bytes = 0
        self._file = file
        self._meter = meter
        self._hash = file.new_hash()
        self._handle = open(path, mode, buffering=0)  # noqa: SIM115 - closed by __exit__
        while chunk := self._handle.read(_READ_BYTES):
            self._count(chunk)
        if self.len > file.size:
            self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handle.close()

    def append(self, chunk: bytes) -> None:
        """Write and digest bytes that arrived."""
        if self.len + len(chunk) > self._file.size:
            self.restart()
            raise HubError(
                f"{self._file.name}: the server sends more than the {self._file.size} bytes it "
                "listed; check HF_ENDPOINT"
            )
        rest = memoryview(chunk)
        while rest:  # an unbuffered write may take only a part
            rest = rest[self._handle.write(rest) :]
        self.num_fetched_bytes += len(chunk)
        self._count(chunk)

    def restart(self) -> None:
        """Forget everything, on disk too."""
        self._handle.seek(0)
        self._handle.truncate()
        self._meter.add(-self.len, self._file.name)
        self.len, self._hash = 0, self._file.new_hash()

    def is_right(self) -> bool:
        """Whether these are all the bytes, and the Hub's."""
        return self.len == self._file.size and self._hash.hexdigest() == self._file.digest

    def keep(self) -> None:
        """Make the bytes last beyond a power cut; only then may the file change its name."""
        os.fsync(self._handle.fileno())

    def _count(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.len += len(chunk)
        self._meter.add(len(chunk), self._file.name)


class _Meter:
    """Adds up bytes from several threads and tells the caller now and then."""

    def __init__(self, total: int, progress: PullProgress | None) -> None:
        self._lock = threading.Lock()
        self._progress = progress
        self._total = total
        self._step = min(2**20, total // 1000)
        self._done = 0
        self._told = 0

    def add(self, num_bytes: int, file: str) -> None:
        with self._lock:
            self._done += num_bytes
            is_news = abs(self._done - self._told) > self._step or self._done == self._total
            if self._progress is not None and is_news:
                self._told = self._done
                self._progress(self._done, self._total, file)


class _Halted(Exception):  # noqa: N818 - the end of a worker, not an error of its own
    """The pull is being given up, because another file failed or the user pressed Ctrl-C."""

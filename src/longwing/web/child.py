"""`Child`: a `longwing` command as a child process, its lines as they come.

The page's long works are the commands that a person would type. They run beside the server: what
they import, crash on or use up is theirs. A child is ended as Ctrl-C would end it, so that it keeps
what it has done; one that does not heed that is killed.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

MAX_LINE = 2**20
"""Bytes of one line of output."""
STOP_S = 10.0
"""Seconds in which a child that was told to stop must have ended."""
_TAIL = 8192
"""Characters of its stderr that are kept."""

OnLine = Callable[[str], None]


class Child:
    """One child process, which starts by itself.

    Args:
        arguments: of the `longwing` command line.
        on_line: called with each line of its stdout.
        environ: what its environment has beside ours; see `environment`.

    Attributes:
        was_stopped: whether it was told to.
        code: its exit status; None while it runs, and if it was stopped before it started.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        on_line: OnLine = lambda line: None,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.was_stopped = False
        self.code: int | None = None
        self._arguments = arguments
        self._environ = {**environment(), **(environ or {})}
        self._on_line = on_line
        self._said = ""
        self._process: asyncio.subprocess.Process | None = None
        self._life = asyncio.create_task(self._live(), name=f"longwing {arguments[0]}")

    @property
    def complaint(self) -> str:
        """Its last words, without the word `error:` that the command line puts before them."""
        lines = [line for line in self._said.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"it ended with status {self.code}"
        return last.removeprefix("error:").strip()

    async def wait(self) -> bool:
        """Whether it ended well, once it has ended."""
        await asyncio.shield(self._life)
        return self.code == 0

    async def stop(self) -> None:
        """End it; it keeps what it has done."""
        self.was_stopped = True
        self._send(signal.SIGINT)
        try:
            await asyncio.wait_for(self.wait(), STOP_S)
        except TimeoutError:
            self._send(signal.SIGKILL)
            await self.wait()

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _live(self) -> None:
        if self.was_stopped:
            return
        try:
            self._process = await asyncio.create_subprocess_exec(
                # -P: a file of the folder we stand in must not pass for a module.
                *(sys.executable, "-P", "-m", "longwing", *self._arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=MAX_LINE,
                env=self._environ,
                start_new_session=True,  # Ctrl-C in the terminal is the server's, which stops us
            )
        except OSError as error:
            self._said = f"it could not be started: {error.strerror}"
            return
        if self.was_stopped:
            self._send(signal.SIGINT)
        await asyncio.gather(
            self._read_lines(self._process.stdout), self._read_complaints(self._process.stderr)
        )
        self.code = await self._process.wait()

    async def _read_lines(self, stream: asyncio.StreamReader | None) -> None:
        while stream is not None:
            try:
                line = await stream.readline()
            except ValueError:
                continue  # longer than any of ours
            if not line:
                return
            self._on_line(line.decode("utf-8", "replace").rstrip("\r\n"))

    async def _read_complaints(self, stream: asyncio.StreamReader | None) -> None:
        while stream is not None and (part := await stream.read(4096)):
            self._said = (self._said + part.decode("utf-8", "replace"))[-_TAIL:]


def environment() -> dict[str, str]:
    """This process's environment, less the keys of its API."""
    secret = ("API_KEY", "ADMIN_KEY")
    mine = {name: value for name, value in os.environ.items() if not any(s in name for s in secret)}
    return {**mine, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "1000"}

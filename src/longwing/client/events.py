"""Server-sent events, from bytes as they arrive (WHATWG HTML, "Server-sent events").

Lines end with LF or CR LF, and nowhere else: JSON may hold U+2028 and other characters that
Python's splitlines takes for line ends. Bytes are cut into lines before they are decoded, so no
character is ever split.

Comments keep a connection alive while a server reads a long prompt. longwing's say how far it is:
`: reading 4096/13436`, in tokens.
"""

import re
from dataclasses import dataclass

from longwing.errors import ServerError

MAX_EVENT_BYTES = 16 * 2**20
_READING = re.compile(rb":\s*reading (\d{1,12})/(\d{1,12})\s*")


@dataclass(frozen=True, slots=True)
class Reading:
    """The server is reading the prompt: `done` of `total` tokens."""

    done: int
    total: int


class EventLines:
    """Cuts a stream into its events' data; other fields (event, id) mean nothing here."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def push(self, chunk: bytes) -> list[str | Reading]:
        """The events that are complete now: their data, or a comment about reading.

        Raises:
            ServerError: an event is longer than MAX_EVENT_BYTES.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise ServerError(
                f"an event of the stream is longer than {MAX_EVENT_BYTES} bytes", 200, "protocol"
            )
        found: list[str | Reading] = []
        for line in (line.removesuffix(b"\r") for line in lines):
            if not line and self._data:
                found.append(b"\n".join(self._data).decode(errors="replace"))
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif progress := _READING.fullmatch(line):
                found.append(Reading(int(progress[1]), int(progress[2])))
        return found

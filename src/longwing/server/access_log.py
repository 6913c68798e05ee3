"""One line of JSON for each request, and for whatever else the process has to say.

A line holds what the server knows (method, path, status, seconds, tokens, the request's id), never
a prompt or an answer. Whatever of it a client chose is escaped, so that no line can be forged and
no terminal steered.
"""

import json
import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, TextIO

from starlette.requests import Request

access = logging.getLogger("longwing.access")

MAX_PATH = 200
"""Characters of a path that are logged."""
_FACTS = "longwing.facts"


def note(http: Request, **facts: object) -> None:
    """Add to the request's line: numbers and words of ours, such as generated_tokens=20."""
    http.scope.setdefault(_FACTS, {}).update(facts)


def log_request(scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
    """Write the line of a request that is over."""
    facts = {
        "request_id": scope["state"]["request_id"],
        "method": scope["method"],
        "path": scope["path"][:MAX_PATH],
        "status": status,
        "seconds": round(seconds, 4),
        **scope.get(_FACTS, {}),
    }
    access.info("request", extra={"facts": facts})


class JsonLines(logging.Formatter):
    """A record as one line of ASCII: time, level, logger, message and the record's `facts`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; an exception is its last frames, without its text."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line, ensure_ascii=True, default=str)


def log_to(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send every logger of the process to a stream, stderr by default, as such lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=level, force=True)

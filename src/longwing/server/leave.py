"""Clients that leave: whoever does not wait for the answer, does not get the engine's time.

Starlette tells a stream that its client is gone, but not a handler that still works on its answer.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from longwing.errors import LongwingError

T = TypeVar("T")


class ClientLeftError(LongwingError):
    """The client has closed the connection; there is nobody to answer."""


async def until_done_or_left(http: Request, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; cancel it as soon as the client disconnects.

    Call it when the request's body has been read: what comes from the client after that can only
    be its leaving.

    Raises:
        ClientLeftError: the client left first. The coroutine has ended, its `finally` included.
    """
    work = asyncio.ensure_future(coroutine)
    left = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientLeftError
    finally:
        work.cancel()
        left.cancel()
        await asyncio.gather(work, left, return_exceptions=True)


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass

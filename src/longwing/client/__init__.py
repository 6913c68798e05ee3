"""Ask a server for text: `longwing serve`, or any other that speaks TGI's or OpenAI's dialect.

    from longwing.client import Client

    client = Client("http://127.0.0.1:8080")
    print(client.generate("The first line of Moby Dick is", max_new_tokens=40).text)
    for token in client.stream("Once upon a time", temperature=0.8, seed=1):
        print(token.text, end="", flush=True)

Neither torch nor a model is needed where this runs. `AsyncClient` has the same methods, to await.

answers.py       what may be asked, and what comes back
calls.py         from one to the other: bodies, and readers of what a server says
events.py        server-sent events
faults.py        errors
client.py        the client that waits
async_client.py  the one that is awaited
"""

from longwing.client.answers import (
    Answer,
    ChatDelta,
    Choice,
    Completion,
    StreamToken,
    TextToken,
    Token,
)
from longwing.client.async_client import AsyncClient
from longwing.client.client import Client
from longwing.client.faults import RefusedError

__all__ = [
    "Answer",
    "AsyncClient",
    "ChatDelta",
    "Choice",
    "Client",
    "Completion",
    "RefusedError",
    "StreamToken",
    "TextToken",
    "Token",
]

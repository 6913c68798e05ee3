"""A server of the OpenAI routes for the tests: real tokenizer, scripted engine, real sockets."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from scripted import INFO, ScriptedEngine

from longwing.engine.request import Request
from longwing.server import faults, openai
from longwing.server.metrics import Metrics
from longwing.server.options import ServerOptions
from longwing.server.serving import Serving
from longwing.tokenizer import Tokenizer
from tokenizer.tokenizer_folders import CHATML, OPEN_ASSISTANT, falcon_json, write_folder

MODEL = "org/falcon-tiny"
CONTEXT = 512

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)

Answer = Callable[[Request, int], Iterable[Any]]


@cache
def tokenizer(template: str = PLAIN) -> Tokenizer:
    """Falcon's tokenizer with ChatML's tokens and a chat template; none for the empty one."""
    settings = {"chat_template": template} if template else {}
    folder = write_folder(
        Path(mkdtemp()),
        falcon_json(*OPEN_ASSISTANT, *CHATML),
        eos_token="<|endoftext|>",
        **settings,
    )
    return Tokenizer.from_folder(folder)


def serving(
    answer: Answer | None = None, *, template: str = PLAIN, context: int = CONTEXT, **options: Any
) -> Serving:
    """What is served, with a scripted engine."""
    text = tokenizer(template)
    return Serving(
        service=ScriptedEngine(text, answer=answer, info=INFO),
        tokenizer=text,
        options=ServerOptions(**options),
        model_id=MODEL,
        max_input_len=context - 1,
        max_total_len=context,
        created=1_700_000_000,
        metrics=Metrics(context),
    )


def app_of(served: Serving) -> FastAPI:
    """The routes alone, with the error formatter."""
    app = FastAPI()
    app.include_router(openai.router)
    app.state.serving = served
    faults.install(app)
    return app


def says(text: str, *, seed: int = 7) -> Answer:
    """An engine that answers with a text, whatever it is asked, and then ends."""

    def answer(request: Request, n: int) -> Iterable[Any]:
        words = tokenizer()
        ids = [*words.encode(text), *sorted(words.eos_ids)]
        return ScriptedEngine(words).say(request, ids, seed=seed)

    return answer


def post(served: Serving, path: str, body: Any, **settings: Any) -> httpx.Response:
    """One call, within this process; streams come in one piece."""
    return posts(served, path, [body], **settings)[0]


def posts(
    served: Serving, path: str, bodies: Sequence[Any], *, app: FastAPI | None = None
) -> list[httpx.Response]:
    """Several calls, one after the other; a body of bytes is sent as it is."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app or app_of(served), raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [
                await client.post(path, content=body, headers={"content-type": "application/json"})
                if isinstance(body, bytes)
                else await client.post(path, json=body)
                for body in bodies
            ]

    return asyncio.run(run())


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """A server of its own on a free port; gives its address."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    started = threading.Event()
    original = server.startup

    async def startup(sockets: Any = None) -> None:
        await original(sockets)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    started.wait(20)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)

"""The application: the routes behind the guard, with every error through `faults.py`.

What is served can be exchanged while the application runs (`exchange`), and a room above may bring
routes of its own (`Extension`): the web page does both.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from longwing.errors import EngineDeadError
from longwing.server import faults, openai, tgi, tgi_status, tgi_tokenize
from longwing.server.guard import Guard
from longwing.server.metrics import Metrics
from longwing.server.openai_chat import create_chat_completion
from longwing.server.openai_completions import create_completion
from longwing.server.openai_refusals import read
from longwing.server.openai_schema import ChatBody, CompletionBody
from longwing.server.options import ServerOptions
from longwing.server.serving import Service, Serving, check_adapter_names, lengths
from longwing.tokenizer import Tokenizer


def serving_for(
    service: Service, tokenizer: Tokenizer, options: ServerOptions, *, model_id: str
) -> Serving:
    """A `Serving` for an engine that has started.

    Raises:
        EngineDeadError: it has not.
        ConfigError: the options ask for more than its context, or an adapter goes by a name of the
            model.
    """
    if service.info is None:
        raise EngineDeadError("the engine has not started")
    check_adapter_names(model_id, service.info.adapters)
    max_input_len, max_total_len = lengths(options, service.info.context)
    return Serving(
        service=service,
        tokenizer=tokenizer,
        options=options,
        model_id=model_id,
        max_input_len=max_input_len,
        max_total_len=max_total_len,
        created=int(time.time()),
        metrics=Metrics(max_total_len),
    )


class Extension(Protocol):
    """Routes that a room above adds to the application.

    Attributes:
        payload_limits: paths whose bodies may have another length than the options say.
    """

    payload_limits: Mapping[str, int]

    def install(self, app: FastAPI) -> None:
        """Add the routes; they come before the server's own. `app.state.serving` is there."""
        ...

    def is_open(self, scope: Scope) -> bool:
        """Whether a request needs no API key."""
        ...

    async def settle(self) -> None:
        """The server is told to stop: from now on exchange nothing; what serves is its to end."""
        ...

    async def close(self) -> None:
        """End what the routes have begun, while the last requests are answered."""
        ...


def make_app(serving: Serving, extension: Extension | None = None) -> FastAPI:
    """The server as an ASGI application; the engine is started, and stopped, by the caller."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Strangers' texts are tokenised by so many threads, however many ask at once.
        threads = ThreadPoolExecutor(serving.options.validation_workers, "validation")
        asyncio.get_running_loop().set_default_executor(threads)
        yield

    app = FastAPI(
        title="longwing",
        version=tgi_status.VERSION,
        description="Text generation: TGI's API and OpenAI's.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.openai_handlers = {"chat": _chat, "completion": _completion}
    exchange(app, serving)
    if extension is not None:
        extension.install(app)
    for part in (tgi, openai, tgi_tokenize, tgi_status):
        app.include_router(part.router)
    faults.install(app)
    more: dict[str, Any] = {}
    if extension is not None:
        more = {"is_open": extension.is_open, "payload_limits": extension.payload_limits}
    app.add_middleware(
        Guard,
        options=serving.options,
        on_overload=lambda: current(app).metrics.request_overloaded(),
        **more,
    )
    if serving.options.cors_allow_origin:
        # Outside the guard: a browser's preflight brings no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(serving.options.cors_allow_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def current(app: FastAPI) -> Serving:
    """What is served now."""
    serving: Serving = app.state.serving
    return serving


def exchange(app: FastAPI, serving: Serving) -> None:
    """Serve this from now on; requests at work keep what they began with."""
    serving.service.on_step.append(serving.metrics.observe_step)
    app.state.serving = serving


async def _chat(http: Request, body: dict[str, Any]) -> Response:
    """A chat that came to /invocations."""
    return await create_chat_completion(read(ChatBody, body), http)


async def _completion(http: Request, body: dict[str, Any]) -> Response:
    """A completion that came to /invocations."""
    return await create_completion(read(CompletionBody, body), http)

"""OpenAI's routes: /v1/models, /v1/completions and /v1/chat/completions.

What a body may hold is `openai_schema.py`; the answers are `openai_chat.py` and
`openai_completions.py`. An invalid body is a 400 whose `param` names the field, as OpenAI's SDK
expects, and not FastAPI's 422.
"""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from longwing.server.body import JsonRoute
from longwing.server.openai_chat import create_chat_completion
from longwing.server.openai_completions import create_completion
from longwing.server.openai_refusals import invalid, refuse_unsupported
from longwing.server.openai_request import adapter_of
from longwing.server.openai_schema import ChatBody, CompletionBody, ErrorBody
from longwing.server.serving import Serving, serving_of


class OpenAIRoute(JsonRoute):
    """A route whose invalid bodies are refused in OpenAI's words."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        """JsonRoute's handler, with its complaints about fields translated."""
        handler = super().get_route_handler()

        async def handle(http: HttpRequest) -> Response:
            try:
                return await handler(http)
            except RequestValidationError as error:
                raise invalid(error.errors()) from None

        return handle


router = APIRouter(prefix="/v1", route_class=OpenAIRoute, tags=["OpenAI"])
"""Everything under /v1."""


FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": said}
    for status, said in {
        400: "The body asks for what cannot be done",
        401: "No valid API key",
        403: "A Host or Origin that is not let in",
        404: "No such model",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "Not JSON by its content type",
        431: "The headers are too large",
        500: "The answer could not be finished",
        503: "Overloaded, starting, draining or dead",
    }.items()
}
"""What every route may answer instead, for the API's description."""

_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or a stream of its chunks that ends with [DONE]",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}


@router.get("/models", responses=FAULTS)
async def models(serving: Annotated[Serving, Depends(serving_of)]) -> dict[str, Any]:
    """The model that is served, and its adapters, whose `parent` it is."""
    return {
        "object": "list",
        "data": [_model(serving), *(_model(serving, name) for name in serving.adapters)],
    }


@router.get("/models/{model_id:path}", responses=FAULTS)
async def model(model_id: str, serving: Annotated[Serving, Depends(serving_of)]) -> dict[str, Any]:
    """The model, or one of its adapters, if that is its name."""
    return _model(serving, adapter_of(serving, model_id))


@router.post("/completions", responses={**FAULTS, **_ANSWER}, response_class=Response)
async def completions(body: CompletionBody, http: HttpRequest) -> Response:
    """Go on with one or several texts."""
    refuse_unsupported(body)
    return await create_completion(body, http)


@router.post("/chat/completions", responses={**FAULTS, **_ANSWER}, response_class=Response)
async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
    """Answer in a conversation."""
    refuse_unsupported(body)
    return await create_chat_completion(body, http)


def _model(serving: Serving, adapter: str = "") -> dict[str, Any]:
    return {
        "id": adapter or serving.model_id,
        "object": "model",
        "created": serving.created,
        "owned_by": "longwing",
        "max_model_len": serving.max_total_len,
        **({"parent": serving.model_id} if adapter else {}),
    }


async def _chat_elsewhere(http: HttpRequest, body: dict[str, Any]) -> Response:
    return await create_chat_completion(body, http)


async def _completion_elsewhere(http: HttpRequest, body: dict[str, Any]) -> Response:
    return await create_completion(body, http)


HANDLERS = {"chat": _chat_elsewhere, "completion": _completion_elsewhere}
"""For routes outside /v1 that take these bodies as well (SageMaker's /invocations)."""

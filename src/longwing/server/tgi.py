"""TGI's routes that generate: /generate, /generate_stream, POST / and SageMaker's /invocations.

A stream has begun, as far as TGI is concerned, when it is asked for: whatever goes wrong with it is
an event in a response of status 200, a wrong parameter too. Only a refusal that says "try again
later" keeps its status (429, 503), because it has a Retry-After header for proxies to read; the
official clients understand both.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from longwing.errors import LongwingError
from longwing.server.access_log import note
from longwing.server.body import JsonRoute
from longwing.server.faults import Fault, TgiFault, log_failure, tgi_fault
from longwing.server.leave import until_done_or_left
from longwing.server.serving import Serving, serving_of
from longwing.server.sse import data_frame, sse_response
from longwing.server.tgi_answer import Sequence, Stream, collect, response_json
from longwing.server.tgi_schema import (
    CompatGenerateRequest,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
)
from longwing.server.tgi_validation import Prepared, prepare

router = APIRouter(route_class=JsonRoute, tags=["Text Generation Inference"])

Serves = Annotated[Serving, Depends(serving_of)]

OpenAIHandler = Callable[[Request, dict[str, Any]], Awaitable[Response]]
"""Answers a body of OpenAI's on another path; `app.state.openai_handlers` has them by kind."""

Responses = dict[int | str, dict[str, Any]]

FAULTS: Responses = {
    status: {"model": ErrorResponse, "description": said}
    for status, said in {
        400: "Not JSON",
        401: "No valid API key",
        403: "A Host or Origin that is not let in",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "Not JSON by its content type",
        422: "Input validation error",
        424: "Generation error",
        429: "Model is overloaded",
        431: "The headers are too large",
        500: "Incomplete generation",
        503: "Starting, draining or dead",
    }.items()
}
"""What every route may answer instead, for the API's description."""


def _one_of(*names: str) -> dict[str, Any]:
    return {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]}


_EVENTS: dict[str, Any] = {"text/event-stream": {}}
_ONE: Responses = {200: {"model": GenerateResponse, "description": "Generated text"}}
_LIST: Responses = {
    200: {"model": list[GenerateResponse], "content": _EVENTS, "description": "Generated"}
}
_STREAM: Responses = {
    200: {
        "content": _EVENTS,
        "description": "Events of {index, token, top_tokens?, generated_text, details}; the last "
        "one has the text and the details. Or one of {error, error_type}.",
    }
}
_EITHER: Responses = {
    status: {
        "description": fault["description"],
        "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}},
    }
    for status, fault in FAULTS.items()
}
"""A body of OpenAI's gets OpenAI's errors."""
_ANY: Responses = {
    200: {"content": {"application/json": {}, **_EVENTS}, "description": "As the body's own route"}
}
_ANY_BODY = {
    "requestBody": {
        "content": {
            "application/json": {
                "schema": _one_of("CompatGenerateRequest", "ChatBody", "CompletionBody")
            }
        }
    }
}


@router.post("/generate", responses={**FAULTS, **_ONE}, response_class=Response)
async def generate(body: GenerateRequest, http: Request, serving: Serves) -> Response:
    """Generate text, and answer when it is complete."""
    return await _whole(http, body, serving, as_list=False)


@router.post("/generate_stream", responses={**FAULTS, **_STREAM}, response_class=Response)
async def generate_stream(body: GenerateRequest, http: Request, serving: Serves) -> Response:
    """Generate text, one event a token."""
    return await _streamed(http, body, serving)


@router.post("/", responses={**FAULTS, **_LIST}, response_class=Response)
async def compat_generate(body: CompatGenerateRequest, http: Request, serving: Serves) -> Response:
    """Generate text: as a stream if `stream` is set, else as a list of one answer."""
    if body.stream:
        return await _streamed(http, body, serving)
    return await _whole(http, body, serving, as_list=True)


@router.post(
    "/invocations",
    responses={**_EITHER, **_ANY},
    response_class=Response,
    openapi_extra=_ANY_BODY,
)
async def invocations(body: dict[str, Any], http: Request, serving: Serves) -> Response:
    """SageMaker's route: a body as for `POST /`, or one of OpenAI's chats or completions."""
    if "inputs" not in body:
        for field, kind in (("messages", "chat"), ("prompt", "completion")):
            handler = getattr(http.app.state, "openai_handlers", {}).get(kind)
            if field in body and handler is not None:
                answer: Response = await handler(http, body)
                return answer
    try:
        checked = CompatGenerateRequest.model_validate(body)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from None
    return await compat_generate(checked, http, serving)


async def _whole(
    http: Request, body: GenerateRequest, serving: Serving, *, as_list: bool
) -> Response:
    started = time.monotonic()
    prepared, sequences = await until_done_or_left(http, _answer(http, body, serving, started))
    answer = response_json(sequences, prepared)
    return Response(
        orjson.dumps([answer] if as_list else answer),
        media_type="application/json",
        headers=_headers(serving, prepared, sequences[0], time.monotonic() - started),
    )


async def _answer(
    http: Request, body: GenerateRequest, serving: Serving, started: float
) -> tuple[Prepared, list[Sequence]]:
    """The answers to a body; counted, however it ends."""
    serving.metrics.request_began()
    error = "dropped"
    try:
        prepared = await _prepared(http, body, serving, streaming=False)
        sequences = await collect(serving, prepared, serving.service.submit(prepared.requests))
        error = ""
    except LongwingError as problem:
        fault = tgi_fault(problem)
        error = _metric(fault)
        raise fault from problem
    except Exception:
        error = "generation"
        raise
    finally:
        if error:
            serving.metrics.request_failed(error)
    finished = sequences[0].finished
    if finished is not None:
        serving.metrics.request_answered(time.monotonic() - started, finished)
        note(http, generated_tokens=finished.num_generated)
    return prepared, sequences


async def _streamed(http: Request, body: GenerateRequest, serving: Serving) -> Response:
    started = time.monotonic()
    metrics = serving.metrics
    metrics.request_began()
    headers = {
        "x-compute-type": _compute_type(serving),
        "x-compute-characters": str(len(body.inputs)),
    }
    try:
        prepared = await _prepared(http, body, serving, streaming=True)
        answers = serving.service.submit(prepared.requests)
    except Exception as problem:
        fault = tgi_fault(problem)
        metrics.request_failed(_metric(fault))
        if fault.retry_after_s is not None:
            raise fault from problem
        if fault.status >= 500:
            log_failure(problem, http.state.request_id)
        return sse_response(
            http, _only(fault), headers=headers, keep_alive_s=serving.options.keep_alive_s
        )
    stream = Stream(serving, prepared, answers)

    def close() -> None:
        answers.cancel()
        if stream.finished is not None:
            metrics.request_answered(time.monotonic() - started, stream.finished)
            note(http, generated_tokens=stream.finished.num_generated)
        else:
            error = "dropped" if stream.fault is None else _metric(stream.fault)
            metrics.request_failed(error)
            note(http, error=error)

    return sse_response(
        http,
        stream.frames(),
        headers=headers,
        keep_alive_s=serving.options.keep_alive_s,
        on_close=close,
    )


async def _prepared(
    http: Request, body: GenerateRequest, serving: Serving, *, streaming: bool
) -> Prepared:
    prepared = await prepare(serving, body, salt=http.state.salt, streaming=streaming)
    max_new = prepared.requests[0].params.max_new_tokens or 0
    serving.metrics.request_prepared(prepared.seconds, prepared.prompt_len, max_new)
    note(http, prompt_tokens=prepared.prompt_len)
    return prepared


async def _only(fault: Fault) -> AsyncIterator[bytes]:
    yield data_frame(fault.body())


def _metric(fault: Fault) -> str:
    """The fault's word in tgi_request_failure."""
    if not isinstance(fault, TgiFault):
        return "generation"
    kinds = {
        "validation": "validation",
        "overloaded": "overloaded",
        "incomplete_generation": "incomplete",
        "incomplete_generation_stream": "incomplete",
        "template_error": "template",
    }
    return kinds.get(fault.error_type, "generation")


def _compute_type(serving: Serving) -> str:
    info = serving.service.info
    device = "cpu" if info is None or info.device.startswith("cpu") else "gpu"
    return f"{device}+optimized"


def _headers(
    serving: Serving, prepared: Prepared, best: Sequence, total_s: float
) -> Mapping[str, str]:
    """TGI 3's headers: x-compute-time in seconds, the others in whole milliseconds."""
    finished = best.finished
    if finished is None:
        return {}
    inference_s = finished.prefill_s + finished.decode_s
    seconds = {
        "x-total-time": total_s,
        "x-validation-time": prepared.seconds,
        "x-queue-time": finished.queue_s,
        "x-inference-time": inference_s,
        "x-time-per-token": inference_s / max(1, finished.num_generated),
    }
    return {
        "x-compute-type": _compute_type(serving),
        "x-compute-time": f"{total_s:.6f}",
        "x-compute-characters": str(len(prepared.inputs)),
        "x-prompt-tokens": str(finished.prompt_len),
        "x-generated-tokens": str(finished.num_generated),
        **{name: str(round(1000 * value)) for name, value in seconds.items()},
    }

"""Every error of every route, in its route's dialect: one place where an error becomes a response.

Under `/v1` that is OpenAI's `{"error": {"message", "type", "param", "code"}}`, elsewhere TGI's
`{"error", "error_type"}`; 404, 405 and what the guard refuses included, because clients look for
these fields in whatever is not a 200.

What a client reads is longwing's own sentence about its request, or a fixed one. The text of any
other exception may hold paths, addresses or somebody's prompt: it goes nowhere but into the log,
and only as the place where it happened, under the request's id.
"""

import logging
import traceback
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from longwing.engine.events import Failed
from longwing.errors import (
    CapacityError,
    ContextLengthError,
    EngineDeadError,
    EngineError,
    GrammarError,
    LongwingError,
    OverloadedError,
    RequestError,
    TemplateError,
)
from longwing.server.leave import ClientLeftError

log = logging.getLogger("longwing.server")

CLIENT_LEFT = 499
"""As nginx logs it; nobody reads the response."""
RETRY_AFTER_S = 1
INTERNAL = "internal error; the server's log has the rest"

TGI_STATUS = {
    "validation": 422,
    "template_error": 422,
    "missing_template_variable": 422,
    "tool_error": 422,
    "suffix not supported": 422,
    "batch size exceeded": 422,
    "generation": 424,
    "overloaded": 429,
    "incomplete_generation": 500,
    "incomplete_generation_stream": 500,
    "stream_serialization_error": 500,
    "internal": 500,
    "healthcheck": 503,
    "unavailable": 503,
}
"""TGI's kinds of error with their status, and two of ours: `internal`, `unavailable`."""

_TGI_KINDS = {
    400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found",
    405: "method_not_allowed", 408: "timeout", 413: "payload_too_large",
    415: "unsupported_media_type", 422: "validation", 429: "overloaded",
    431: "headers_too_large", 500: "internal", 503: "unavailable",
}  # fmt: skip

_OPENAI_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError",
    404: "NotFoundError", 422: "UnprocessableEntityError", 429: "RateLimitError",
    500: "InternalServerError", 503: "ServiceUnavailableError",
}  # fmt: skip


class Fault(LongwingError):  # noqa: N818  a fault is what an error becomes
    """An error as a client gets it.

    Attributes:
        status: of the response; a stream that has begun keeps its 200.
        message: the sentence.
        retry_after_s: when to try again, if that is the remedy.
    """

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The response's JSON, or a stream's last event."""
        raise NotImplementedError


class TgiFault(Fault):
    """An error in TGI's dialect.

    Args:
        error_type: one of TGI_STATUS, or another word if a status is given.
        message: the text, complete with TGI's beginning ("Input validation error: …").
        status: other than the kind's own.
        retry_after_s: when to try again, if that is the remedy.
    """

    def __init__(
        self,
        error_type: str,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status or TGI_STATUS[error_type], message, retry_after_s)
        self.error_type = error_type

    def body(self) -> dict[str, Any]:
        """`{"error", "error_type"}`."""
        return {"error": self.message, "error_type": self.error_type}


class OpenAIFault(Fault):
    """An error in OpenAI's dialect.

    Args:
        status: of the response.
        message: the text.
        type: OpenAI's word for the kind; made from the status if not given.
        param: the field at fault.
        code: a word that programs look for, or the status.
        retry_after_s: when to try again, if that is the remedy.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | int | None = None,
        *,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message, retry_after_s)
        fallback = "BadRequestError" if status < 500 else "InternalServerError"
        self.type = type or _OPENAI_TYPES.get(status, fallback)
        self.param = param
        self.code = status if code is None else code

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def is_openai(path: str) -> bool:
    """Whether a path speaks OpenAI's dialect."""
    return path == "/v1" or path.startswith("/v1/")


def refusal(path: str, status: int, message: str, retry_after_s: int | None = None) -> Fault:
    """A refusal that has nothing to do with generating, in the path's dialect."""
    if is_openai(path):
        return OpenAIFault(status, message, retry_after_s=retry_after_s)
    kind = _TGI_KINDS.get(status, "bad_request" if status < 500 else "internal")
    return TgiFault(kind, message, status=status, retry_after_s=retry_after_s)


def error_of(failed: Failed) -> LongwingError:
    """What the engine said of a request that it could not finish, as an exception."""
    kinds: Mapping[str, type[LongwingError]] = {"request": RequestError, "engine": EngineDeadError}
    return kinds.get(failed.kind, EngineError)(failed.message)


def fault_of(path: str, error: BaseException) -> Fault:
    """Any exception as its client gets it, in the path's dialect."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, HTTPException):
        return refusal(path, error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        return _invalid(path, error)
    return openai_fault(error) if is_openai(path) else tgi_fault(error)


def tgi_fault(error: BaseException) -> Fault:
    """An exception from preparing or running a generation, in TGI's words."""
    match error:
        case Fault():
            return error
        case OverloadedError():
            return TgiFault("overloaded", "Model is overloaded", retry_after_s=error.retry_after_s)
        case GrammarError():
            return TgiFault("validation", f"Input validation error: grammar is not valid: {error}")
        case TemplateError():
            return TgiFault("template_error", f"Template error: {error}")
        case RequestError():
            return TgiFault("validation", f"Input validation error: {error}")
        case EngineDeadError():
            return TgiFault("unavailable", str(error), retry_after_s=RETRY_AFTER_S)
        case EngineError() | CapacityError():
            return TgiFault("generation", f"Request failed during generation: {error}")
    return TgiFault("internal", INTERNAL)


def openai_fault(error: BaseException) -> Fault:
    """An exception from preparing or running a generation, in OpenAI's words."""
    match error:
        case Fault():
            return error
        case OverloadedError():
            return OpenAIFault(503, str(error), retry_after_s=error.retry_after_s)
        case ContextLengthError():
            return OpenAIFault(
                400,
                f"This model's maximum context length is {error.limit} tokens. {error}",
                code="context_length_exceeded",
            )
        case RequestError():
            return OpenAIFault(400, str(error))
        case EngineDeadError():
            return OpenAIFault(503, str(error), retry_after_s=RETRY_AFTER_S)
        case EngineError() | CapacityError():
            return OpenAIFault(500, str(error))
    return OpenAIFault(500, INTERNAL)


def fault_response(fault: Fault, headers: Mapping[str, str] | None = None) -> Response:
    """The response that tells it."""
    more = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
    return Response(
        orjson.dumps(fault.body()),
        fault.status,
        headers={**(headers or {}), **more},
        media_type="application/json",
    )


def respond(http: Request, error: BaseException) -> Response:
    """The response to a request that ended in an exception; ours are logged."""
    if isinstance(error, (ClientLeftError, ClientDisconnect)):
        return Response(status_code=CLIENT_LEFT)
    fault = fault_of(http.url.path, error)
    if fault.status >= 500 and fault.retry_after_s is None:
        log_failure(error, getattr(http.state, "request_id", ""))
    headers = error.headers if isinstance(error, HTTPException) else None
    return fault_response(fault, headers)


def log_failure(error: BaseException, request_id: str) -> None:
    """Log what happened and where, but not the exception's text: it may quote the request."""
    known = isinstance(error, (LongwingError, Fault, HTTPException))
    frames = [] if known else traceback.extract_tb(error.__traceback__)
    log.error(
        "request failed",
        extra={
            "facts": {
                "request_id": request_id,
                "error": type(error).__name__,
                "message": str(error) if known else "",
                "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]],
            }
        },
    )


def install(app: FastAPI) -> None:
    """Route an application's exceptions through here.

    `Exception` is not among them: Starlette would answer and then raise it again. The guard
    catches what is left.
    """

    async def handler(http: Request, error: Exception) -> Response:
        return respond(http, error)

    kinds = (LongwingError, HTTPException, RequestValidationError, ClientDisconnect)
    for kind in kinds:
        app.add_exception_handler(kind, handler)


def _invalid(path: str, error: RequestValidationError) -> Fault:
    """A body whose fields are of the wrong type: the first of them, by name."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])[:100]
    what = str(first["msg"])[:200]
    if is_openai(path):
        return OpenAIFault(400, f"{where}: {what}" if where else what, param=where or None)
    said = f"`{where}`: {what}" if where else what
    return TgiFault("validation", f"Input validation error: {said}")

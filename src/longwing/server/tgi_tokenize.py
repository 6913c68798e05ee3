"""/tokenize, /chat_tokenize, /detokenize and /tokenizer_info: how the model reads a text.

Two dialects share `/tokenize`, told apart by the field that holds the text: TGI's `inputs` is
answered by a list of tokens with their characters, vLLM's `prompt` or `messages` by their ids.
A long text gives a far longer answer: all of the work is done in a thread.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Annotated, Any

import orjson
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from longwing.server.body import JsonRoute
from longwing.server.leave import until_done_or_left
from longwing.server.openai_schema import Message
from longwing.server.tgi import FAULTS, Serves
from longwing.server.tgi_schema import ChatTokenizeResponse, SimpleToken
from longwing.server.tgi_validation import invalid
from longwing.tokenizer import Tokenizer

router = APIRouter(route_class=JsonRoute, tags=["Tokens"])

Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TokenizeRequest(_Body):
    """A text: `inputs` in TGI's dialect, `prompt` or `messages` in vLLM's."""

    inputs: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="false: the text alone.")
    add_generation_prompt: bool | None = Field(None, description="false: no answer begins.")
    return_token_strs: bool | None = None


class ChatTokenizeRequest(_Body):
    """A conversation."""

    messages: Messages


class DetokenizeRequest(_Body):
    """Token ids."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class TokenIds(BaseModel):
    """vLLM's answer."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The text of token ids."""

    prompt: str


class SpecialTokens(BaseModel):
    """Special tokens, as text; null where the model has none."""

    bos_token: str | None
    eos_token: str | None


@router.post(
    "/tokenize",
    responses={**FAULTS, 200: {"model": list[SimpleToken] | TokenIds}},
    response_class=Response,
)
async def tokenize(body: TokenizeRequest, http: Request, serving: Serves) -> Response:
    """The tokens of a text; special tokens in it are read as such, in messages as text."""
    given = [name for name in ("inputs", "prompt", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise invalid("give one of `inputs`, `prompt` and `messages`")
    tokenizer = serving.tokenizer

    def work() -> bytes:
        if body.inputs is not None:
            return _listed(spell(tokenizer, _encode(tokenizer, body, body.inputs), body.inputs))
        if body.messages is not None:
            begins = body.add_generation_prompt is not False
            ids = tokenizer.chat(_turns(body.messages), add_generation_prompt=begins)
        else:
            ids = _encode(tokenizer, body, body.prompt or "")
        told: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": serving.max_total_len,
            "tokens": ids,
        }
        if body.return_token_strs:
            told["token_strs"] = [tokenizer.token(token_id) for token_id in ids]
        return orjson.dumps(told)

    return await _in_thread(http, work)


@router.post(
    "/chat_tokenize",
    responses={**FAULTS, 200: {"model": ChatTokenizeResponse}},
    response_class=Response,
)
async def chat_tokenize(body: ChatTokenizeRequest, http: Request, serving: Serves) -> Response:
    """A conversation as the model reads it: text and tokens."""

    def work() -> bytes:
        turns = _turns(body.messages)
        text = serving.tokenizer.render_chat(turns)
        tokens = spell(serving.tokenizer, serving.tokenizer.chat(turns), text)
        said = b',"templated_text":' + orjson.dumps(text)
        return b'{"tokenize_response":' + _listed(tokens) + said + b"}"

    return await _in_thread(http, work)


@router.post(
    "/detokenize", responses={**FAULTS, 200: {"model": Detokenized}}, response_class=Response
)
async def detokenize(body: DetokenizeRequest, http: Request, serving: Serves) -> Response:
    """The text of token ids, special ones by name."""

    def work() -> bytes:
        return orjson.dumps({"prompt": serving.tokenizer.decode(body.tokens, skip_special=False)})

    return await _in_thread(http, work)


@router.get(
    "/tokenizer_info",
    responses={**FAULTS, 200: {"model": SpecialTokens}},
    response_class=JSONResponse,
)
async def tokenizer_info(serving: Serves) -> JSONResponse:
    """The tokens that begin and end a text; asked by lm-evaluation-harness."""
    tokenizer = serving.tokenizer
    bos, eos = tokenizer.bos_id, min(tokenizer.eos_ids, default=None)
    named = {"bos_token": bos, "eos_token": eos}
    return JSONResponse({k: None if v is None else tokenizer.token(v) for k, v in named.items()})


def spell(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> Iterator[dict[str, Any]]:
    """Each token with the characters of `text` it stands for; `start` and `stop` count characters.

    A token that ends inside a character stands for none, and the one that completes it for the
    whole; so does a token that is not in the text (bos).
    """
    stream = tokenizer.stream(skip_special=False)
    at = 0
    for token_id in ids:
        piece = stream.push(token_id)
        stop = at + len(piece) if text.startswith(piece, at) else at
        if stop == at and piece and token_id not in tokenizer.special_ids:
            stop = min(at + len(piece), len(text))  # the tokenizer has changed the text
        yield {"id": token_id, "text": text[at:stop], "start": at, "stop": stop}
        at = stop


def _encode(tokenizer: Tokenizer, body: TokenizeRequest, text: str) -> list[int]:
    add_bos = False if body.add_special_tokens is False else None
    return tokenizer.encode(text, special_tokens=True, add_bos=add_bos)


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in messages]


def _listed(tokens: Iterator[dict[str, Any]]) -> bytes:
    """The tokens as one JSON list.

    In portions: one call for all would hold the interpreter, and so every stream, all the while.
    """
    portions = iter(lambda: list(islice(tokens, 4096)), [])
    return b"[" + b",".join(orjson.dumps(portion)[1:-1] for portion in portions) + b"]"


async def _in_thread(http: Request, work: Callable[[], bytes]) -> Response:
    raw = await until_done_or_left(http, asyncio.to_thread(work))
    return Response(raw, media_type="application/json")

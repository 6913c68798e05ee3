"""POST /v1/chat/completions: the next turn of a conversation.

The model's own template makes a prompt of the messages, in a thread and within its limits; special
tokens that users typed stay text. Tools are `tools.py`, what the answer must conform to is
`openai_grammar.py`.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from longwing.server.openai_exchange import Choice, Exchange, Json, counted
from longwing.server.openai_grammar import chat_grammar, must_call, offered
from longwing.server.openai_logprobs import Score, ScoreQueue, chat_logprobs
from longwing.server.openai_refusals import read, refusal
from longwing.server.openai_request import (
    adapter_of,
    check_grammar,
    fitted,
    headers_of,
    samples,
    sampling,
)
from longwing.server.openai_schema import ChatBody, Tool
from longwing.server.serving import Serving, serving_of
from longwing.server.tools import MAX_CALLS, CallReader, as_data, as_text, described
from longwing.tokenizer import Tokenizer

MAX_TOOL_CHARS = 64 * 1024
"""Of one tool's description and schema; all of it stands in the prompt."""


async def create_chat_completion(body: dict[str, Any] | ChatBody, http: HttpRequest) -> Response:
    """Answer a chat's body, given as JSON or already read.

    Raises:
        OpenAIFault: it cannot be answered.
        ClientLeftError: nobody waits for it any more.
    """
    serving = serving_of(http)
    with counted(serving.metrics) as began:
        checked = body if isinstance(body, ChatBody) else read(ChatBody, body)
        return await _answer(serving, checked, http, began)


async def _answer(serving: Serving, body: ChatBody, http: HttpRequest, began: float) -> Response:
    adapter = adapter_of(serving, body.model)
    _check(body)
    grammar = chat_grammar(body)
    check_grammar(serving, grammar)
    tools = offered(body)
    ids = await asyncio.to_thread(chat_ids, serving.tokenizer, body, tools)
    prompt = fitted(serving, body, ids, wanted=body.most_tokens)
    top = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling(serving, body, prompt.max_new, logprobs=top)
    requests = samples(http, body, prompt, params, adapter=adapter, grammar=grammar)
    names = frozenset(tool.function.name for tool in tools)
    exchange = Exchange(
        serving=serving,
        http=http,
        requests=requests,
        choices=[
            ChatChoice(place, serving.tokenizer, body, names) for place in range(len(requests))
        ],
        num_samples=len(requests),
        kind="chat.completion",
        chunk_kind="chat.completion.chunk",
        prefix="chatcmpl",
        began=began,
        headers=headers_of(body, requests[0], prompt.num_dropped),
    )
    return await exchange.answer(stream=bool(body.stream), options=body.stream_options)


def chat_ids(tokenizer: Tokenizer, body: ChatBody, tools: list[Tool]) -> list[int]:
    """The prompt that the template makes of a conversation and its tools.

    Raises:
        OpenAIFault: 400; a tool's schema is too large.
        TemplateError: the template refuses, or passes its limits.
        RequestError: something cannot be written as text.
    """
    schemas = [tool.shown for tool in tools]
    for schema in schemas:
        if (length := len(json.dumps(schema))) > MAX_TOOL_CHARS:
            reason = f"one has {length} characters as JSON; the limit is {MAX_TOOL_CHARS}"
            raise refusal(f"tools: {reason}", "tools")
    has_place = tokenizer.takes_tools()
    text = ""
    if tools and not has_place:
        parallel = body.parallel_tool_calls is not False
        text = described(tools, must=bool(must_call(body)), parallel=parallel)
    flags = body.chat_template_kwargs
    return tokenizer.chat(
        as_data(body.messages) if has_place else as_text(body.messages, text),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final=bool(body.continue_final_message),
        tools=schemas if has_place else (),
        flags=flags.model_dump(exclude_none=True) if flags else None,
    )


class ChatChoice(Choice):
    """An assistant's message.

    Args:
        index: its place in `choices`.
        tokenizer: names tokens.
        body: what is asked for.
        names: functions that may be called.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, body: ChatBody, names: frozenset[str]
    ) -> None:
        super().__init__(index, ScoreQueue() if body.logprobs else None)
        self._tokenizer = tokenizer
        self._top = body.top_logprobs or 0
        most = 1 if body.parallel_tool_calls is False else MAX_CALLS
        self._reader = CallReader(names, most=most)
        self._texts: list[str] = []
        self._calls: list[Json] = []
        self._kept: list[Score] = []
        self._finish: str | None = None

    def open(self) -> Iterator[Json]:
        """The role."""
        yield self._piece({"role": "assistant", "content": ""}, [])

    def say(self, text: str, scores: list[Score]) -> Iterator[Json]:
        """What is content for certain; what may be a call waits for its end."""
        content = self._reader.push(text)
        self._texts.append(content)
        self._kept += scores
        if content or scores:
            yield self._piece({"content": content} if content else {}, scores)

    def end(self, reason: str, scores: list[Score]) -> Iterator[Json]:
        """The rest of the content, or the calls; then the reason."""
        content, calls = self._reader.finish()
        self._texts.append(content)
        self._calls = [call.body() for call in calls]
        self._kept += scores
        if content or scores:
            yield self._piece({"content": content} if content else {}, scores)
        if calls:
            indexed = [{"index": place, **call} for place, call in enumerate(self._calls)]
            yield self._piece({"tool_calls": indexed}, [])
        self._finish = "tool_calls" if calls else reason
        yield self._piece({}, [])

    def whole(self) -> Json:
        """The entry of `choices`."""
        content = "".join(self._texts)
        message: Json = {
            "role": "assistant",
            "content": None if self._calls else content,
            "refusal": None,
        }
        if self._calls:
            message["tool_calls"] = self._calls
        return {
            "index": self.index,
            "message": message,
            "logprobs": self._logprobs(self._kept),
            "finish_reason": self._finish,
        }

    def _piece(self, delta: Json, scores: list[Score]) -> Json:
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": self._logprobs(scores) if scores else None,
            "finish_reason": self._finish,
        }

    def _logprobs(self, scores: list[Score]) -> Json | None:
        if self._scores is None:
            return None
        return chat_logprobs(self._tokenizer, scores, self._top)


def _check(body: ChatBody) -> None:
    """Hold settings against each other.

    Raises:
        OpenAIFault: 400; two contradict each other, or one needs another.
    """
    lengths = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(lengths) > 1:
        raise refusal("max_tokens: differs from max_completion_tokens; give one", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise refusal("top_logprobs: needs logprobs: true", "top_logprobs")
    if not body.continue_final_message:
        return
    last = body.messages[-1]
    if last.role != "assistant" or last.tool_calls:
        reason = "the last message is not the assistant's text"
    elif body.add_generation_prompt:
        reason = "goes on with a message where add_generation_prompt begins one; give one of them"
    else:
        return
    raise refusal(f"continue_final_message: {reason}", "continue_final_message")

"""POST /v1/completions: text goes on as the model would have it.

Special tokens in a prompt are read as such, because clients of this route write the model's own
template into it; prompts may be token ids instead. With `echo` a text begins with its prompt, and
`text_offset` counts from there. The log-probabilities of prompts show what a template or a gateway
put before them, and take room: they are given only if the operator says so.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from longwing.engine.events import PromptRead
from longwing.engine.request import Grammar, Request
from longwing.server.openai_exchange import Choice, Exchange, Json, counted
from longwing.server.openai_grammar import structured_grammar
from longwing.server.openai_logprobs import Score, ScoreQueue, completion_logprobs, prompt_scores
from longwing.server.openai_refusals import read, refusal
from longwing.server.openai_request import (
    Prompt,
    adapter_of,
    check_grammar,
    fitted,
    headers_of,
    samples,
    sampling,
)
from longwing.server.openai_schema import CompletionBody
from longwing.server.serving import Serving, encode, serving_of
from longwing.tokenizer import Tokenizer

DEFAULT_LEN = 16
"""Tokens of an answer where the request does not say; OpenAI's."""


async def create_completion(body: dict[str, Any] | CompletionBody, http: HttpRequest) -> Response:
    """Answer a completion's body, given as JSON or already read.

    Raises:
        OpenAIFault: it cannot be answered.
        ClientLeftError: nobody waits for it any more.
    """
    serving = serving_of(http)
    with counted(serving.metrics) as began:
        checked = body if isinstance(body, CompletionBody) else read(CompletionBody, body)
        return await _answer(serving, checked, http, began)


async def _answer(
    serving: Serving, body: CompletionBody, http: HttpRequest, began: float
) -> Response:
    adapter = adapter_of(serving, body.model)
    _check(serving, body)
    grammar = structured_grammar(body)
    check_grammar(serving, grammar)
    wanted = 1 if body.max_tokens == 0 else body.max_tokens
    requests: list[Request] = []
    choices: list[Choice] = []
    num_dropped = 0
    for one in _prompts(serving, body):
        ids = one if isinstance(one, list) else await _encoded(serving, body, one)
        prompt = fitted(serving, body, ids, wanted=wanted, default=DEFAULT_LEN)
        num_dropped += prompt.num_dropped
        group = _requests(serving, body, http, prompt, adapter, grammar)
        echo = _echoed(serving.tokenizer, one, prompt) if body.echo else ""
        choices += [
            TextChoice(len(choices) + place, serving.tokenizer, body, echo)
            for place in range(len(group))
        ]
        requests += group
    exchange = Exchange(
        serving=serving,
        http=http,
        requests=requests,
        choices=choices,
        num_samples=body.n or 1,
        kind="text_completion",
        chunk_kind="text_completion",
        prefix="cmpl",
        began=began,
        headers=headers_of(body, requests[0], num_dropped),
    )
    return await exchange.answer(stream=bool(body.stream), options=body.stream_options)


class TextChoice(Choice):
    """A text that goes on.

    Args:
        index: its place in `choices`.
        tokenizer: names tokens.
        body: what is asked for.
        echo: the prompt's text, if the text is to begin with it.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, body: CompletionBody, echo: str) -> None:
        scored = body.logprobs is not None
        super().__init__(index, ScoreQueue(len(echo)) if scored else None)
        self._tokenizer = tokenizer
        self._echo = echo
        self._echo_waits = scored and bool(echo)  # for its log-probabilities
        self._is_mute = body.max_tokens == 0
        self._texts: list[str] = []
        self._kept: list[Score] = []
        self._finish: str | None = None

    def open(self) -> Iterator[Json]:
        """The echo, unless its log-probabilities are to come with it."""
        if self._echo and not self._echo_waits:
            yield self._entry(self._echo, [])

    def read(self, event: PromptRead) -> Iterator[Json]:
        """The echo with its log-probabilities."""
        if self._echo_waits:
            self._echo_waits = False
            scores = prompt_scores(self._tokenizer, event.tokens, self._echo)
            self._kept[:0] = scores
            yield self._entry(self._echo, scores)

    def say(self, text: str, scores: list[Score]) -> Iterator[Json]:
        """A token's text."""
        if (text or scores) and not self._is_mute:
            self._texts.append(text)
            self._kept += scores
            yield self._entry(text, scores)

    def end(self, reason: str, scores: list[Score]) -> Iterator[Json]:
        """The reason; an answer of no tokens ended by its length."""
        if self._is_mute:
            reason, scores, self.num_generated = "length", [], 0
        self._finish = reason
        self._kept += scores
        yield self._entry("", scores)

    def whole(self) -> Json:
        """The entry of `choices`."""
        return self._entry("".join([self._echo, *self._texts]), self._kept)

    def _entry(self, text: str, scores: Sequence[Score]) -> Json:
        scored = self._scores is not None
        return {
            "index": self.index,
            "text": text,
            "logprobs": completion_logprobs(self._tokenizer, scores) if scored else None,
            "finish_reason": self._finish,
        }


def _check(serving: Serving, body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refusal("best_of: is not supported; ask for n answers and choose", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise refusal("max_tokens: 0 leaves nothing to answer without echo", "max_tokens")
    if body.prompt_logprobs is not None and not (body.echo and body.logprobs is not None):
        raise refusal(
            "prompt_logprobs: come with echo and logprobs, in the same lists", "prompt_logprobs"
        )
    if body.echo and body.logprobs is not None and not serving.options.enable_prefill_logprobs:
        raise refusal(
            "logprobs: with echo these are the prompt's as well, which this server does not give; "
            "start it with --enable-prefill-logprobs",
            "logprobs",
        )


def _prompts(serving: Serving, body: CompletionBody) -> list[str] | list[list[int]]:
    """The prompts, each a text or token ids.

    Raises:
        OpenAIFault: 400; there are too many, or a token id is not in the vocabulary.
    """
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        prompt = [prompt]
    most = serving.options.max_client_batch_size
    if len(prompt) > most:
        raise refusal(f"prompt: has {len(prompt)} prompts; the limit is {most}", "prompt")
    size = serving.tokenizer.vocab_size
    for one in prompt:
        if not isinstance(one, str) and max(one) >= size:
            raise refusal(
                f"prompt: token id {max(one)} is not in the vocabulary of {size} tokens",
                "prompt",
            )
    return prompt


async def _encoded(serving: Serving, body: CompletionBody, text: str) -> list[int]:
    add_bos = False if body.add_special_tokens is False else None
    return await encode(serving, text, add_bos=add_bos)


def _requests(
    serving: Serving,
    body: CompletionBody,
    http: HttpRequest,
    prompt: Prompt,
    adapter: str,
    grammar: Grammar | None,
) -> list[Request]:
    with_prompt = body.echo and body.logprobs is not None
    return samples(
        http,
        body,
        prompt,
        sampling(serving, body, prompt.max_new, logprobs=body.logprobs),
        adapter=adapter,
        grammar=grammar,
        prompt_logprobs=body.logprobs if with_prompt else None,
    )


def _echoed(tokenizer: Tokenizer, written: str | list[int], prompt: Prompt) -> str:
    """The prompt as it was written, or, of ids and where it was cut, as its tokens read."""
    if isinstance(written, str) and not prompt.num_dropped:
        return written
    return tokenizer.decode(prompt.ids, skip_special=False)

"""`ServedModel`: a server as the evaluations' `Model`.

Answers come by the routes that users take, chat by chat and text by text, so what is measured is
what is served, template included. Losses need the prompt's own log-probabilities, which
`longwing serve` gives with --enable-prefill-logprobs.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Self

from longwing.client import Client
from longwing.errors import ServerError
from longwing.evals.task import Answer

RETRIES = 10
"""Times that a full server is asked again, after the wait that it names: a run has patience."""


class ServedModel:
    """A server, asked by the evaluations. Several threads may ask at once. Closed by `with`.

    Args:
        url: where it listens, e.g. "http://127.0.0.1:8080".
        name: what tables call it; None: as the server calls its model.
        api_key: sent as a Bearer token.
        template: "auto": chat prompts go to the chat route; "plain": they are raw text.
        timeout_s: seconds of silence after which an answer is given up.

    Raises:
        ServerError: nobody answers there, or it does not say what it serves.
        RequestError: the address or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        api_key: str | None = None,
        template: str = "auto",
        timeout_s: float = 600.0,
    ) -> None:
        self._client = Client(url, api_key=api_key, timeout_s=timeout_s, retries=RETRIES)
        self._template = template
        info = self._client.info()
        context = info.get("max_total_tokens")
        if type(context) is not int:
            raise ServerError(f"{url}/info does not say max_total_tokens; is it `longwing serve`?")
        self.context_len = context
        self._served = str(info.get("model_id", "?"))
        self.name = name or self._served
        self._begin = self._ids("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._client.close()

    @property
    def settings(self) -> Mapping[str, object]:
        """What is known of it from outside."""
        return {"served": self._served, "template": self._template}

    def count_tokens(self, text: str, *, chat: bool) -> int:
        """Tokens of a prompt, counted by the server."""
        if self._in_template(chat):
            return len(self._client.chat_tokenize(_turn(text)))
        return len(self._ids(text))

    def generate(
        self, prompt: str, max_new_tokens: int, stop: Sequence[str] = (), *, chat: bool
    ) -> Answer:
        """The greedy answer."""
        started = time.perf_counter()
        stops = list(stop) or None
        if self._in_template(chat):
            done = self._client.chat(
                _turn(prompt), max_tokens=max_new_tokens, temperature=0, stop=stops
            )
        else:
            done = self._client.completion(
                prompt, max_tokens=max_new_tokens, temperature=0, stop=stops
            )
        return Answer(
            text=done.text,
            prompt_len=done.prompt_len,
            num_tokens=done.num_generated,
            seconds=time.perf_counter() - started,
        )

    def choose(self, prompt: str, options: Sequence[str]) -> list[float]:
        """Each option's log-probability after the prompt; a request an option."""
        prompt_ids = self._ids(prompt)
        found: list[float | None] = []
        for option in options:
            together = self._ids(prompt + option)
            option_id = together[len(prompt_ids) : len(prompt_ids) + 1]
            if together[: len(prompt_ids)] != prompt_ids or not option_id:
                option_id = self.encode(option)[-1:]  # the two melt into one token
            found += self._echoed([*prompt_ids, *option_id])[-1:]
        return [-math.inf if value is None else value for value in found]

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, and nothing before it."""
        return self._ids(text)[len(self._begin) :]

    def logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        """Each token's log-probability after those before it, and what begins a text.

        None too for the last one where they fill the context: servers keep room for an answer.
        """
        ids = [*self._begin, *token_ids]
        found = self._echoed(ids[: self.context_len - 1])
        return [*found, *[None] * (len(ids) - len(found))][len(self._begin) :]

    def _in_template(self, chat: bool) -> bool:
        return chat and self._template != "plain"

    def _ids(self, text: str) -> list[int]:
        return [token.id for token in self._client.tokenize(text)]

    def _echoed(self, ids: Sequence[int]) -> list[float | None]:
        """The log-probabilities of a prompt's tokens; the first has none."""
        prompt = {"prompt": list(ids)}  # as ids: text could be encoded otherwise
        done = self._client.completion("", max_tokens=0, echo=True, logprobs=0, extra=prompt)
        said = (done.choices[0].logprobs or {}).get("token_logprobs")
        found = said[: len(ids)] if isinstance(said, list) else []
        if len(found) < len(ids) or not all(isinstance(value, int | float) for value in found[1:]):
            raise ServerError(
                "the server did not give the log-probabilities of the whole prompt; start it with "
                "--enable-prefill-logprobs"
            )
        return found


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]

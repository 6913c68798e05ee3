"""The official `text-generation` client against a server: `python official_tgi.py URL`.

Runs in an environment of its own, because the client's last version wants an old huggingface-hub.
The server echoes the prompt's bytes, then ends; it takes 100 tokens in and 120 in all. What the
client's own tests ask of TGI is asked here, synchronously and asynchronously.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from text_generation import AsyncClient, Client
from text_generation.errors import NotFoundError, ValidationError
from text_generation.types import FinishReason, Grammar, GrammarType


def fails(kind: type[Exception], call: Callable[[], Any], text: str = "") -> None:
    said = None
    try:
        call()
    except kind as error:
        said = str(error)
    assert said is not None, f"no {kind.__name__}"
    assert text in said, said


def one_token(response: Any) -> None:
    assert response.generated_text == "t"
    details = response.details
    assert details.finish_reason == FinishReason.Length
    assert details.generated_tokens == 1
    assert details.seed is None
    assert details.prefill == []
    assert [token.text for token in details.tokens] == ["t"]
    assert details.tokens[0].logprob is not None
    assert not details.tokens[0].special


def whole_stream(responses: list[Any]) -> None:
    assert "".join(r.token.text for r in responses if not r.token.special) == "test"
    assert all(r.generated_text is None and r.details is None for r in responses[:-1])
    assert responses[-1].generated_text == "test"
    assert responses[-1].details.finish_reason == FinishReason.EndOfSequenceToken
    assert responses[-1].details.generated_tokens == 5


def best(response: Any) -> None:
    assert response.details.seed is not None
    assert response.details.best_of_sequences is not None
    assert len(response.details.best_of_sequences) == 1
    assert response.details.best_of_sequences[0].seed is not None


FALCONLITE: dict[str, Any] = {
    "do_sample": True, "max_new_tokens": 50, "typical_p": 0.2, "temperature": None,
    "truncate": None, "seed": 1,
}  # fmt: skip


def synchronous(url: str) -> None:
    client = Client(url, timeout=20)
    one_token(client.generate("test", max_new_tokens=1))
    best(client.generate("test", max_new_tokens=1, best_of=2, do_sample=True))
    fails(ValidationError, lambda: client.generate("test", max_new_tokens=10_000), "must be <= 120")
    fails(NotFoundError, lambda: Client(url + "/nowhere", timeout=20).generate("test"))
    whole_stream(list(client.generate_stream("test")))
    fails(
        ValidationError,
        lambda: list(client.generate_stream("test", max_new_tokens=10_000)),
        "must be <= 120",
    )
    whole_stream(list(client.generate_stream("test", **FALCONLITE)))
    told = client.generate("test", stop_sequences=["es"], return_full_text=True, top_n_tokens=2)
    assert told.generated_text == "testtes"
    assert told.details.finish_reason == FinishReason.StopSequence
    assert [len(place) for place in told.details.top_tokens] == [2, 2, 2]
    told = client.generate(
        "test", decoder_input_details=True, repetition_penalty=1.1, frequency_penalty=0.5,
        grammar=Grammar(type=GrammarType.Regex, value="[a-z]+"), watermark=False, truncate=2,
    )  # fmt: skip
    assert [token.text for token in told.details.prefill] == ["s", "t"]
    fails(
        ValidationError,
        lambda: client.generate("test", grammar=Grammar(type=GrammarType.Json, value={"a": 1})),
        "grammar is not valid",
    )
    fails(ValidationError, lambda: client.generate("x" * 101, max_new_tokens=1), "less than 100")


async def asynchronous(url: str) -> None:
    client = AsyncClient(url, timeout=20)
    one_token(await client.generate("test", max_new_tokens=1))
    best(await client.generate("test", max_new_tokens=1, best_of=2, do_sample=True))
    whole_stream([part async for part in client.generate_stream("test")])
    whole_stream([part async for part in client.generate_stream("test", **FALCONLITE)])
    try:
        await client.generate("test", max_new_tokens=10_000)
        raise AssertionError("no ValidationError")
    except ValidationError:
        pass
    try:
        await AsyncClient(url + "/nowhere", timeout=20).generate("test")
        raise AssertionError("no NotFoundError")
    except NotFoundError:
        pass
    try:
        async for _ in client.generate_stream("test", max_new_tokens=10_000):
            pass
        raise AssertionError("no ValidationError")
    except ValidationError:
        pass


if __name__ == "__main__":
    synchronous(sys.argv[1])
    asyncio.run(asynchronous(sys.argv[1]))
    print("all well")

"""From the engine's events to TGI's answers: whole, as the best of several, or as a stream.

The one difficulty: in TGI's stream the event of the *last* token also carries the whole text and
the details, but an engine says that it has finished after it has sent that token. Holding every
token back until the next would cost each a step. So only a token that can be the last is held: the
one that fills `max_new_tokens`, an end token, one that completes a stop string.
"""

from collections.abc import AsyncIterator
from typing import Any

from longwing.engine.events import Event, Failed, Finished, PromptRead, Reading, Step
from longwing.engine.stop import StopStrings
from longwing.errors import RequestError
from longwing.server.faults import TgiFault, error_of, tgi_fault
from longwing.server.serving import Answers, Serving
from longwing.server.sse import data_frame, reading_frame
from longwing.server.tgi_validation import Prepared
from longwing.tokenizer import Tokenizer


class Sequence:
    """One answer, as it grows.

    Attributes:
        finished: how it ended, once it has.
    """

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer) -> None:
        self.finished: Finished | None = None
        self._prepared = prepared
        self._tokenizer = tokenizer
        self._texts = [prepared.prefix]
        self._prefill: list[dict[str, Any]] = []
        self._tokens: list[dict[str, Any]] = []
        self._top_tokens: list[list[dict[str, Any]]] = []

    @property
    def text(self) -> str:
        """The text so far, with the prompt if it was asked for."""
        return "".join(self._texts)

    @property
    def mean_logprob(self) -> float:
        """How likely its tokens were, on average; `best_of` takes the highest."""
        logprobs = [token["logprob"] for token in self._tokens if token["logprob"] is not None]
        return sum(logprobs) / len(logprobs) if logprobs else 0.0

    def add(self, event: Event) -> None:
        """Take in one event.

        Raises:
            TgiFault: the engine could not finish it.
        """
        match event:
            case Step():
                self._texts.append(event.text)
                self._tokens.append(token_json(event))
                if self._prepared.parameters.top_n_tokens:
                    self._top_tokens.append(top_json(event, self._tokenizer))
            case PromptRead():
                self._prefill = [
                    {"id": t.id, "text": spelt(self._tokenizer, t.id), "logprob": t.logprob}
                    for t in event.tokens
                ]
            case Finished():
                self.finished = event
            case Failed():
                raise fault_of_failed(event)

    def details(self) -> dict[str, Any]:
        """TGI's `details`."""
        finished = self.finished
        if finished is None:
            raise TgiFault("incomplete_generation", "Incomplete generation")
        told = {
            "finish_reason": finished.reason.value,
            "generated_tokens": finished.num_generated,
            "seed": finished.seed if self._prepared.sampled else None,
            "prefill": self._prefill,
            "tokens": self._tokens,
        }
        return {**told, "top_tokens": self._top_tokens} if self._top_tokens else told


async def collect(serving: Serving, prepared: Prepared, answers: Answers) -> list[Sequence]:
    """All answers of a group, the best first.

    Raises:
        TgiFault: one of them could not be finished; the others are cancelled.
    """
    sequences = [Sequence(prepared, serving.tokenizer) for _ in prepared.requests]
    with answers:
        async for place, event in answers:
            sequences[place].add(event)
    if any(sequence.finished is None for sequence in sequences):
        raise TgiFault("incomplete_generation", "Incomplete generation")
    return sorted(sequences, key=lambda sequence: sequence.mean_logprob, reverse=True)


def response_json(sequences: list[Sequence], prepared: Prepared) -> dict[str, Any]:
    """The body of an answer: the best one's text, and the details if they were asked for."""
    best, *others = sequences
    body: dict[str, Any] = {"generated_text": best.text}
    if prepared.parameters.details or prepared.parameters.decoder_input_details:
        body["details"] = best.details()
        if others:
            body["details"]["best_of_sequences"] = [
                {"generated_text": other.text, **other.details()} for other in others
            ]
    return body


class Stream:
    """A streamed answer: `frames` is the whole of it, errors included.

    Attributes:
        finished: how it ended, once it has.
        fault: what went wrong instead.
    """

    def __init__(self, serving: Serving, prepared: Prepared, answers: Answers) -> None:
        self.finished: Finished | None = None
        self.fault: TgiFault | None = None
        self._tokenizer = serving.tokenizer
        self._prepared = prepared
        self._answers = answers
        self._texts = [prepared.prefix]
        self._num = 0
        self._ends = StopStrings(prepared.requests[0].params.stop)

    async def frames(self) -> AsyncIterator[bytes]:
        """The events of the stream, as bytes."""
        held: Step | None = None
        with self._answers as answers:
            async for _, event in answers:
                match event:
                    case Reading() if event.done < event.total:
                        yield reading_frame(event)
                    case Step():
                        if held is not None:
                            yield self._frame(held)
                        self._texts.append(event.text)
                        held = event if self._can_be_last(event) else None
                        if held is None:
                            yield self._frame(event)
                    case Finished():
                        self.finished = event
                        yield self._last_frame(held, event)
                        return
                    case Failed():
                        self.fault = fault_of_failed(event)
                        yield data_frame(self.fault.body())
                        return
        self.fault = TgiFault("incomplete_generation_stream", "Incomplete generation stream")
        yield data_frame(self.fault.body())

    def _can_be_last(self, step: Step) -> bool:
        self._num += 1
        stopped = not step.special and self._ends.push(step.piece)[1]
        is_end = step.id in self._tokenizer.eos_ids
        return stopped or is_end or self._num == self._prepared.requests[0].params.max_new_tokens

    def _frame(self, step: Step, **ending: Any) -> bytes:
        event = {"index": self._num, "token": token_json(step)}
        if self._prepared.parameters.top_n_tokens:
            event["top_tokens"] = top_json(step, self._tokenizer)
        return data_frame({**event, "generated_text": None, "details": None, **ending})

    def _last_frame(self, held: Step | None, finished: Finished) -> bytes:
        if held is None:
            # Its end could not be seen coming. The end needs a token to go with: one that is no
            # part of the text.
            self._num += 1
            end = min(self._tokenizer.eos_ids, default=0)
            held = Step(id=end, piece="", special=True, text="")
        return self._frame(
            held,
            generated_text="".join(self._texts),
            details={
                "finish_reason": finished.reason.value,
                "generated_tokens": finished.num_generated,
                "seed": finished.seed if self._prepared.sampled else None,
                "input_length": finished.prompt_len,
            },
        )


def fault_of_failed(failed: Failed) -> TgiFault:
    """An answer that was begun and cannot be finished."""
    if failed.kind == "engine":
        # TGI's word for it, so that clients know it; 503, so that proxies try another server.
        said = f"Request failed during generation: {failed.message}"
        return TgiFault("generation", said, status=503, retry_after_s=1)
    fault = tgi_fault(error_of(failed))
    return fault if isinstance(fault, TgiFault) else TgiFault("generation", fault.message)


def token_json(step: Step) -> dict[str, Any]:
    """TGI's `token`."""
    return {"id": step.id, "text": step.piece, "logprob": step.logprob, "special": step.special}


def top_json(step: Step, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """TGI's `top_tokens` for one place."""
    return [
        {
            "id": token_id,
            "text": spelt(tokenizer, token_id),
            "logprob": logprob,
            "special": token_id in tokenizer.special_ids,
        }
        for token_id, logprob in step.top
    ]


def spelt(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text on its own; part of a character becomes U+FFFD."""
    try:
        return tokenizer.token_bytes(token_id).decode(errors="replace")
    except RequestError:
        return ""  # an embedding may have more rows than the tokenizer has tokens

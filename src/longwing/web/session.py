"""What whoever may ask may have: the session, the state, documents and prompts."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing, nullcontext

from starlette.requests import Request
from starlette.responses import Response

from longwing.engine.options import CPU_WEIGHTS, KV_DTYPES
from longwing.errors import LongwingError
from longwing.models import DTYPES
from longwing.plan import CARDS
from longwing.rope import METHODS
from longwing.server.faults import TgiFault, tgi_fault
from longwing.server.leave import until_done_or_left
from longwing.server.sse import data_frame, sse_response
from longwing.server.tgi_status import VERSION
from longwing.web.bodies import PromptBody
from longwing.web.calls import Nouns, body_of, fault_of, kind_of
from longwing.web.documents import MAX_BYTES, Document, Piece
from longwing.web.reader import MAX_CHARACTERS
from longwing.web.records import TASKS
from longwing.web.settings import shown


class Session:
    """Who is there, what is loaded, and documents."""

    def __init__(self, nouns: Nouns) -> None:
        self._nouns = nouns

    async def session(self, http: Request) -> object:
        """What the page must know first."""
        options = self._nouns.serving.options
        access = self._nouns.access
        return {
            "version": VERSION,
            "admin": access.mode,
            "admin_ok": access.may_act(http),
            "limits": {
                "document_bytes": MAX_BYTES,
                "document_characters": MAX_CHARACTERS,
                "payload_bytes": options.payload_limit,
                "max_concurrent_requests": options.max_concurrent_requests,
                "max_stop_sequences": options.max_stop_sequences,
                "max_top_n_tokens": options.max_top_n_tokens,
            },
            "options": {
                "kv_dtype": list(KV_DTYPES),
                "rope_method": list(METHODS),
                "dtype": ["auto", *DTYPES],
                "device": ["auto", "cpu", "cuda"],
                "cpu_weights": list(CPU_WEIGHTS),
                "tasks": list(TASKS),
                "cards": {name: card.memory for name, card in CARDS.items()},
            },
        }

    async def state(self, http: Request) -> object:
        """What is loaded and how, and what is going on."""
        nouns = self._nouns
        serving, loaded = nouns.serving, nouns.loader.loaded
        info, facts = serving.service.info, loaded.facts
        model: dict[str, object] = {
            "id": loaded.id,
            "name": loaded.name,
            "model_id": serving.model_id,
            "bits": facts.bits,
            "group_size": facts.group_size,
            "act_order": facts.act_order,
            "parameters": facts.parameters,
            "claimed_context": facts.context,
            "max_input_len": serving.max_input_len,
            "max_total_len": serving.max_total_len,
            "has_chat_template": loaded.has_chat_template,
            "templates": list(loaded.templates),
            "rope": loaded.options.rope,
            "options": shown(loaded.options),
        }
        if info is not None:
            model |= {name: getattr(info, name) for name in _OF_ENGINE}
            model["rope_rungs"] = list(info.rope_rungs)
        return {
            "status": serving.service.status,
            "model": model,
            "loading": nouns.loader.to_json(),
            "downloads_running": nouns.downloads.num_running,
            "evaluation_running": nouns.runs.running,
        }

    async def document(self, http: Request) -> Response:
        """A file as text: server-sent events, one a piece, so that its tokens count up as it loads.

        What is refused before the first piece has a status; later it is the last event.
        """
        if kind_of(http) != "application/octet-stream":
            raise TgiFault(
                "unsupported_media_type",
                "Expected a file with `Content-Type: application/octet-stream`",
                status=415,
            )
        name = http.query_params.get("name", "")[:300]
        with ExitStack() as stack:
            stack.enter_context(self._nouns.documents.place())
            content = await http.body()
            told = self._nouns.documents.read(name, content, self._nouns.serving.tokenizer)
            first = await until_done_or_left(http, anext(told))
            return sse_response(
                http,
                _frames(first, told),
                keep_alive_s=self._nouns.serving.options.keep_alive_s,
                on_close=stack.pop_all().close,
            )

    async def prompt(self, http: Request) -> object:
        """The tokens of a conversation under any template; special tokens in it are text.

        One that is longer than other bodies may be has a document in it, and takes a place as such.
        """
        most = self._nouns.serving.options.payload_limit
        announced = http.headers.get("content-length", "")
        is_long = not announced.isdecimal() or int(announced) > most
        with self._nouns.documents.place() if is_long else nullcontext():
            body = await body_of(http, PromptBody)
            ids = await asyncio.to_thread(
                self._nouns.serving.tokenizer.chat,
                [turn.model_dump() for turn in body.messages],
                template=body.template,
                continue_final=body.continue_final,
            )
        return {"ids": ids, "tokens": len(ids), "template": body.template or "default"}


async def _frames(
    first: Piece | Document, told: AsyncGenerator[Piece | Document]
) -> AsyncIterator[bytes]:
    async with aclosing(told):
        try:
            yield data_frame(first.to_json())
            async for one in told:
                yield data_frame(one.to_json())
        except LongwingError as error:
            yield data_frame(tgi_fault(fault_of(error)).body())


_OF_ENGINE = (
    "architecture", "quantization", "dtype", "kv_dtype", "device", "device_name", "context",
    "rope_method", "num_pages", "page_len", "kv_bytes", "weight_bytes",
)  # fmt: skip

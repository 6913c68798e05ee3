"""What whoever may ask may have: the session, the state, documents and prompts."""

import asyncio

from starlette.requests import Request

from longwing.engine.options import CPU_WEIGHTS, KV_DTYPES
from longwing.models import DTYPES
from longwing.plan import CARDS
from longwing.rope import METHODS
from longwing.server.faults import TgiFault
from longwing.server.tgi_status import VERSION
from longwing.web.bodies import PromptBody
from longwing.web.calls import Nouns, body_of, kind_of
from longwing.web.documents import MAX_BYTES
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

    async def document(self, http: Request) -> object:
        """A file as text."""
        if kind_of(http) != "application/octet-stream":
            raise TgiFault(
                "unsupported_media_type",
                "Expected a file with `Content-Type: application/octet-stream`",
                status=415,
            )
        name = http.query_params.get("name", "")[:300]
        with self._nouns.documents.place():
            content = await http.body()
            found = await self._nouns.documents.read(name, content, self._nouns.serving.tokenizer)
        return found.to_json()

    async def prompt(self, http: Request) -> object:
        """The tokens of a conversation under any template; special tokens in it are text."""
        body = await body_of(http, PromptBody)
        tokenizer = self._nouns.serving.tokenizer
        ids = await asyncio.to_thread(
            tokenizer.chat,
            [turn.model_dump() for turn in body.messages],
            template=body.template,
            continue_final=body.continue_final,
        )
        return {"ids": ids, "tokens": len(ids), "template": body.template or "default"}


_OF_ENGINE = (
    "architecture", "quantization", "dtype", "kv_dtype", "device", "device_name", "context",
    "rope_method", "num_pages", "page_len", "kv_bytes", "weight_bytes",
)  # fmt: skip

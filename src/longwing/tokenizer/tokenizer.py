"""The tokenizer of a model: text to token ids and back, prompts and chats.

The work on text is done by the tokenizers library (Rust), which reads the model's own
tokenizer.json. Around it stand the decisions that a server of strangers' text needs:

- Special tokens that occur in a text are text, unless the caller vouches for it. Two instances of
  the library are held: one reads special tokens, one reads past them.
- A chat's special tokens are those of its template alone (`guard.py`).
- Text that UTF-8 cannot write, and ids that do not exist, are refused by name.
- Decoding is our own (`decode_stream.py`), so that streams and whole texts agree.

The files and their limits are `files.py`; the library, `backend.py`.
"""

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from longwing.errors import RequestError, TemplateError, TokenizerError
from longwing.tokenizer.backend import encode, frame, inside_copy, plain_copy, read_backend
from longwing.tokenizer.chat import NAMED_TEMPLATES, ChatTemplate, check_text, checked_messages
from longwing.tokenizer.decode_stream import REPLACEMENT, DecodeStream, read_decoder
from longwing.tokenizer.files import TokenizerFiles, read_files
from longwing.tokenizer.guard import Guard, Marks, Segment
from longwing.tokenizer.nested import is_word, texts, with_texts

MAX_VOCAB = 2**24
"""Ids must lie below this, or below the caller's limit."""

_CHAT_MARKUP = re.compile(r"<\|.+\|>")
_TOOLS = re.compile(r"\btools\b")
_ENDS = range(0x1342E, 0x13000, -1)
"""Characters of which one can mark the end of a message; `guard.py` takes from the other end."""


class Tokenizer:
    """A model's tokenizer; immutable once made, and safe to share between threads.

    Args:
        files: what the model's folder says, from `read_files`.
        eos_ids: further ids that end an answer (generation_config.json).
        vocab_limit: rows of the model's embedding; a tokenizer with more ids is refused.

    Attributes:
        vocab_size: one more than the highest id, added tokens included.
        bos_id: what begins a text, if the model has it.
        eos_ids: what ends an answer.
        pad_id: what fills up a batch in training, if the model has it.
        special_ids: ids that `decode` leaves out.

    Raises:
        TokenizerError: the files contradict each other, or the library cannot use them.
    """

    def __init__(
        self,
        files: TokenizerFiles,
        *,
        eos_ids: Iterable[int] = (),
        vocab_limit: int | None = None,
    ) -> None:
        self._backend = read_backend(files)
        self._ids = frozenset(self._backend.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(self._ids, default=-1) + 1
        if not 0 < self.vocab_size <= (MAX_VOCAB if vocab_limit is None else vocab_limit):
            raise TokenizerError(
                f"has {self.vocab_size} ids; the model has room for {vocab_limit or MAX_VOCAB}",
                file="tokenizer.json",
            )
        self._roles = dict(files.roles)
        self._variables = {f"{role}_token": token for role, token in files.roles.items()}
        self.bos_id, self.pad_id = self._role("bos"), self._role("pad")
        eos_id = self._role("eos")
        self.eos_ids = frozenset([*eos_ids, *([] if eos_id is None else [eos_id])])
        if not self.eos_ids <= self._ids:
            unknown = min(self.eos_ids - self._ids)
            raise TokenizerError(
                f"has no id {unknown}, which is to end answers", file="tokenizer.json"
            )

        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self._added = frozenset(token.content for token in added.values())
        controls = {number: token for number, token in added.items() if _is_control(token)}
        unknown_tokens = {files.unknown, self._roles.get("unk")}
        self._control_ids = frozenset(
            number for number, token in controls.items() if token.content not in unknown_tokens
        )
        self._guard = Guard({t.content: (t.lstrip, t.rstrip) for t in controls.values()})
        self._plain = plain_copy(self._backend, controls.values())
        self._plain_inside = inside_copy(self._plain)
        self._prefix, self._suffix = self._frame(files)

        self._decoder = read_decoder(files.decoder)
        self._bytes: dict[int, bytes] = {}
        self._templates = {
            name: ChatTemplate(source, name=name) for name, source in files.templates.items()
        }
        self._named = {
            name: ChatTemplate(named.source, name=name) for name, named in NAMED_TEMPLATES.items()
        }

    @classmethod
    def from_folder(
        cls, path: Path | str, *, eos_ids: Iterable[int] = (), vocab_limit: int | None = None
    ) -> Self:
        """The tokenizer of a model folder: tokenizer.json, and what else describes it.

        Args:
            path: the folder.
            eos_ids: further ids that end an answer, as generation_config.json may name them.
            vocab_limit: rows of the model's embedding; a tokenizer with more ids is refused.

        Raises:
            TokenizerError: a file is missing, too large, or broken; it and the reason are named.
        """
        return cls(read_files(Path(path)), eos_ids=eos_ids, vocab_limit=vocab_limit)

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it ('Ġthe', '▁the').

        Raises:
            RequestError: there is no such id.
        """
        token = self._backend.id_to_token(self._checked([token_id])[0])
        return token or ""

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None if it has none."""
        return self._backend.token_to_id(check_text(token, "token"))

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that has already begun; may be part of a character.

        Raises:
            RequestError: there is no such id.
        """
        return self._bytes_of(self._checked([token_id])[0], False)

    def encode(
        self, text: str, *, special_tokens: bool = False, add_bos: bool | None = None
    ) -> list[int]:
        """The ids of a text.

        Args:
            text: any text that UTF-8 can write; empty is allowed.
            special_tokens: read special tokens in it as such. Only for text from a trusted source:
                they can end a turn or begin another one.
            add_bos: begin with bos, or add nothing; None does what the model's tokenizer does,
                which may also add at the end.

        Raises:
            RequestError: the text has a lone surrogate; add_bos and the model has no bos; or (never
                with byte-pair vocabularies) a special token cannot be written as text.
        """
        check_text(text)
        if add_bos and self.bos_id is None:
            raise RequestError("add_bos: this model has no bos token")
        ids = encode(self._backend, text) if special_tokens else self._plain_ids(text, self._plain)
        if add_bos is None:
            return [*self._prefix, *ids, *self._suffix]
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            RequestError: an id does not exist.
        """
        stream = self.stream(skip_special=skip_special)
        return stream.push_all(self._checked(token_ids)) + stream.flush()

    def stream(self, *, skip_special: bool = True, begun: bool = False) -> DecodeStream:
        """Decodes tokens as they come; the pieces put together are `decode` of all ids.

        Args:
            skip_special: leave special tokens out.
            begun: the tokens go on a text that has begun, as an answer goes on its prompt, so that
                a first `▁world` keeps its space.
        """
        skipped = self.special_ids if skip_special else frozenset[int]()
        return DecodeStream(self._decoder, self._bytes_of, skipped, begun=begun)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a template of its own."""
        return "default" in self._templates

    @property
    def template_names(self) -> tuple[str, ...]:
        """Templates that `chat` knows: the model's own, and the named ones whose tokens it has."""
        usable = (
            name for name, named in NAMED_TEMPLATES.items() if self._added.issuperset(named.tokens)
        )
        return tuple(dict.fromkeys([*self._templates, *usable]))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        flags: Mapping[str, bool] | None = None,
    ) -> list[int]:
        """The ids of a conversation. Special tokens inside messages and tools are text.

        Args:
            messages: {"role": "user", "content": ...}; further fields are text as well, but for
                `tool_calls`, which is nested JSON.
            template: a name from `template_names`; None is the model's own.
            add_generation_prompt: end with what begins an answer.
            continue_final: end within the last message, so that the answer goes on with it.
            tools: functions that may be called, as JSON; see `takes_tools`.
            flags: switches that the template knows, such as enable_thinking.

        Raises:
            TemplateError: there is no such template, it lacks a token, or it fails or refuses.
            RequestError: the messages are not what `checked_messages` accepts, or tools not JSON.
        """
        chosen, before = self._template(template, for_tools=bool(tools))
        turns, offered, marks = self._guarded(messages, tools, chosen.source)
        end = _unused(f"{turns}{offered}{chosen.source}") if continue_final else ""
        if end:
            turns[-1] = {**turns[-1], "content": turns[-1]["content"] + end}
        variables: dict[str, Any] = {**self._variables, **(flags or {}), "tools": offered or None}
        rendered = chosen.render(
            turns,
            add_generation_prompt=add_generation_prompt and not continue_final,
            variables=variables,
            keep=(marks.all if marks else "") + end,
        )
        if end:
            rendered, found, _ = rendered.rpartition(end)
            if not found:
                raise TemplateError("the chat template does not show the message to continue")
            rendered = rendered.replace(end, "")
        check_text(rendered, "the rendered chat")
        segments, num_special = self._guard.split(rendered, marks)
        ids = [at for place, part in enumerate(segments) for at in self._segment(place, part)]
        if sum(token_id in self._control_ids for token_id in ids) > num_special:
            raise RequestError(
                "a message holds another spelling of a special token, which this model's tokenizer "
                "would read as that token; leave it out"
            )
        return [*before, *ids]

    def takes_tools(self, template: str | None = None) -> bool:
        """Whether a template (None: the model's own) has a place for tools and calls of them."""
        chosen, _ = self._template(template, for_tools=True)
        return _TOOLS.search(chosen.source) is not None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation; arguments and errors as for `chat`.

        Where no message holds a special token, `encode(text, special_tokens=True, add_bos=False)`
        of it is `chat`; for a named template `add_bos=None`, since those leave the beginning to the
        tokenizer.
        """
        chosen, _ = self._template(template)
        return chosen.render(
            checked_messages(messages),
            add_generation_prompt=add_generation_prompt,
            variables=self._variables,
        )

    def _guarded(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], source: str
    ) -> tuple[list[dict[str, Any]], Any, Marks | None]:
        """Messages and tools with the guard's marks in them, and the marks."""
        turns = checked_messages(
            [{name: text for name, text in m.items() if name != "tool_calls"} for m in messages]
            if all(isinstance(m, Mapping) for m in messages)
            else messages
        )
        nested = [[m.get("tool_calls") for m in messages], tools]
        words = [*texts(nested, "tools or tool_calls")]
        loose = [{"role": "", "text": text} for text in words if not is_word(text)]
        marked, marks = self._guard.mark([*turns, *loose], source)
        others = (message["text"] for message in marked[len(turns) :])
        calls, offered = with_texts(
            nested, (text if is_word(text) else next(others) for text in words)
        )
        return (
            [
                {**turn, "tool_calls": called} if called else dict(turn)
                for turn, called in zip(marked[: len(turns)], calls, strict=True)
            ],
            offered,
            marks,
        )

    def _template(
        self, name: str | None, *, for_tools: bool = False
    ) -> tuple[ChatTemplate, list[int]]:
        """A template by name, and the ids that stand before its text.

        A model may bring a second template, for use with tools.
        """
        own = self._templates.get(name or ("tool_use" if for_tools else "default"))
        own = own or self._templates.get(name or "default")
        if own is not None:
            return own, []
        known = ", ".join(self.template_names)
        if name is None:
            raise TemplateError(f"this model has no chat template; name one of: {known}")
        if name not in NAMED_TEMPLATES:
            raise TemplateError(f"there is no chat template {name[:40]!r}; known are: {known}")
        for token in NAMED_TEMPLATES[name].tokens:
            if token not in self._added:
                raise TemplateError(
                    f"the template {name!r} needs the special token {token}, which this model's "
                    f"tokenizer lacks; usable are: {known}"
                )
        return self._named[name], self._prefix

    def _segment(self, place: int, segment: Segment) -> list[int]:
        if not segment.plain:
            return encode(self._backend, segment.text)
        return self._plain_ids(segment.text, self._plain_inside if place else self._plain)

    def _plain_ids(self, text: str, plain: Backend) -> list[int]:
        ids = encode(plain, text)
        if not self._control_ids.isdisjoint(ids):
            token = next(self.token(found) for found in ids if found in self._control_ids)
            raise RequestError(
                f"the text holds {token!r}, which this model's vocabulary cannot write as text; "
                "leave it out, or read it as a special token if you trust the text"
            )
        return ids

    def _bytes_of(self, token_id: int, first: bool) -> bytes:
        if not first and (known := self._bytes.get(token_id)) is not None:
            return known
        token = self._backend.id_to_token(_whole(token_id))
        if token is None:
            return REPLACEMENT
        added = self._decoder.bytes_of(token, first)
        if not first:
            self._bytes[token_id] = added
        return added

    def _checked(self, token_ids: Iterable[int]) -> list[int]:
        """The ids as ints, all of which name a token."""
        numbers = [_whole(token_id) for token_id in token_ids]
        for number in numbers:
            if number not in self._ids:
                raise RequestError(
                    f"token id {number} is not in the vocabulary of {self.vocab_size} tokens"
                )
        return numbers

    def _role(self, role: str) -> int | None:
        token = self._roles.get(role)
        return None if token is None else self._backend.token_to_id(token)

    def _frame(self, files: TokenizerFiles) -> tuple[list[int], list[int]]:
        """What stands before and after a text: as the settings say, else as tokenizer.json does."""
        before, after = frame(self._backend)
        ends = [(files.add_bos, "bos", before), (files.add_eos, "eos", after)]
        for wanted, role, ids in ends:
            token_id = self._role(role)
            if wanted is not None:
                ids[:] = [token_id] if wanted and token_id is not None else []
        return before, after


def _is_control(token: AddedToken) -> bool:
    """Special, or of the shape of chat markup, which some folders forget to call special."""
    return token.special or _CHAT_MARKUP.fullmatch(token.content) is not None


def _unused(text: str) -> str:
    """A character that does not stand in the text."""
    used = set(text)
    unused = next((chr(code) for code in _ENDS if chr(code) not in used), None)
    if unused is None:
        raise RequestError("the messages use every rare character; shorten them")
    return unused


def _whole(token_id: int) -> int:
    try:
        number = operator.index(token_id)
    except TypeError:
        raise RequestError(f"token id {token_id!r} is not a whole number") from None
    if not 0 <= number < 2**31:
        raise RequestError(f"token id {number} is out of range")
    return number

"""Chat templates: from messages to the text that a model was trained on.

A model's own template is a jinja program in its folder, run within limits by `sandbox.py`. Models
that came without one are served by the named templates at the foot of this file. What the text's
tokens are, and why a user's `<|endoftext|>` is none, is `tokenizer.py` and `guard.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType

from jinja2.exceptions import TemplateSyntaxError

from longwing.errors import RequestError, TemplateError
from longwing.tokenizer.meter import MAX_WEIGHT, LimitError
from longwing.tokenizer.sandbox import Refusal, Sandbox, compiled

RENDER_S = 1.0
"""Seconds that a template may run; real ones take milliseconds."""

_FILENAME = "chat template"
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True, kw_only=True)
class NamedTemplate:
    """A template that is not in the model's folder.

    Attributes:
        source: jinja; what the model begins every text with (bos) is not part of it.
        tokens: special tokens that it writes, without which it makes no sense.
    """

    source: str
    tokens: tuple[str, ...] = ()


class ChatTemplate:
    """One chat template, compiled on first use.

    Args:
        source: jinja.
        name: for messages.
        timeout_s: seconds that one rendering may take.
    """

    def __init__(self, source: str, *, name: str = "default", timeout_s: float = RENDER_S) -> None:
        self.source = source
        self.name = name
        self._timeout_s = timeout_s
        self._compiled: CodeType | TemplateError | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, str] | None = None,
        keep: str = "",
    ) -> str:
        """The text of a conversation.

        Args:
            messages: as `checked_messages` returns them.
            add_generation_prompt: end with what begins an answer.
            variables: what else the template may use: bos_token, eos_token ...
            keep: characters that JSON in the template must not escape.

        Raises:
            TemplateError: the template is broken, refuses the messages, does what is not allowed,
                or passes a limit of time or size.
        """
        code = self._code()
        sandbox = Sandbox(self._timeout_s, keep)
        context = {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **(variables or {}),
        }
        parts: list[str] = []
        length = 0
        try:
            sandbox.meter.weigh(context["messages"])
            for part in sandbox.load(code).generate(context):
                length += len(part)
                if length > MAX_WEIGHT:
                    raise LimitError(f"wrote more than {MAX_WEIGHT} characters")
                parts.append(part)
        except Exception as fault:  # a stranger's program can fail in any way
            raise self._error(fault) from None
        return "".join(parts)

    def _code(self) -> CodeType:
        if self._compiled is None:
            try:
                self._compiled = compiled(self.source, _FILENAME)
            except Exception as fault:  # as above
                self._compiled = self._error(fault)
        if isinstance(self._compiled, TemplateError):
            raise self._compiled.with_traceback(None)
        return self._compiled

    def _error(self, fault: Exception) -> TemplateError:
        reason = _short(str(fault) or type(fault).__name__)
        if isinstance(fault, Refusal):
            return TemplateError(f"the chat template refused the messages: {reason}")
        if isinstance(fault, RecursionError):
            reason = "nests or calls itself too deeply"
        line = _line(fault)
        where = f"chat template {self.name!r}" + (f", line {line}" if line else "")
        return TemplateError(f"{where}: {reason}")


def checked_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The same messages as plain dicts of text.

    Raises:
        RequestError: there is none; one lacks role or content; a field is not text, or holds a lone
            surrogate; a role is not a short word.
    """
    if not messages:
        raise RequestError("a chat needs at least one message")
    return [_checked(message, f"message {place}") for place, message in enumerate(messages)]


def check_text(text: object, what: str = "text") -> str:
    """The text, which UTF-8 can write.

    Raises:
        RequestError: not a string, or with a lone surrogate, whose place is named.
    """
    if not isinstance(text, str):
        raise RequestError(f"{what} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        code = ord(text[fault.start])
        raise RequestError(
            f"{what} has a lone surrogate, U+{code:04X}, at character {fault.start}; "
            "decode it as UTF-16 or leave it out"
        ) from None
    return text


def _checked(message: object, what: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"{what} is a {type(message).__name__}, not a mapping of role and content"
        )
    for name in ("role", "content"):
        if name not in message:
            raise RequestError(f"{what} has no {name}")
    fields = {
        check_text(name, f"{what}: a field's name"): str(check_text(text, f"{what}: {name}"))
        for name, text in message.items()
    }
    if not _ROLE.fullmatch(fields["role"]):
        role = _short(repr(fields["role"]))
        raise RequestError(f"{what} has the role {role}; a role is a short word such as 'user'")
    return fields


def _line(fault: Exception) -> int | None:
    """The template's line at which an exception arose, if that is known."""
    if isinstance(fault, TemplateSyntaxError):
        return fault.lineno
    line, trace = None, fault.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILENAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


def _turns(*, user: str, assistant: str, system: str = "", begin: str = "", prompt: str) -> str:
    """The jinja source of a template with fixed texts around the parts of a conversation.

    Args:
        user: a user's turn; `{{ m.content }}` is its text.
        assistant: an answer.
        system: a system message; without this one is refused, as is any other role.
        begin: before all turns.
        prompt: begins an answer.
    """
    refusal = "this template knows no role ' ~ m.role ~ '; say it in a user message"
    systems = f"{{% elif m.role == 'system' %}}{system}" if system else ""
    return (
        f"{begin}{{% for m in messages %}}"
        f"{{% if m.role == 'user' %}}{user}"
        f"{{% elif m.role == 'assistant' %}}{assistant}"
        f"{systems}{{% else %}}{{{{ raise_exception('{refusal}') }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


NAMED_TEMPLATES: dict[str, NamedTemplate] = {
    # OpenAssistant's Falcon models, and FalconLite and FalconLite2, which are tuned from one
    "falconlite2": NamedTemplate(
        source=_turns(
            user="<|prompter|>{{ m.content }}<|endoftext|>",
            assistant="<|assistant|>{{ m.content }}<|endoftext|>",
            prompt="<|assistant|>",
        ),
        tokens=("<|prompter|>", "<|assistant|>", "<|endoftext|>"),
    ),
    # amazon/MistralLite
    "mistrallite": NamedTemplate(
        source=_turns(
            user="<|prompter|>{{ m.content }}</s>",
            assistant="<|assistant|>{{ m.content }}</s>",
            prompt="<|assistant|>",
        ),
        tokens=("<|prompter|>", "<|assistant|>", "</s>"),
    ),
    # models tuned on instructions, in the manner of Alpaca
    "instruction": NamedTemplate(
        source=_turns(
            system="{{ m.content }}\n\n",
            user="### Instruction: {{ m.content }}\n",
            assistant="### Response: {{ m.content }}\n",
            prompt="### Response:",
        )
    ),
    # TheBloke's quantised Falcon-Instruct
    "thebloke": NamedTemplate(
        source=_turns(
            begin="{% if messages[0].role != 'system' %}"
            "A helpful assistant who helps the user with any questions asked.\n{% endif %}",
            system="{{ m.content }}\n",
            user="User: {{ m.content }}\n",
            assistant="Assistant: {{ m.content }}\n",
            prompt="Assistant:",
        )
    ),
    "chatml": NamedTemplate(
        source=_turns(
            system="<|im_start|>system\n{{ m.content }}<|im_end|>\n",
            user="<|im_start|>user\n{{ m.content }}<|im_end|>\n",
            assistant="<|im_start|>assistant\n{{ m.content }}<|im_end|>\n",
            prompt="<|im_start|>assistant\n",
        ),
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    # no template: what the user wrote, and nothing else
    "plain": NamedTemplate(
        source="{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{{ raise_exception('plain takes user messages only, not the role ' ~ m.role) }}"
        "{% endif %}{% endfor %}"
    ),
}

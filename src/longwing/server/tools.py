"""Functions that a model may call: how it is told of them, and how its calls are read.

A model whose template has a place for tools is shown them there, in the form it was trained on.
Every other one reads `described` in a message, and its earlier calls and their results as text.

What a model writes is hostile input (CVE-2025-9141 was an `eval` of it). So an answer is a call
only if all of it is JSON of one of the forms below, of functions that were offered; anything else
is text. Nothing is repaired, searched for in prose, or evaluated.

    {"name": "f", "arguments": {…}}                   or "parameters", as Llama 3 has it
    [{"name": "f", "arguments": {…}}, …]
    <tool_call>{"name": "f", "arguments": {…}}</tool_call>…         one or more, as Qwen and Hermes
"""

import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Never

from longwing.server.openai_schema import Message, Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 16
"""In one answer."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function that the model wants called.

    Attributes:
        name: of a function that was offered.
        arguments: JSON text of an object; whether it fits the function's schema is certain only
            where a grammar held the model to it.
    """

    name: str
    arguments: str

    def body(self) -> dict[str, Any]:
        """As a message has it, with an id of its own."""
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def read_calls(text: str, names: Collection[str]) -> list[Call]:
    """The calls that a whole answer consists of; none if it is anything else.

    Args:
        text: the model's answer.
        names: functions that were offered.
    """
    try:
        values = [_parsed(part) for part in _blocks(text.strip())]
        if len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        calls = [_call(value, names) for value in values]
    except (ValueError, RecursionError):
        return []
    whole = [call for call in calls if call is not None]
    return whole if len(whole) == len(calls) <= MAX_CALLS else []


def _blocks(text: str) -> list[str]:
    """The JSON texts: what stands between the tags, or all of it."""
    if not text.startswith(_OPEN):
        return [text]
    blocks = [block.strip() for block in text.split(_OPEN)[1:]]
    if not all(block.endswith(_CLOSE) for block in blocks):
        raise ValueError("something stands beside the calls")
    return [block.removesuffix(_CLOSE) for block in blocks]


def _parsed(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


def _call(value: object, names: Collection[str]) -> Call | None:
    if not isinstance(value, dict) or len(value) != 2 or "name" not in value:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    name = value["name"]
    if not isinstance(arguments, dict) or not isinstance(name, str) or name not in names:
        return None
    return Call(name=name, arguments=_written(arguments))


def _written(arguments: dict[str, Any]) -> str:
    r"""JSON text that UTF-8 can write: a lone surrogate (`"\ud800"`) stays an escape."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments, allow_nan=False)
    return text


class CallReader:
    """Splits an answer into its content and its calls, while it is being written.

    Text that may still turn out to be a call is held back, and only that: an answer which does not
    begin like one goes out as it comes.

    Args:
        names: functions that were offered.
        most: calls that may be made.
    """

    def __init__(self, names: Collection[str], *, most: int = MAX_CALLS) -> None:
        self._names = names
        self._most = most
        self._held: list[str] = []
        self._is_text = not names
        self._is_open = False  # it begins like a call: wait for its end

    def push(self, text: str) -> str:
        """Take the next piece of the answer; returns what is content for certain."""
        if self._is_text:
            return text
        self._held.append(text)
        if self._is_open:
            return ""
        begin = "".join(self._held).lstrip()
        self._is_open = begin.startswith(("{", "[", _OPEN))
        if self._is_open or _OPEN.startswith(begin):
            return ""
        self._is_text = True
        return self._release()

    def finish(self) -> tuple[str, list[Call]]:
        """What is left of the content, and the calls; one of both is empty."""
        text = self._release()
        calls = read_calls(text, self._names) if self._is_open else []
        return ("", calls) if 0 < len(calls) <= self._most else (text, [])

    def _release(self) -> str:
        text = "".join(self._held)
        self._held.clear()
        return text


def described(tools: Sequence[Tool], *, must: bool, parallel: bool) -> str:
    """The tools in words, for a model whose template has no place for them."""
    offered = "\n".join(json.dumps(tool.shown["function"], ensure_ascii=False) for tool in tools)
    several = " For several calls, answer with a JSON list of them." if parallel else ""
    otherwise = "" if must else " If no function is needed, answer in words."
    return (
        f"These functions can be called:\n{offered}\n"
        'To call one, answer with nothing but JSON: {"name": the function, "arguments": {…}}.'
        f"{several}{otherwise}"
    )


def as_text(messages: Sequence[Message], tools_text: str) -> list[dict[str, str]]:
    """A conversation for templates that know neither tools nor their results.

    The description of the tools goes into the first system message, or, since not every template
    has those, before the first message of the user.
    """
    turns: list[dict[str, str]] = []
    called: dict[str, str] = {}
    for message in messages:
        turn = {"role": message.role, "content": message.text}
        if message.name is not None:
            turn["name"] = message.name
        for call in message.tool_calls or ():
            if call.id is not None:
                called[call.id] = call.function.name
        if message.tool_calls:
            parts = [message.text] if message.text else []
            turn["content"] = "\n".join([*parts, _calls_text(message)])
        if message.role == "tool":
            name = message.name or called.get(message.tool_call_id or "", "")
            label = f"Result of {name}:" if name else "Result:"
            turn = {"role": "user", "content": f"{label}\n{message.text}"}
        if message.role == "developer":
            turn["role"] = "system"
        turns.append(turn)
    if tools_text:
        first = next((t for t in turns if t["role"] in ("system", "user")), turns[0])
        first["content"] = f"{tools_text}\n\n{first['content']}"
    return turns


def as_data(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A conversation for templates that know tools: calls as nested data, arguments as objects."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.text}
        if message.role == "developer":
            turn["role"] = "system"
        for name in ("name", "tool_call_id"):
            if (value := getattr(message, name)) is not None:
                turn[name] = value
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id or "",
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.parsed},
                }
                for call in message.tool_calls
            ]
        turns.append(turn)
    return turns


def _calls_text(message: Message) -> str:
    """Earlier calls as the model is told to write them."""
    calls = [
        {"name": call.function.name, "arguments": call.function.parsed}
        for call in message.tool_calls or ()
    ]
    return json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)

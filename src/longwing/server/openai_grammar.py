"""What an answer's text must conform to, from response_format, structured_outputs and tool_choice.

All of it becomes one `Grammar`, which is held here against the engine's limits of size, depth and
references (`grammar_source.py`), and compiled there. A request can ask for one of the three: where
two would have to hold at once, it is refused, for one of them would win without a word.
"""

import json
from collections.abc import Sequence
from typing import Any

from longwing.engine.grammar_source import check_source
from longwing.engine.request import Grammar
from longwing.errors import GrammarError
from longwing.server.openai_refusals import refusal
from longwing.server.openai_schema import (
    ChatBody,
    SamplingBody,
    Tool,
    ToolChoice,
)
from longwing.server.tools import MAX_CALLS

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords of JSON schema whose values hold schemas by name."""
_DATA = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas."""
_GAP = r"\n?[ ]{0,8}"
"""White space between the parts of a call: a weak model would go on with it to the last token."""


def chat_grammar(body: ChatBody) -> Grammar | None:
    """The grammar of a chat's answer, if it asks for one.

    Raises:
        OpenAIFault: 400; several are asked for, a schema is beyond its limits, or the tool that
            must be called is not among the tools.
    """
    tools = must_call(body)
    form = body.response_format
    asked = {
        "tool_choice": bool(tools),
        "response_format": form is not None and form.type != "text",
        "structured_outputs": body.structured_outputs is not None,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
    if len(names) > 1:
        raise refusal(f"{' and '.join(names)} cannot both hold; give one of them", names[1])
    if names and names[0] != "tool_choice" and offered(body):
        raise refusal(
            f'{names[0]} leaves no room for a call of tools; set tool_choice to "none", '
            f"or leave {names[0]} out",
            names[0],
        )
    if tools:
        schema = call_schema(tools, parallel=body.parallel_tool_calls is not False)
        return _held("json_schema", json.dumps(schema), "tools")
    if form is not None and form.json_schema is not None:
        return _held("json_schema", json.dumps(form.json_schema.json_schema), "response_format")
    if form is not None and form.type == "json_object":
        return Grammar(kind="json_object")
    return structured_grammar(body)


def structured_grammar(body: SamplingBody) -> Grammar | None:
    """The grammar that `structured_outputs` asks for.

    Raises:
        OpenAIFault: 400; it is too large, nests too deeply, or refers to itself.
    """
    asked, field = body.structured_outputs, "structured_outputs"
    if asked is None:
        return None
    if asked.json_schema is not None:
        schema = asked.json_schema
        source = schema if isinstance(schema, str) else json.dumps(schema)
        return _held("json_schema", source, field)
    if asked.json_object:
        return Grammar(kind="json_object")
    if asked.regex is not None:
        return _held("regex", asked.regex, field)
    if asked.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in asked.choice)
        return _held("lark", f"start: {texts}", field)
    return _held("lark", asked.grammar or "", field)


def offered(body: ChatBody) -> list[Tool]:
    """The tools that the model may call; none with tool_choice "none".

    Raises:
        OpenAIFault: 400; a named tool is not there, or a call is required and there are no tools.
    """
    tools, choice = body.tools or [], body.tool_choice
    if choice == "none":
        return []
    if len({tool.function.name for tool in tools}) != len(tools):
        raise refusal("tools: two functions have the same name", "tools")
    if isinstance(choice, ToolChoice):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            name = choice.function.name[:64]
            raise refusal(f'tool_choice: there is no tool "{name}" in tools', "tool_choice")
        return named
    if choice == "required" and not tools:
        raise refusal("tool_choice: a call is required, but there are no tools", "tool_choice")
    return tools


def must_call(body: ChatBody) -> list[Tool]:
    """The tools one of which must be called; none where the model is free."""
    return [] if body.tool_choice in (None, "auto", "none") else offered(body)


def call_schema(tools: Sequence[Tool], *, parallel: bool) -> dict[str, Any]:
    """The JSON schema of a call, or, if several are allowed, of one or a list of them.

    Each function's parameters keep their own definitions: they move under `$defs`, and what they
    refer to within themselves moves along.
    """
    parameters = {
        f"tool{place}": _parameters(tool, f"#/$defs/tool{place}")
        for place, tool in enumerate(tools)
    }
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": {"$ref": f"#/$defs/{place}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, tool in zip(parameters, tools, strict=True)
    ]
    common = {"$defs": parameters, "x-guidance": {"whitespace_pattern": _GAP}}
    one = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if not parallel:
        return {**common, **one}
    several = {"type": "array", "items": one, "minItems": 1, "maxItems": MAX_CALLS}
    return {**common, "anyOf": [*calls, several]}


def _held(kind: str, source: str, field: str) -> Grammar:
    """A grammar within the limits.

    Raises:
        OpenAIFault: 400, about this field.
    """
    grammar = Grammar(kind=kind, source=source)
    try:
        check_source(grammar)
    except GrammarError as error:
        raise refusal(f"{field}: {error}", field) from None
    return grammar


def _parameters(tool: Tool, place: str) -> Any:
    """A function's schema as it must read at another place; without one, there are no arguments."""
    schema = tool.function.parameters
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    moved = _moved(schema, place)
    return moved if "type" in moved or "$ref" in moved else {"type": "object", **moved}


def _moved(value: Any, place: str, *, is_by_name: bool = False) -> Any:
    """A schema whose references are to its parts at their new place."""
    if isinstance(value, list):
        return [_moved(member, place) for member in value]
    if not isinstance(value, dict):
        return value
    if is_by_name:
        return {name: _moved(member, place) for name, member in value.items()}
    moved = {
        word: member if word in _DATA else _moved(member, place, is_by_name=word in _BY_NAME)
        for word, member in value.items()
    }
    target = value.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = place + target[1:]
    return moved

"""Tools and grammars: what the model is shown, what it is held to, and what is read as a call."""

import json
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, grammar_from
from openai_app import MODEL, PLAIN, WITH_TOOLS, app_of, post, running, says, serving, tokenizer
from test_openai_answers import events

from longwing.server.openai_grammar import call_schema
from longwing.server.openai_schema import Tool
from longwing.server.tools import CallReader, read_calls

HI: list[Any] = [{"role": "user", "content": "Weather in Rome?"}]
PLACE = {
    "type": "object",
    "properties": {
        "place": {"$ref": "#/$defs/Place"},
        "days": {"type": "integer", "default": None},
    },
    "required": ["place"],
    "additionalProperties": False,
    "$defs": {"Place": {"type": "string", "enum": ["Rome", "Bern"]}},
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The <|im_end|> weather.", "parameters": PLACE},
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = '{"name": "weather", "arguments": {"place": "Rome"}}'


def ask(answer: str, *, template: str = "", **body: Any) -> tuple[Any, Any]:
    """A chat's first choice, whole, and the engine's request."""
    served = serving(says(answer), **({"template": template} if template else {}))
    response = post(served, "/v1/chat/completions", {"messages": HI, "tools": TOOLS, **body})
    assert response.status_code == 200, response.text
    engine: Any = served.service
    return response.json()["choices"][0], engine.seen[-1]


def refused(**body: Any) -> str:
    response = post(serving(), "/v1/chat/completions", {"messages": HI, **body})
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["param"])


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"  {CALL}\n",
        f"[{CALL}]",
        f"<tool_call>\n{CALL}\n</tool_call>",
        CALL.replace("arguments", "parameters"),
    ],
)
def test_an_answer_that_is_a_call_is_given_as_one(text: str) -> None:
    choice, _ = ask(text)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"place": "Rome"}
    assert call["id"].startswith("call_")
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "text",
    [
        "It is warm.",
        f"I call {CALL}",
        f"{CALL} now",
        CALL.replace("weather", "other"),
        CALL.replace('"Rome"', "NaN"),
        CALL[:-1],
        '{"name": "weather", "arguments": "__import__(\'os\')"}',
        '{"name": ["weather"], "arguments": {}}',
        '{"name": "weather", "arguments": {}, "more": 1}',
        f"<tool_call>{CALL}</tool_call> and more",
        f"<tool_call>{CALL}",
        "[]",
        "[1]",
        "{",
        "[" * 2000,
    ],
)
def test_anything_else_is_text(text: str) -> None:
    choice, _ = ask(text)
    assert choice["message"]["content"] == text[: len(choice["message"]["content"])]
    assert choice["message"]["content"]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] in ("stop", "length")


def test_arguments_are_json_that_utf8_can_write() -> None:
    def arguments(value: str) -> Any:
        choice, _ = ask(CALL.replace('"Rome"', value))
        calls = choice["message"].get("tool_calls")
        return calls and calls[0]["function"]["arguments"]

    assert arguments('"\\ud800"') == '{"place": "\\ud800"}'
    assert arguments('"世界"') == '{"place": "世界"}'
    assert arguments("1e999") is None
    assert arguments("null") == '{"place": null}'


def test_a_history_with_half_a_character_is_refused() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    for template in (PLAIN, WITH_TOOLS):
        body = {"messages": messages}
        response = post(serving(template=template), "/v1/chat/completions", body)
        assert response.status_code == 400
        assert "surrogate" in response.json()["error"]["message"]


def test_no_tools_no_calls() -> None:
    assert ask(CALL, tools=[])[0]["message"]["content"] == CALL
    choice, request = ask(CALL, tool_choice="none")
    assert choice["message"]["content"] == CALL
    assert "weather" not in tokenizer().decode(request.prompt_ids)


def test_several_calls_are_one_answer_unless_only_one_is_wanted() -> None:
    both = f'[{CALL}, {{"name": "clock", "arguments": {{}}}}]'
    choice, _ = ask(both)
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["weather", "clock"]
    assert len({c["id"] for c in choice["message"]["tool_calls"]}) == 2
    assert ask(both, parallel_tool_calls=False)[0]["message"]["content"] == both


def test_a_stream_gives_words_at_once_and_calls_at_their_end() -> None:
    body = {"messages": HI, "tools": TOOLS, "stream": True}
    words = events(post(serving(says("It is warm.")), "/v1/chat/completions", body))
    assert len([c for c in words[:-1] if c["choices"][0]["delta"].get("content")]) > 2
    chunks = [
        c["choices"][0]
        for c in events(post(serving(says(CALL)), "/v1/chat/completions", body))[:-1]
    ]
    assert not any(chunk["delta"].get("content") for chunk in chunks)
    (calls,) = [chunk for chunk in chunks if "tool_calls" in chunk["delta"]]
    assert calls["delta"]["tool_calls"][0]["index"] == 0
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_the_sdk_gathers_streamed_calls() -> None:
    with running(app_of(serving(says(CALL)))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with (
            client,
            client.chat.completions.stream(
                model=MODEL, messages=HI, tools=TOOLS, tool_choice="auto"
            ) as stream,
        ):
            message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert json.loads(message.tool_calls[0].function.arguments) == {"place": "Rome"}


@settings(max_examples=200, deadline=None)
@given(st.text('{}[]"<tool_call>/ab:, \n', max_size=40), st.lists(st.integers(1, 5), max_size=40))
def test_a_reader_loses_no_text(text: str, widths: list[int]) -> None:
    reader, shown, rest = CallReader(["weather"]), "", text
    for width in [*widths, len(text)]:
        shown += reader.push(rest[:width])
        rest = rest[width:]
    held, calls = reader.finish()
    assert shown + held == text or calls


@given(st.text(max_size=60))
def test_hostile_text_is_read_without_failing(text: str) -> None:
    assert read_calls(text, ["weather"]) == []
    assert read_calls("[" * 100_000 + text, ["weather"]) == []


def grammar(**body: Any) -> Any:
    """The grammar that a chat's request carries."""
    request = ask("x", **body)[1]
    return request.grammar


def accepts(schema: str, text: str) -> bool:
    """Whether llguidance lets a text through, to its end."""
    words = LLTokenizer("byte")
    matcher = LLMatcher(words, grammar_from("json_schema", schema))
    assert not matcher.get_error()
    ids = words.tokenize_str(text)
    return bool(matcher.consume_tokens(ids)) and matcher.is_accepting()


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_must_be_made_is_held_to_the_tools_schemas(choice: Any) -> None:
    made = grammar(tool_choice=choice)
    assert made.kind == "json_schema"
    assert accepts(made.source, CALL)
    assert accepts(made.source, f"[{CALL},{CALL}]")
    assert accepts(made.source, json.dumps(json.loads(CALL), indent=2))
    assert not accepts(made.source, "{" + " " * 40 + CALL[1:])
    assert not accepts(made.source, CALL.replace("Rome", "Oslo"))
    assert not accepts(made.source, CALL.replace("place", "city"))
    assert not accepts(made.source, "It is warm.")
    clock = '{"name": "clock", "arguments": {}}'
    assert accepts(made.source, clock) == (choice == "required")
    single = grammar(tool_choice=choice, parallel_tool_calls=False)
    assert accepts(single.source, CALL)
    assert not accepts(single.source, f"[{CALL}]")


def test_references_of_two_tools_stay_apart() -> None:
    other = json.loads(json.dumps(WEATHER))
    other["function"] |= {"name": "other"}
    other["function"]["parameters"]["$defs"]["Place"]["enum"] = ["Oslo"]
    tools = [Tool.model_validate(tool) for tool in (WEATHER, other)]
    schema = json.dumps(call_schema(tools, parallel=False))
    assert accepts(schema, CALL)
    assert not accepts(schema, CALL.replace("weather", "other"))
    assert accepts(schema, CALL.replace("weather", "other").replace("Rome", "Oslo"))


def test_what_looks_like_a_reference_and_is_data_stays() -> None:
    data = {"$ref": "#/data"}
    parameters = {
        "properties": {"default": {"$ref": "#/$defs/A"}, "$ref": {"const": data}},
        "$defs": {"A": {"type": "null", "default": data}},
    }
    function = {"name": "f", "parameters": parameters}
    moved = call_schema(
        [Tool.model_validate({"type": "function", "function": function})], parallel=False
    )["$defs"]["tool0"]
    assert moved["properties"]["default"] == {"$ref": "#/$defs/tool0/$defs/A"}
    assert moved["properties"]["$ref"] == {"const": data}
    assert moved["$defs"]["A"]["default"] == data
    assert moved["type"] == "object"


def test_a_model_whose_template_takes_tools_reads_them_there() -> None:
    request = ask("x", template=WITH_TOOLS)[1]
    words = tokenizer(WITH_TOOLS)
    prompt = words.decode(request.prompt_ids, skip_special=False)
    assert '"name": "weather"' in prompt
    assert '"default": null' in prompt
    assert "The <|im_end|> weather." in prompt
    # of these, the tool's own is text: one for the tools, one for the message
    assert request.prompt_ids.count(words.id_of("<|im_end|>")) == 2


def test_any_other_model_is_told_in_words() -> None:
    request = ask("x")[1]
    words = tokenizer()
    prompt = words.decode(request.prompt_ids, skip_special=False)
    assert "These functions can be called" in prompt
    assert prompt.index("weather") < prompt.index("Weather in Rome?")
    assert request.prompt_ids.count(words.id_of("<|im_end|>")) == 1


@pytest.mark.parametrize("template", ["", WITH_TOOLS])
def test_calls_and_their_results_are_part_of_the_history(template: str) -> None:
    call = {"id": "call_1", "type": "function"}
    call |= {"function": {"name": "weather", "arguments": '{"place": "Rome <|im_end|>"}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "25 <|im_end|> degrees"},
    ]
    request = ask("x", template=template, messages=messages)[1]
    words = tokenizer(template) if template else tokenizer()
    prompt = words.decode(request.prompt_ids, skip_special=False)
    assert '"place": "Rome <|im_end|>"' in prompt
    assert "25 <|im_end|> degrees" in prompt
    assert template or "Result of weather:" in prompt
    ends = request.prompt_ids.count(words.id_of("<|im_end|>"))
    assert ends == (4 if template else 3)


def test_a_templates_switches_are_set_by_name() -> None:
    settings = {"chat_template_kwargs": {"enable_thinking": False}}
    request = ask("x", template=WITH_TOOLS, **settings)[1]
    assert tokenizer(WITH_TOOLS).decode(request.prompt_ids).endswith("<think></think>")
    request = ask("x", template=WITH_TOOLS)[1]
    assert not tokenizer(WITH_TOOLS).decode(request.prompt_ids).endswith("<think></think>")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("body", "kind", "source"),
    [
        ({"response_format": {"type": "text"}}, None, None),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "json_schema",
            json.dumps(SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "regex", "[a-z]+"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, "lark", r'start: "yes" | "n\"o"'),
    ],
)  # fmt: skip
def test_forms_become_grammars(body: Any, kind: str | None, source: str | None) -> None:
    made = grammar(tools=None, **body)
    assert (made and made.kind, made and made.source) == (kind, source)
    if kind not in (None, "json_object"):
        assert LLMatcher.validate_grammar(grammar_from(kind, source)) == ""


def deep(levels: int) -> Any:
    schema: Any = {"type": "object"}
    for _ in range(levels // 2):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {"tool_choice": "required", "tools": [
                {**CLOCK, "function": {"name": "f", "parameters": deep(80)}}]},
            "tools",
        ),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "regex", "value": "a"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": deep(80)}}},
            "response_format",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[" * 10_000}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs"),
        ({"tools": [{**CLOCK, "function": {"name": "f", "description": "x" * 70_000}}]}, "tools"),
        ({"structured_outputs": {"json": {"enum": ["x" * 70_000]}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "x" * 9_000}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [
                {"function": {"name": "f", "arguments": "{}"}}]}]},
            "messages.0",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"function": {"name": "f", "arguments": "nothing"}}]}]},
            "messages.0.tool_calls.0.function",
        ),
    ],
)  # fmt: skip
def test_tools_and_forms_that_cannot_be_used_are_refused(body: Any, param: str) -> None:
    assert refused(**body) == param


def test_an_operator_can_refuse_grammars() -> None:
    body = {"messages": HI, "response_format": {"type": "json_object"}}
    response = post(serving(disable_grammar_support=True), "/v1/chat/completions", body)
    assert response.status_code == 400

"""OpenAI's routes over a real engine, whose tiny model writes random bytes: often not UTF-8."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live_engine import MODEL_ID, serving

HI: list[Any] = [{"role": "user", "content": "Hi"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"$ref": "#/$defs/Value"}},
                "required": [key],
                "additionalProperties": False,
                "$defs": {"Value": {"enum": values}},
            },
        },
    }
    for name, key, values in (("weather", "place", ["Rome", "Bern"]), ("count", "to", [1, 2, 3]))
]
NAMED = {"type": "function", "function": {"name": "count"}}
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def sdk(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("live") / "tiny"
    shutil.copytree(tiny_folder("falcon-40b"), folder)
    settings = folder / "tokenizer_config.json"
    described = json.loads(settings.read_text())
    settings.write_text(json.dumps({**described, "chat_template": TEMPLATE}))
    with (
        serving(folder, enable_prefill_logprobs=True) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_required_call_is_made_and_fits_its_schema(
    sdk: openai.OpenAI, choice: Any, stream: bool
) -> None:
    for seed in range(3):
        settings: Any = {
            "model": MODEL_ID, "messages": HI, "tools": TOOLS, "tool_choice": choice, "seed": seed,
            "max_tokens": 180, "parallel_tool_calls": False,
        }  # fmt: skip
        if stream:
            with sdk.chat.completions.stream(**settings) as chunks:
                answer = chunks.get_final_completion().choices[0]
        else:
            answer = sdk.chat.completions.create(**settings).choices[0]
        assert answer.finish_reason == "tool_calls", answer
        (call,) = answer.message.tool_calls or ()
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "count" or choice == "required"
        if call.function.name == "weather":
            assert arguments["place"] in ("Rome", "Bern")
        else:
            assert arguments["to"] in (1, 2, 3)


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"choice": ["yes", "nö 😀"]}, lambda text: text in ("yes", "nö 😀")),
        ({"regex": "[0-9]{3}-[a-c]{2}"}, lambda text: text[3] == "-" and len(text) == 6),
        ({"grammar": 'start: "a" "b"'}, lambda text: text == "ab"),
    ],
)
def test_text_follows_its_form(sdk: openai.OpenAI, form: Any, fits: Callable[[str], bool]) -> None:
    for seed in range(3):
        answer = sdk.completions.create(
            model=MODEL_ID, prompt="x", max_tokens=30, seed=seed,
            extra_body={"structured_outputs": form},
        )  # fmt: skip
        assert fits(answer.choices[0].text), answer.choices[0].text
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_cannot_be_compiled_is_this_requests_fault(
    sdk: openai.OpenAI, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError):
        sdk.completions.create(
            model=MODEL_ID, prompt="x", stream=stream,
            extra_body={"structured_outputs": {"regex": "(a"}},
        )  # fmt: skip
    assert sdk.completions.create(model=MODEL_ID, prompt="x", max_tokens=1).choices


def test_a_stream_of_random_bytes_is_the_whole_answer(sdk: openai.OpenAI) -> None:
    for seed in range(8):
        settings: Any = {
            "model": MODEL_ID, "prompt": "ü 😀", "max_tokens": 40, "seed": seed, "logprobs": 2,
            "echo": True, "temperature": 2.0, "stop": ["a", "\ufffdb"],
        }  # fmt: skip
        whole = sdk.completions.create(**settings).choices[0]
        pieces = [piece.choices[0] for piece in sdk.completions.create(**settings, stream=True)]
        assert "".join(piece.text for piece in pieces) == whole.text
        assert pieces[-1].finish_reason == whole.finish_reason
        assert whole.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            streamed = [v for piece in pieces for v in getattr(piece.logprobs, name)]
            assert streamed == getattr(whole.logprobs, name)
        offsets = whole.logprobs.text_offset or []
        assert offsets == sorted(offsets)
        assert all(offset <= len(whole.text) for offset in offsets)

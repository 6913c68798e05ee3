"""`longwing ask` against a scripted server: what it sends, what it shows, how it ends."""

import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from client.scripted_server import Said, event, json_said, last, serving, token
from longwing.cli.ask import LONG_EXAMPLE, LONG_QUESTION, ask
from longwing.errors import LongwingError, OverloadedError, ServerError

NO_TEMPLATE = json_said({"error": "no template", "error_type": "template_error"}, 422)
TEMPLATE = json_said({"tokenize_response": [], "templated_text": ""})
ANSWER = Said(pieces=[event(token("It ")), event(token("is")), event(last(".", "It is."))])
DATA = Path(__file__).parents[1] / "data"


def asked(*args: str | Path, answers: Sequence[Said], stdin: str = "") -> tuple[Result, list[Any]]:
    """What the command printed, and the requests it made."""
    app = typer.Typer()
    app.command()(ask)
    with serving(*answers) as server:
        words = [*map(str, args), "--url", server.url]
        result = CliRunner().invoke(app, words, input=stdin)
    unexpected = result.exception
    assert unexpected is None or isinstance(unexpected, LongwingError | SystemExit), unexpected
    return result, server.heard


def chat_answer(*texts: str) -> Said:
    chunks: list[Any] = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        for text in texts
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}})
    return Said(pieces=[*map(event, chunks), b"data: [DONE]\n\n"])


def sent_prompt(*args: str | Path, stdin: str = "") -> str:
    result, heard = asked("--template", "plain", *args, answers=[ANSWER], stdin=stdin)
    assert result.exit_code == 0, result.output
    return heard[0].body["inputs"]


def test_answer_streams_to_stdout_and_figures_to_stderr() -> None:
    result, heard = asked("Is it?", "--template", "plain", answers=[ANSWER])
    assert result.stdout == "It is.\n"
    assert "9 prompt tokens" in result.stderr
    assert "3 new" in result.stderr
    assert "ended by length" in result.stderr
    assert heard[0].path == "/generate_stream"
    assert heard[0].body["parameters"] == {"max_new_tokens": 256, "details": True}


def test_auto_uses_the_models_own_template_if_the_server_has_one() -> None:
    answers = [TEMPLATE, chat_answer("He", "llo")]
    result, heard = asked("Hi", "--temperature", "0.5", "--seed", "3", answers=answers)
    assert result.stdout == "Hello\n"
    assert "9 prompt tokens" in result.stderr
    assert [one.path for one in heard] == ["/chat_tokenize", "/v1/chat/completions"]
    body = heard[1].body
    assert body["messages"] == [{"role": "user", "content": "Hi"}]
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (256, 0.5, 3)


def test_adapter_is_asked_for_on_either_route() -> None:
    _, heard = asked("Hi", "--adapter", "mine", answers=[TEMPLATE, chat_answer("a")])
    assert heard[1].body["model"] == "mine"
    _, heard = asked("Hi", "--adapter", "mine", "--template", "plain", answers=[ANSWER])
    assert heard[0].body["parameters"]["adapter_id"] == "mine"


@pytest.mark.parametrize("without", [NO_TEMPLATE, json_said({"error": "not found"}, 404)])
def test_auto_sends_the_plain_text_where_there_is_no_template(without: Said) -> None:
    result, heard = asked("Hi", answers=[without, ANSWER])
    assert result.stdout == "It is.\n"
    assert heard[1].body["inputs"] == "Hi"


def test_greedy_is_said_to_a_chat_whose_default_it_is_not() -> None:
    _, heard = asked("Hi", answers=[TEMPLATE, chat_answer("a")])
    assert heard[1].body["temperature"] == 0


def test_settings_reach_tgi_under_its_names() -> None:
    options = ("--temperature", "0.7", "--top-p", "0.9", "--typical-p", "0.2", "--stop", "a")
    options += ("--stop", "b", "--max-new-tokens", "5", "--top-k", "3")
    _, heard = asked("Hi", "--template", "plain", *options, answers=[ANSWER])
    assert heard[0].body["parameters"] == {
        "temperature": 0.7, "do_sample": True, "top_p": 0.9, "typical_p": 0.2, "top_k": 3,
        "stop": ["a", "b"], "max_new_tokens": 5, "details": True,
    }  # fmt: skip


def test_named_template_is_written_around_the_prompt() -> None:
    _, heard = asked("Hi", "--template", "falconlite2", answers=[ANSWER])
    assert heard[0].body["inputs"] == "<|prompter|>Hi<|endoftext|><|assistant|>"
    result, _ = asked("a <|endoftext|> b", "--template", "falconlite2", answers=[ANSWER])
    assert "reads as special tokens" in result.stderr
    result, _ = asked("Hi", "--template", "nonsense", answers=[ANSWER])
    assert result.exit_code == 2


def test_question_goes_to_its_place_or_after_the_documents(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes("One {brace}.\r\n".encode("utf-8-sig"))
    second.write_text("Two.\n\n")
    assert sent_prompt("-f", first, "-f", second, "Q?") == "One {brace}.\n\nTwo.\n\nQ?"
    second.write_text("{my_question} {0} {my_question}\n")
    assert sent_prompt("-f", second, "Q?") == "Q? {0} Q?\n"


def test_question_comes_from_stdin() -> None:
    assert sent_prompt("-", stdin="Why?\n") == "Why?"
    assert sent_prompt(stdin="Why?\n") == "Why?"


def test_long_example_is_the_originals_with_its_question_in_place() -> None:
    text = lzma.decompress(LONG_EXAMPLE.read_bytes())
    assert text == (DATA / "falconlite" / "example_long_ctx.txt").read_bytes()
    prompt = sent_prompt("--long-context")
    assert prompt == text.decode().replace("{my_question}", LONG_QUESTION)
    assert "What is it?" in sent_prompt("-l", "What is it?")


def test_json_holds_the_answer_and_its_figures() -> None:
    result, _ = asked("Hi", "--template", "plain", "--json", answers=[ANSWER])
    facts = json.loads(result.stdout)
    assert facts.pop("total_s") >= facts.pop("first_token_s") >= 0
    assert facts == {
        "text": "It is.", "finish_reason": "length", "prompt_tokens": 9, "completion_tokens": 3,
        "seed": 7,
    }  # fmt: skip


def test_progress_is_shown_while_the_server_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longwing.cli.console.PLAIN_EVERY_S", 0.0)
    reading = Said(pieces=[b": reading 512/13436\n\n", *ANSWER.pieces])
    result, _ = asked("Hi", "--template", "plain", answers=[reading])
    assert "reading the prompt: 512 of 13436" in result.stderr
    assert result.stdout == "It is.\n"


def test_api_key_comes_from_option_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    _, heard = asked("Hi", "--api-key", "k1", answers=[TEMPLATE, chat_answer("a")])
    assert {one.headers["Authorization"] for one in heard} == {"Bearer k1"}
    monkeypatch.setenv("LONGWING_API_KEY", "k2")
    _, heard = asked("Hi", "--template", "plain", answers=[ANSWER])
    assert heard[0].headers["Authorization"] == "Bearer k2"


def test_refused_key_is_no_missing_template() -> None:
    refusal = json_said({"error": "no valid key", "error_type": "auth"}, 401)
    result, heard = asked("Hi", answers=[refusal])
    assert isinstance(result.exception, ServerError)
    assert "API key" in str(result.exception)
    assert len(heard) == 1


def test_what_came_before_a_failure_stays_and_the_command_fails() -> None:
    broken = Said(pieces=[event(token("It "))])
    result, _ = asked("Hi", "--template", "plain", answers=[broken])
    assert result.stdout == "It \n"
    assert isinstance(result.exception, ServerError)
    result, _ = asked("Hi", "--template", "plain", answers=[json_said({"error": "full"}, 429)])
    assert isinstance(result.exception, OverloadedError)
    assert result.stdout == ""


def test_command_line_that_asks_nothing_is_a_usage_error(tmp_path: Path) -> None:
    document = tmp_path / "a.txt"
    document.write_text("a")
    for args in [(), ("-l", "-f", document), ("Hi", "--top-p", "2"), ("-f", tmp_path / "none")]:
        result, heard = asked(*args, answers=[ANSWER])
        assert result.exit_code == 2, args
        assert not heard

"""The command line as a person meets it: words in, facts out, exit codes that mean something."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from longwing.cli.app import app
from longwing.cli.options import parse_rope
from longwing.errors import ConfigError, LongwingError
from longwing.models import ModelConfig
from models.test_config import FALCON_40B_2023, FALCON_RW_1B_2023, SMOLLM2

Folder = Callable[[str], Path]


def run(*args: str | Path, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    unexpected = result.exception
    assert unexpected is None or isinstance(unexpected, LongwingError | SystemExit), unexpected
    return result


def facts(*args: str | Path, stdin: str | None = None) -> dict:  # type: ignore[type-arg]
    result = run(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_generate_streams_the_answer_to_stdout_and_figures_to_stderr(tiny_folder: Folder) -> None:
    model = tiny_folder("falcon-40b")
    args = ("generate", model, "-p", "Hello", "--max-new-tokens", "12", "--ignore-eos")
    result = run(*args)
    answer = facts(*args)
    assert result.stdout == answer["text"] + "\n"
    assert "5 prompt tokens" in result.stderr
    assert "12 new" in result.stderr
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (5, 12)
    assert answer["finish_reason"] == "length"


def test_prompt_comes_from_a_file_stdin_or_an_option(tiny_folder: Folder, tmp_path: Path) -> None:
    model = tiny_folder("llama2")
    document = tmp_path / "document.txt"
    document.write_text("A {brace} and {my_question}!")
    limit = ("--max-new-tokens", "1")
    piped = facts("generate", model, *limit, stdin="A {brace} and why?!")
    filled = facts("generate", model, "--file", document, "-p", "why?", *limit)
    assert piped["prompt_tokens"] == filled["prompt_tokens"] == len("A {brace} and why?!")
    document.write_text("Text.\n")
    both = facts("generate", model, "--file", document, "-p", "Q", *limit)
    assert both["prompt_tokens"] == len("Text.\n\nQ")


def test_same_seed_gives_the_same_text_and_is_reported(tiny_folder: Folder) -> None:
    args = ("generate", tiny_folder("llama2"), "-p", "x", "--temperature", "1.5", "--ignore-eos")
    first = facts(*args, "--max-new-tokens", "20")
    again = facts(*args, "--max-new-tokens", "20", "--seed", str(first["seed"]))
    assert again["token_ids"] == first["token_ids"]


def test_template_by_name_wraps_the_prompt(tiny_folder: Folder) -> None:
    args = ("generate", tiny_folder("llama2"), "-p", "Hi", "--max-new-tokens", "1")
    wrapped = facts(*args, "--template", "instruction")
    assert wrapped["prompt_tokens"] == len("### Instruction: Hi\n### Response:")


def test_prompt_beyond_the_context_is_refused_with_both_numbers(tiny_folder: Folder) -> None:
    result = run("generate", tiny_folder("llama2"), "-p", "x" * 300)
    assert result.exit_code == 1
    assert "300 tokens" in str(result.exception)
    assert "context of 256" in str(result.exception)


def test_setting_without_effect_is_said(tiny_folder: Folder) -> None:
    result = run("generate", tiny_folder("llama2"), "-p", "x", "--top-p", "0.5")
    assert "--top-p has no effect at temperature 0" in result.stderr


def test_chat_remembers_what_was_said_until_reset(tiny_folder: Folder) -> None:
    args = ("chat", tiny_folder("llama2"), "--template", "instruction", "--max-new-tokens", "3")
    result = run(*args, stdin="one\ntwo\n/reset\ntwo\n/nonsense\n/quit\n")
    assert result.exit_code == 0
    counts = [int(count) for count in re.findall(r"(\d+) prompt tokens", result.stderr)]
    assert counts[1] > counts[0]  # the second turn brings the first along
    assert counts[2] == counts[0]  # "one" and "two" are equally long
    assert result.stderr.count("forgets the conversation") == 2


def test_inspect_shows_shape_ladder_and_tokenizer(tiny_folder: Folder) -> None:
    shown = facts("inspect", tiny_folder("llama-dynamic"), "--context", "100", "--tensors")
    assert (shown["kv_heads"], shown["positions"]) == (4, "RoPE dynamic")
    assert shown["rope_ladder"] == [32, 64, 100]
    assert shown["tokenizer"]["ends_answers"] == ["<end>"]
    assert shown["tensors"]["model.norm.weight"] == {"dtype": "float32", "shape": [64]}
    assert "ladder" in run("inspect", tiny_folder("llama-dynamic")).stdout


def test_verify_passes_a_good_folder_and_lists_every_fault(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    good = tiny_folder("falcon-7b")
    assert facts("verify", good)["ok"]
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((good / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 400}))
    (tmp_path / "tokenizer.json").write_text("{")
    result = run("verify", tmp_path, "--json")
    verdict = json.loads(result.stdout)
    assert result.exit_code == 1
    assert {problem["tensor"] for problem in verdict["problems"]} == {
        "transformer.word_embeddings.weight",
        None,
    }


@pytest.mark.parametrize("bits", ["3", "4"])
def test_plan_of_falcon_40b_needs_no_weights(bits: str) -> None:
    args = ("plan", "falcon-40b", "--context", "24k", "--bits", bits, "--group-size", "128")
    planned = facts(*args)
    assert planned["context"] == 24576
    assert planned["kv_bytes_per_token"] == 122_880
    assert round(planned["kv_bytes"] / 1e9, 2) == 3.02


def test_plan_that_does_not_fit_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    fits = run("plan", tmp_path / "config.json", "--context", "2k", "--gpu-memory", "8GiB")
    tight = run("plan", tmp_path, "--context", "2k", "--gpu-memory", "100MiB")
    assert (fits.exit_code, tight.exit_code) == (0, 1)
    assert "does not fit" in tight.stdout


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "--no-such-option"),
        ("plan", "falcon-40b", "--context", "many"),
        ("plan", "falcon-40b", "--gpu-memory", "24G"),
        ("verify", "no-such-folder"),
        ("nonsense",),
    ],
)
def test_wrong_command_line_exits_with_2(args: tuple[str, ...]) -> None:
    assert run(*args).exit_code == 2


def test_error_is_one_line_on_stderr_with_exit_code_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longwing", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: config.json: ")
    assert done.stderr.count("\n") == 1


def test_rope_option_keeps_or_changes_the_method() -> None:
    base = ModelConfig.from_hf(FALCON_40B_2023).rope
    assert base is not None
    assert parse_rope("theta=1e6", base).theta == 1e6
    dynamic = parse_rope("dynamic,factor=4", base)
    assert (dynamic.method, dynamic.trained_len, dynamic.max_len) == ("dynamic", 2048, 8192)
    assert parse_rope("falconlite,alpha=0.25", base).base_at(24576) == pytest.approx(543844.6)
    for wrong in ("magic", "dynamic,factor", "dynamic,factor=two", "yarn,alpha=1,factor=4"):
        with pytest.raises(ConfigError):
            parse_rope(wrong, base)
    with pytest.raises(ConfigError, match="ALiBi"):
        parse_rope("theta=1e6", ModelConfig.from_hf(FALCON_RW_1B_2023).rope)

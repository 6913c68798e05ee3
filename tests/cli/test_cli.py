"""The command line as a person meets it: words in, facts out, exit codes that mean something."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli.commands import facts, refused, run, usage_error
from convert.gguf_models import write_gguf
from gptq_writer import write_gptq
from longwing.cli import chat as chat_verb
from longwing.cli import generate as generate_verb
from longwing.cli import pull as pull_verb
from longwing.cli.app import app
from longwing.cli.options import DEFAULT_MODEL, find_model
from longwing.demo import DEMO_NAME
from longwing.engine.generator import Generator
from longwing.errors import ConfigError, LogitsError
from longwing.hub import PulledModel
from longwing.models import ModelConfig
from longwing.rope import parse_rope
from models.test_config import FALCON_40B_2023, FALCON_RW_1B_2023, SMOLLM2
from tiny import ARCHITECTURES, make_model

Folder = Callable[[str], Path]


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
    message = refused("generate", tiny_folder("llama2"), "-p", "x" * 300)
    assert "300 tokens" in message
    assert "context of 256" in message


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
    assert refused("verify", tmp_path) == f"{tmp_path}: 2 problems"
    verdict = json.loads(run("verify", tmp_path, "--json").stdout)
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


def test_plan_that_does_not_fit_is_printed_and_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    assert facts("plan", tmp_path / "config.json", "-c", "2k", "--gpu-memory", "8GiB")["fits"]
    tight = ("plan", tmp_path, "-c", "2k", "--gpu-memory", "100MiB")
    assert "does not fit" in run(*tight).stdout
    assert "more than the 0.10 GiB there are" in refused(*tight)


def test_plan_finds_the_bits_where_only_the_tensors_say_them(tmp_path: Path) -> None:
    write_gptq(ARCHITECTURES["falcon-40b"](), tmp_path, bits=4, group_size=32)
    stated = facts("plan", tmp_path)
    (tmp_path / "quantize_config.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    scalars = {"gptq_bits": torch.tensor(4), "gptq_groupsize": torch.tensor(32)}
    save_file(tensors | scalars, tmp_path / "model.safetensors")
    found = facts("plan", tmp_path)
    assert found["weight_bytes"] == stated["weight_bytes"]
    finer = facts("plan", tmp_path, "--group-size", "16")
    assert (finer["bits"], finer["group_size"]) == (4, 16)


def test_a_folder_that_exists_goes_before_a_name(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (DEFAULT_MODEL, DEMO_NAME, "falcon-7b"):
        (tmp_path / name).symlink_to(tiny_folder("llama2"))
    assert find_model(DEMO_NAME) == Path(DEMO_NAME)
    assert facts("inspect")["layers"] == facts("inspect", "falcon-7b")["layers"] == 2
    assert facts("plan", "falcon-7b")["context"] == 256


def test_without_a_model_the_one_of_the_package_answers_and_says_what_it_is_for() -> None:
    document = Path(__file__).parents[2] / "docs" / "harbour.txt"
    asked = run("generate", "--file", document, "-p", "Who looks after the old mill?")
    assert asked.stdout == "The person who looks after the old mill is called Harriet.\n"
    assert "knows nothing else" not in asked.stderr
    lost = run("generate", "-p", "Why is the sky blue?", "--max-new-tokens", "1")
    assert f"{DEFAULT_MODEL} finds what a text says, and knows nothing else" in lost.stderr
    assert DEMO_NAME in lost.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("generate --no-such-option", "No such option"),
        ("generate -p x --temperature -1", "temperature must be at least 0"),
        ("generate -p x --min-new-tokens 9 --max-new-tokens 8", "above max_new_tokens"),
        ("generate -p x --dtype int4", "is not one of auto, float32"),
        ("generate -p x --context 0", "not a length in tokens"),
        ("chat --rope magic", 'RoPE method "magic" is not one of'),
        ("chat --rope dynamic,factor=two", "not name=number"),
        ("plan falcon-40b --context many", "not a length in tokens"),
        ("plan falcon-40b --gpu-memory 24G", "may mean two sizes"),
        ("plan falcon-40b --bits 5", '"bits" is 5'),
        ("plan falcon-40b --group-size 64", "needs --bits"),
        ("plan falcon-40b --dtype int8", "is not one of float32"),
        ("plan falcon-40b --kv-dtype int2", "is not one of bfloat16"),
        ("quantize from to --bits 5", "bits is 5"),
        ("quantize from to --format awq", "is not one of auto, gptq"),
        ("quantize from to --dtype int4", "is not one of auto, float32"),
        ("verify no-such-folder", "does not exist"),
        ("nonsense", "No such command"),
    ],
)
def test_what_is_wrong_whatever_the_model_is_a_usage_error(args: str, words: str) -> None:
    assert words in usage_error(*args.split())


def test_device_that_is_not_here_is_refused(tiny_folder: Folder) -> None:
    message = refused("generate", tiny_folder("llama2"), "-p", "x", "--device", "abacus")
    assert message.startswith('device "abacus" is not here; there are auto, cpu')


@pytest.mark.parametrize("args", [("generate", "-p", "x"), ("chat",)], ids=" ".join)
def test_template_is_refused_before_the_weights_are_read(
    args: tuple[str, ...], tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(generate_verb, "load_generator")
    monkeypatch.delattr(chat_verb, "load_generator")
    verb, *others = args
    template = ("--template", "nonsense")
    assert "no chat template 'nonsense'" in refused(verb, tiny_folder("llama2"), *others, *template)
    lacking = refused(verb, tiny_folder("llama2"), *others, "--template", "chatml")
    assert "<|im_start|>" in lacking


def test_chat_without_turns_is_refused_before_the_first_message(tiny_folder: Folder) -> None:
    assert "plain takes user messages only" in refused(
        "chat", tiny_folder("llama2"), "--template", "plain"
    )


def test_prompt_that_is_not_utf_8_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    args = ("generate", tiny_folder("llama2"), "--template", "plain")
    assert "stdin is not UTF-8 text" in refused(*args, stdin=b"\xff")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt is not UTF-8 text" in refused(*args, "--file", tmp_path / "latin.txt")


def test_chat_leaves_out_a_line_that_is_not_utf_8(tiny_folder: Folder) -> None:
    args = ("chat", tiny_folder("llama2"), "--template", "instruction", "--max-new-tokens", "1")
    result = run(*args, stdin=b"\xff\nhello\n")
    assert result.exit_code == 0
    assert "this line is not UTF-8 text" in result.stderr
    assert result.stderr.count("prompt tokens") == 1


def test_chat_goes_on_after_a_turn_that_failed(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("chat", tiny_folder("llama2"), "--template", "instruction", "--min-new-tokens", "300")
    result = run(*args, stdin="one\ntwo\n")
    assert result.exit_code == 0
    assert result.stderr.count("max_new_tokens 300 exceeds the context of 256") == 2

    def broken(*_: object, **__: object) -> None:
        raise LogitsError("not a number", rows=[0])

    monkeypatch.setattr(Generator, "stream", broken)
    result = run(*args, stdin="one\ntwo\n")
    assert result.exit_code == 0
    assert result.stderr.count("warning: not a number; this turn is not remembered") == 2


def test_unknown_config_fields_are_no_warning(
    tiny_folder: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in tiny_folder("llama2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "colour": "red"}))
    args = ("generate", tmp_path, "-p", "x", "--max-new-tokens", "1")
    assert "colour" not in run(*args).stderr
    assert "colour" in facts("inspect", tmp_path)["unknown_config_fields"]
    with caplog.at_level(logging.INFO):  # as --verbose sets it
        run(*args)
    assert "fields longwing does not know: colour" in caplog.text


def test_json_is_escaped_where_the_stream_holds_no_unicode(tiny_folder: Folder) -> None:
    args = ["generate", str(tiny_folder("llama2")), "-p", "x", "--ignore-eos", "--json"]
    result = CliRunner(charset="ascii").invoke(app, args)
    assert not json.loads(result.stdout)["text"].isascii()


def test_rows_end_without_blanks(tiny_folder: Folder) -> None:
    shown = run("inspect", tiny_folder("llama2")).stdout.splitlines()
    assert shown == [line.rstrip() for line in shown]


def test_convert_makes_a_folder_that_verifies_and_answers(tmp_path: Path) -> None:
    source, folder = tmp_path / "tiny.gguf", tmp_path / "tiny"
    write_gguf(source, make_model(ARCHITECTURES["llama2"]()))
    made = facts("convert", source, folder, "--dtype", "float32")
    assert (made["architecture"], made["folder"]) == ("llama", str(folder))
    assert facts("verify", folder)["num_tensors"] == made["num_tensors"]
    assert facts("generate", folder, "-p", "x", "--max-new-tokens", "1")["completion_tokens"] == 1
    assert "--overwrite" in run("convert", "--help").stdout
    assert str(folder) in refused("convert", source, folder)
    assert "converted" in run("convert", source, folder, "--overwrite").stdout
    assert "is not one of" in usage_error("convert", source, folder, "--dtype", "int4")


def test_pull_says_what_came_and_what_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def fake(repo: str, **settings: object) -> PulledModel:
        asked.update(settings, repo=repo)
        return PulledModel(
            path=tmp_path,
            repo="nest/wing-7b",
            revision="0" * 40,
            num_files=3,
            num_bytes=5_000_000,
            num_fetched_bytes=4,
            replaced=("config.json",),
        )

    monkeypatch.setattr(pull_verb, "pull_model", fake)
    args = ("pull", "nest/wing-7b@main", "--dir", tmp_path, "--include", "gptq*")
    result = run(*args)
    assert (asked["repo"], asked["target"]) == ("nest/wing-7b@main", tmp_path)
    assert asked["include"] == ["gptq*"]
    assert "config.json had other content here and was replaced" in result.stderr
    assert "3, 0.01 GB" in result.stdout
    assert facts(*args)["revision"] == "0" * 40


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

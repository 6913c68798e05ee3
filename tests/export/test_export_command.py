"""`longwing export` as a person meets it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cli.commands import facts, refused, run, usage_error
from gptq_writer import write_gptq
from longwing.models import load_model
from tiny import _falcon


@pytest.fixture(scope="module")
def three_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    config = _falcon(hidden_size=128, num_attention_heads=4, multi_query=True)
    write_gptq(config, folder, bits=3)
    return folder


def test_check_says_why_not_and_what_would_and_writes_nothing(three_bits: Path) -> None:
    before = sorted(three_bits.parent.iterdir())
    result = run("export", three_bits, "--target", "vllm", "--check")
    assert "vllm 0.33 has no kernels for 3 bits" in result.stdout
    assert "loads with --repack" in result.stdout
    assert "longwing export with --repack loads" in str(result.exception)
    assert sorted(three_bits.parent.iterdir()) == before


def test_the_verdict_is_machine_readable(three_bits: Path) -> None:
    said = facts("export", three_bits, "--target", "vllm", "--check", "--repack")
    assert said["verdict"] == "loads"
    assert said["options"] == ["--repack"]
    assert said["nearest"] is None


def test_what_was_checked_is_written(three_bits: Path, tmp_path: Path) -> None:
    said = facts("export", three_bits, tmp_path / "out", "--target", "vllm", "--repack")
    assert said["folder"] == str(tmp_path / "out")
    assert said["num_bytes"] > 0
    assert load_model(tmp_path / "out").config.family == "falcon"
    assert "exists already" in refused("export", three_bits, tmp_path / "out", "--repack")
    again = run("export", three_bits, tmp_path / "out", "--repack", "--force")
    assert again.exit_code == 0
    assert "wrote" in again.stdout


def test_a_folder_that_would_not_load_is_not_written(three_bits: Path, tmp_path: Path) -> None:
    assert "does not load in vllm" in refused("export", three_bits, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_command_lines_are_usage_errors(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_folder("llama2")
    assert "--check" in usage_error("export", model)
    assert "not one of" in usage_error("export", model, tmp_path / "o", "--target", "ollama")
    assert "leave out" in usage_error("export", model, tmp_path / "o", "--repack", "--dequantize")

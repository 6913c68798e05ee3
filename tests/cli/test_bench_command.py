"""`longwing bench`: figures beside floors, for people and as JSON; Ctrl-C keeps what there is."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.commands import facts, refused, run, usage_error
from longwing.cli.app import app
from longwing.engine import bench as engine_bench
from longwing.engine import ceilings
from longwing.engine.bench import Bench

Folder = Callable[[str], Path]
QUICK = ("--tokens", "2", "--repeats", "1", "--device", "cpu", "--dtype", "float32")


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_BUFFER_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(ceilings, "_MATRIX", {"cpu": 64})


def test_json_holds_every_measurement_with_its_floor(tiny_folder: Folder) -> None:
    found = facts(
        *("bench", tiny_folder("falcon-40b"), "--batch", "1,2", "--context", "30,60"),
        *("--prompt", "40", "--drafts", "2", *QUICK),
    )
    assert found["complete"] is True
    assert found["ceilings"]["bytes_per_s"] > 0
    assert found["loading"]["stored_bytes"] > 0
    assert found["memory"]["host_peak"] > found["engine"]["weight_bytes"]
    assert [
        (line["what"], line["batch"], line["context"], line["drafts"]) for line in found["measured"]
    ] == [
        ("decode", 1, 30, 0),
        ("decode", 2, 30, 0),
        ("decode", 1, 60, 0),
        ("decode", 2, 60, 0),
        ("check drafts", 1, 30, 2),
        ("prefill", 1, 40, 0),
    ]
    for line in found["measured"]:
        assert line["of_ceiling"] == pytest.approx(line["floor_ms"] / line["ms"])
    assert found["quoting"]["num_tokens"] == 8


def test_people_see_a_line_a_measurement_and_the_ceilings(tiny_folder: Folder) -> None:
    result = run("bench", tiny_folder("llama2"), "--only", "decode,prefill", *QUICK)
    assert result.exit_code == 0, result.output
    assert "GB/s" in result.stdout
    assert "peak memory" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert any(row[:4] == ["decode", "1", "1,024", "0"] for row in rows)
    assert any(row[:4] == ["prefill", "1", "1,024", "0"] for row in rows)
    assert "quoting" not in result.stdout


def test_interrupted_it_still_tells_what_was_measured(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_bench: Bench, _num_tokens: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_bench.Bench, "prefill", interrupted)
    args = ["bench", str(tiny_folder("llama2")), "--only", "decode,prefill", *QUICK]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 130
    assert "decode" in result.stdout
    assert "interrupted" in result.stderr


def test_a_document_of_ones_own_is_quoted(tiny_folder: Folder, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.\n")
    found = facts("bench", tiny_folder("llama2"), "--only", "quoting", "--quote", text, *QUICK)
    assert found["measured"] == []
    assert found["quoting"]["num_tokens"] == 8


@pytest.mark.parametrize(
    "args",
    [("--only", "naps"), ("--batch", "0"), ("--batch", ","), ("--context", "many")],
)
def test_nonsense_is_a_usage_error(args: tuple[str, str], tiny_folder: Folder) -> None:
    assert usage_error("bench", tiny_folder("llama2"), *args)


def test_memory_too_small_for_what_is_measured_is_refused(tiny_folder: Folder) -> None:
    words = refused("bench", tiny_folder("llama2"), "--memory", "700MiB", *QUICK)
    assert "leaves" in words

"""`longwing serve` and its page: the options, and what the room may import."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from longwing.cli import serve as verb
from longwing.cli.app import app
from longwing.web.web import Web


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What `serve` hands to the server, which does not run."""
    seen: dict[str, Any] = {}

    def run(options: Any, open_serving: Any, *, announce: Any, extension: Any) -> None:
        seen.update(options=options, extension=extension, announce=announce)

    monkeypatch.setattr(verb, "run", run)
    monkeypatch.setattr(verb, "log_to", lambda: None)
    monkeypatch.setenv("LONGWING_CACHE", str(tmp_path / "cache"))
    for name in ("LONGWING_ADMIN_KEY", "LONGWING_UI"):
        monkeypatch.delenv(name, raising=False)
    return seen


def serve(*arguments: str, **environ: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments], env=environ)


def test_the_page_is_there_unless_it_is_switched_off(
    served: dict[str, Any], shelf_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(shelf_folder / "falcon-40b")
    assert serve(folder).exit_code == 0
    assert isinstance(served["extension"], Web)
    served["announce"]("http://127.0.0.1:1")
    assert "http://127.0.0.1:1/ui" in capsys.readouterr().err
    assert serve(folder, "--no-ui").exit_code == 0
    assert served["extension"] is None
    served["announce"]("http://127.0.0.1:1")
    assert "/ui" not in capsys.readouterr().err


def test_the_admin_key_comes_from_the_option_or_our_own_variable(
    served: dict[str, Any], shelf_folder: Path
) -> None:
    folder = str(shelf_folder / "falcon-40b")

    def key(*arguments: str, **environ: str) -> object:
        assert serve(folder, *arguments, **environ).exit_code == 0
        return served["extension"]._options.admin_key

    assert key() is None
    assert key("--admin-key", "a") == "a"
    assert key(LONGWING_ADMIN_KEY="b") == "b"
    assert key(ADMIN_KEY="another program's") is None
    assert serve(folder, "--admin-key", "ö").exit_code == 2


def test_folders_are_where_the_operator_says(
    served: dict[str, Any], shelf_folder: Path, tmp_path: Path
) -> None:
    folder = str(shelf_folder / "falcon-40b")
    serve(folder)
    roots = [root.name for root in served["extension"]._shelf._roots]
    assert roots == [shelf_folder.name, "models"]
    serve(folder, "--model-dir", str(tmp_path / "a"), "--model-dir", str(tmp_path / "b"))
    assert [root.name for root in served["extension"]._shelf._roots] == ["a", "b", "models"]


def test_without_a_model_the_packages_own_is_served_by_its_name(
    served: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve().exit_code == 0
    served["announce"]("http://127.0.0.1:1")
    assert "serving longwing-tiny at" in capsys.readouterr().err
    shelf = served["extension"]._shelf
    assert [root.name for root in shelf._roots] == ["models"]
    assert "longwing-tiny" in [model.name for model in shelf.models()]


def test_the_reader_brings_next_to_nothing_and_the_page_no_transformers() -> None:
    lines = ["import sys"]
    for module, heavy in (
        ("longwing.web.reader", {"torch", "fastapi", "huggingface_hub", "pypdf", "asyncio"}),
        ("longwing.web.web", {"transformers", "datasets", "pypdf", "huggingface_hub.inference"}),
    ):
        lines += [f"import {module}", f"print(sorted({heavy} & set(sys.modules)))"]
    command = [sys.executable, "-P", "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]

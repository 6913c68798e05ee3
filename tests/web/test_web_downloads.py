"""Downloads: `longwing pull` as a child, against a Hub on localhost."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from fake_hub import REPO, FakeHub, Server, handler, model_files
from huggingface_hub import constants
from typer.testing import CliRunner
from web_site import Site

from longwing.cli.app import app
from longwing.web import child, downloads
from longwing.web.child import environment
from longwing.web.downloads import Download, Downloads, _hear


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The two servers; child processes are told of them by their environment."""
    hub = FakeHub()
    servers = [Server(("127.0.0.1", 0), handler(hub, name)) for name in ("hub", "cdn")]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for name, value in {
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path / "home"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
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


def has_ended(download: dict[str, Any]) -> bool:
    return download["state"] != "running"


async def told(http: Any, name: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What is said of a download, once something is true of it."""
    while True:
        listed = (await http.get("/ui/api/downloads")).json()["downloads"]
        found: dict[str, Any] = next(one for one in listed if one["name"] == name)
        if true(found):
            return found
        await asyncio.sleep(0.02)


@pytest.mark.slow
def test_a_download_is_cancelled_and_goes_on_where_it_stopped_and_one_that_fails_says_why(
    shelf_folder: Path, tmp_path: Path, stub: FakeHub
) -> None:
    stub.repos[REPO] = model_files(3_000_000)
    stub.cut_after["model.safetensors"] = [2_500_000]
    stub.stalled.set()  # the rest does not come until it is released
    body = {"name": REPO, "include": ["model.safetensors"]}

    async def work(http):
        path = "/ui/api/downloads"
        await http.post(path, json={"name": "nest/nothing"})
        first = await http.post(path, json=body)
        again = await http.post(path, json=body)
        while not any(file.stat().st_size >= 2_400_000 for file in tmp_path.rglob("*.partial")):
            await asyncio.sleep(0.05)
        running = await told(http, REPO, lambda one: one["total_bytes"] > 0)
        cancelled = (await http.post(f"{path}/cancel", json={"name": REPO})).json()
        twice = await http.post(f"{path}/cancel", json={"name": REPO})
        shelf = (await http.get("/ui/api/models")).json()["models"]
        stub.release.set()
        await http.post(path, json=body)
        failed = await told(http, "nest/nothing", has_ended)
        done = await told(http, REPO, has_ended)
        return first, again, running, cancelled, twice, shelf, failed, done

    found = Site(shelf_folder, tmp_path).run(work)
    first, again, running, cancelled, twice, shelf, failed, done = found
    assert (first.status_code, first.json()["state"]) == (202, "running")
    assert (again.status_code, twice.status_code) == (409, 409)
    assert running["total_bytes"] > 3_000_000 > running["done_bytes"]
    assert (cancelled["state"], cancelled["error"]) == ("cancelled", None)
    assert [model["resumable"] for model in shelf if model["id"] == REPO] == [True]
    assert (done["state"], done["owner"], done["error"]) == ("done", "nest", None)
    assert done["done_bytes"] == done["total_bytes"]
    assert not stub.ranges()[-1].startswith("bytes=0-")
    assert failed["state"] == "failed"
    assert failed["error"].startswith("there is no model nest/nothing")


@pytest.mark.slow
def test_the_servers_end_stops_downloads_and_a_few_run_at_once(
    shelf_folder: Path, tmp_path: Path, stub: FakeHub
) -> None:
    async def work(http):
        path = "/ui/api/downloads"
        statuses = []
        for name in ("nest/a", "nest/b", "nest/c"):
            statuses.append((await http.post(path, json={"name": name})).status_code)
        running = (await http.get("/ui/api/state")).json()["downloads_running"]
        await site.web.close()
        left = (await http.get(path)).json()["downloads"]
        return statuses, running, {one["state"] for one in left}

    site = Site(shelf_folder, tmp_path)
    statuses, running, states = site.run(work)
    assert statuses == [202, 202, 429]
    assert running == 2
    assert states == {"cancelled"}


def test_a_child_that_does_not_heed_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "STOP_S", 0.2)
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True);"
    deaf += "signal.pause()"

    async def main() -> child.Child:
        heard = asyncio.Event()
        started = child.Child(["x"], lambda _: heard.set(), environ={"PYTHONPATH": ""})
        await heard.wait()
        await started.stop()
        return started

    async def spawn(*arguments: str, **settings: Any) -> Any:
        return await real(arguments[0], "-c", deaf, **settings)

    real = asyncio.create_subprocess_exec
    monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn)
    ended_child = asyncio.run(main())
    assert (ended_child.was_stopped, ended_child.code) == (True, -9)


def test_no_key_of_ours_reaches_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LONGWING_API_KEYS", "API_KEY", "LONGWING_ADMIN_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("HF_TOKEN", "needed")
    assert "secret" not in environment().values()
    assert environment()["HF_TOKEN"] == "needed"


def test_progress_is_heard_and_nothing_else_is_believed() -> None:
    download = Download(name="a/b", owner="a", revision=None)
    speed: deque[tuple[float, int]] = deque()
    for line in ("", "nonsense", "[]", '{"done": "x"}', '{"folder": "/x", "repo": "a/b"}', "1"):
        _hear(download, line, speed)
    assert (download.done_bytes, download.total_bytes) == (0, 0)
    _hear(download, json.dumps({"done": 5, "total": 10, "file": "f"}), speed)
    assert (download.done_bytes, download.total_bytes, download.file) == (5, 10, "f")


def test_only_so_many_downloads_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "MAX_KEPT", 3)

    class Done:
        was_stopped = False

        def __init__(self, *_: Any) -> None: ...

        async def wait(self) -> bool:
            return True

    monkeypatch.setattr(downloads, "Child", Done)

    async def main() -> list[str]:
        kept = Downloads()
        for number in range(5):
            kept.begin(f"a/b{number}")
            await asyncio.sleep(0)
        return [one.name for one in kept.all()]

    assert asyncio.run(main()) == ["a/b4", "a/b3", "a/b2"]


def test_pulls_progress_is_lines_for_programs(
    stub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", stub.endpoint)
    huggingface_hub.close_session()
    command = ["pull", REPO, "--dir", str(tmp_path / "m"), "--progress-json"]
    result = CliRunner().invoke(app, command)
    huggingface_hub.close_session()
    assert result.exit_code == 0, result.output
    *progress, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert progress[-1]["done"] == progress[-1]["total"] > 300_000
    assert all(set(line) == {"done", "total", "file"} for line in progress)
    assert last["repo"] == REPO

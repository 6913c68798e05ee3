"""The application as a whole: health, hostile bodies, its description, leaving, dying, draining."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import ScriptedEngine
from server_of import Live, app_of, ask, engine_of, running, serving_of, within

from longwing.engine.request import Request
from longwing.errors import ConfigError, EngineDeadError
from longwing.server import run
from longwing.server.app import serving_for
from longwing.server.options import ServerOptions
from longwing.server.serving import Serving, lengths
from longwing.tokenizer import Tokenizer

HEALTH = ("/health", "/ready", "/ping", "/")


@pytest.fixture
def serving(byte_tokenizer: Tokenizer) -> Serving:
    return serving_of(byte_tokenizer)


@pytest.mark.parametrize("status", ["starting", "ready", "draining", "dead"])
def test_health_is_good_only_while_requests_are_taken(serving: Serving, status: str) -> None:
    engine_of(serving).status = status
    for path in HEALTH:
        answer = ask(serving, path)
        assert answer.status_code == (200 if status == "ready" else 503)
        if status != "ready":
            assert answer.json() == {"error": "unhealthy", "error_type": "healthcheck"}


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/nowhere", "GET", 404),
        ("/generate/", "POST", 404),
        ("/generate", "GET", 405),
        ("/info", "POST", 405),
        ("/", "PUT", 405),
        ("/generate", "OPTIONS", 405),
    ],
)
def test_wrong_routes_are_errors_that_tgis_client_can_read(
    serving: Serving, path: str, method: str, status: int
) -> None:
    answer = ask(serving, path, {} if method == "POST" else None, method)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "error_type"}
    assert ("allow" in answer.headers) == (status == 405)


def test_wrong_routes_under_v1_are_errors_that_openais_client_can_read(serving: Serving) -> None:
    for path, method, status in (("/v1/nowhere", "GET", 404), ("/v1/models", "POST", 405)):
        answer = ask(serving, path, {} if method == "POST" else None, method)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_description_is_where_tgi_has_it_and_fetches_nothing(serving: Serving) -> None:
    for path in ("/docs", "/api-doc/openapi.json"):
        assert ask(serving, path).headers["location"] == "/openapi.json"
    described = ask(serving, "/openapi.json")
    assert {"/", "/generate", "/generate_stream", "/info", "/health", "/metrics", "/tokenize",
            "/chat_tokenize", "/invocations"} <= set(described.json()["paths"])  # fmt: skip
    assert "cdn" not in described.text
    named = set(re.findall(r'"\$ref":"([^"]+)"', described.text))
    known = described.json()["components"]["schemas"]
    assert named <= {f"#/components/schemas/{name}" for name in known}


def test_without_a_port_or_a_sound_configuration_there_is_no_server() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*--port"):
            run.bind(ServerOptions(port=port))
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        run.bind(ServerOptions(host="192.0.2.1", port=0))
    for wrong in (
        {"port": 65536}, {"max_concurrent_requests": 0}, {"keep_alive_s": 0.0},
        {"drain_s": float("inf")}, {"drain_s": float("nan")}, {"api_keys": ("",)},
        {"api_keys": ("a b",)}, {"max_input_length": 10, "max_total_tokens": 10},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            ServerOptions(**wrong)


def test_lengths_come_from_the_context_unless_they_are_given() -> None:
    assert lengths(ServerOptions(), 256) == (255, 256)
    assert lengths(ServerOptions(max_input_length=100), 256) == (100, 256)
    assert lengths(ServerOptions(max_input_length=100, max_total_tokens=120), 256) == (100, 120)
    with pytest.raises(ConfigError, match="the context holds 256"):
        lengths(ServerOptions(max_total_tokens=257), 256)
    with pytest.raises(ConfigError, match="Given: 256 and 256"):
        lengths(ServerOptions(max_input_length=256), 256)


def test_a_serving_is_made_of_an_engine_that_has_started(byte_tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(byte_tokenizer)
    made = serving_for(engine, byte_tokenizer, ServerOptions(), model_id="x")
    assert (made.max_input_len, made.max_total_len) == (255, 256)
    engine.info = None
    with pytest.raises(EngineDeadError):
        serving_for(engine, byte_tokenizer, ServerOptions(), model_id="x")


# What strangers send.

ROUTES = {
    "/generate": {"inputs": "Hi", "parameters": {"max_new_tokens": 2, "stop": ["a"]}},
    "/generate_stream": {"inputs": "Hi", "parameters": {"max_new_tokens": 2, "details": True}},
    "/": {"inputs": "Hi", "stream": True, "parameters": {"top_n_tokens": 1, "top_p": 0.5}},
    "/invocations": {"inputs": "Hi", "parameters": {"grammar": {"type": "regex", "value": "a"}}},
    "/tokenize": {"inputs": "Hi<end>"},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/chat_tokenize": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2, "stop": ["a"], "n": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
}
HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, -1e308, 5e-324, "", "1", "\0",
    "\ud800", "a" * 5000, "\u202e", [], [[]], {}, {"": {}}, [None] * 100, {"type": "json"},
    {"type": "regex", "value": "(" * 3000}, {"type": "json", "value": {"properties": {}}},
]  # fmt: skip


def mutated(body: Any, dice: random.Random) -> Any:
    """The body with something, somewhere, replaced, added or left out."""
    body = json.loads(json.dumps(body))
    node, parts = body, []
    while isinstance(node, dict | list) and node and dice.random() < 0.7:
        key = dice.choice(list(node) if isinstance(node, dict) else range(len(node)))
        parts.append((node, key))
        node = node[key]
    if not parts:
        return dice.choice(HOSTILE)
    parent, key = parts[-1]
    if isinstance(parent, dict) and dice.random() < 0.2:
        parent[dice.choice(["seed", "best_of", "model", "x\0", "stream"])] = dice.choice(HOSTILE)
    elif isinstance(parent, dict) and dice.random() < 0.2:
        del parent[key]
    else:
        parent[key] = dice.choice(HOSTILE)
    return body


def raw(body: Any, dice: random.Random) -> bytes:
    """As bytes, some of them broken."""
    made = bytearray(json.dumps(body).encode())
    if dice.random() < 0.2:
        for _ in range(dice.randint(1, 4)):
            made[dice.randrange(len(made))] = dice.randrange(256)
    if dice.random() < 0.05:
        del made[dice.randrange(len(made)) :]
    return bytes(made)


def well_formed(path: str, answer: httpx.Response) -> bool:
    """Whether an answer is a success, or an error in its route's dialect."""
    if answer.status_code == 200:
        return True
    told = answer.json()
    if path.startswith("/v1") or isinstance(told["error"], dict):  # /invocations has both
        return set(told["error"]) == {"message", "type", "param", "code"}
    return set(told) == {"error", "error_type"}


@pytest.mark.parametrize("seed", range(4))
def test_no_mutated_body_is_the_servers_fault(byte_tokenizer: Tokenizer, seed: int) -> None:
    serving = serving_of(byte_tokenizer)
    dice = random.Random(seed)
    kind = {"content-type": "application/json"}

    async def main(http: httpx.AsyncClient) -> None:
        for _ in range(500):
            path = dice.choice(list(ROUTES))
            body = raw(mutated(ROUTES[path], dice), dice)
            answer = await http.post(path, content=body, headers=kind)
            assert answer.status_code < 500, (path, body, answer.text)
            assert well_formed(path, answer), (path, body, answer.text)

    within(serving, main)
    assert not engine_of(serving).at_work


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)


@settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(path=st.sampled_from(list(ROUTES)), value=json_values, text=st.text(max_size=200))
def test_no_value_at_all_is_the_servers_fault(
    byte_tokenizer: Tokenizer, path: str, value: Any, text: str
) -> None:
    serving = _shared(byte_tokenizer)
    body = value if not isinstance(value, dict) else {"inputs": text, "prompt": text, **value}
    answer = ask(serving, path, json.dumps(body).encode())
    assert answer.status_code < 500, answer.text
    assert well_formed(path, answer)


_KEPT: list[Serving] = []


def _shared(tokenizer: Tokenizer) -> Serving:
    """One server for all examples."""
    if not _KEPT:
        _KEPT.append(serving_of(tokenizer))
    return _KEPT[0]


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_and_nothing_undescribed(
    byte_tokenizer: Tokenizer,
) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    serving = serving_of(byte_tokenizer, host="0.0.0.0")  # it calls itself by another name
    schema = schemathesis.openapi.from_asgi("/openapi.json", app_of(serving))
    checks = [not_a_server_error]
    for operation in schema.include(path_regex="^/(?!v1)").get_all_operations():

        @settings(
            max_examples=15,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.ok().as_strategy())
        def examine(case: Any) -> None:
            more = [status_code_conformance, content_type_conformance, response_schema_conformance]
            case.call_and_validate(checks=[*checks, *more])

        examine()


# Real connections.


def read_until(stream: Any, text: str) -> str:
    """What a stream brings, up to a text."""
    so_far = ""
    for piece in stream:
        so_far += piece
        if text in so_far:
            return so_far
    raise AssertionError(so_far)


def waiting_for(gate: asyncio.Event, tokenizer: Tokenizer) -> dict[str, Any]:
    """An engine that says a token, waits at the gate, and says the rest."""

    def answer(request: Request, n: int) -> Any:
        events = list(ScriptedEngine(tokenizer).echo(request))
        yield from events[:2]
        yield gate.wait
        yield from events[2:]

    return {"answer": answer}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_a_client_that_leaves_takes_its_request_with_it(
    byte_tokenizer: Tokenizer, path: str
) -> None:
    serving = serving_of(
        byte_tokenizer, port=0, engine=waiting_for(asyncio.Event(), byte_tokenizer)
    )
    engine = engine_of(serving)
    with running(serving) as live:
        body = json.dumps({"inputs": "Hello", "prompt": "Hello"}).encode()
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            live.until(lambda: bool(engine.at_work))
        live.until(lambda: engine.num_cancelled == 1)
        assert not engine.at_work


def test_a_silent_stream_is_kept_alive(byte_tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    serving = serving_of(
        byte_tokenizer, port=0, keep_alive_s=0.01, engine=waiting_for(gate, byte_tokenizer)
    )
    with running(serving) as live, httpx.Client(base_url=live.url) as http:
        body = {"inputs": "Hello", "parameters": {"max_new_tokens": 3}}
        with http.stream("POST", "/generate_stream", json=body) as answer:
            stream = answer.iter_text()
            assert '"text":"H"' in read_until(stream, ": keep-alive\n\n")
            live.call(gate.set)
            assert '"generated_text":"Hel"' in read_until(stream, "input_length")


def test_an_engine_that_dies_is_told_to_everyone_at_once(byte_tokenizer: Tokenizer) -> None:
    serving = serving_of(
        byte_tokenizer, port=0, engine=waiting_for(asyncio.Event(), byte_tokenizer)
    )
    with running(serving) as live, httpx.Client(base_url=live.url) as http:
        told: list[httpx.Response] = []
        whole = threading.Thread(
            target=lambda: told.append(httpx.post(live.url + "/generate", json={"inputs": "Hi"}))
        )
        whole.start()
        with http.stream("POST", "/generate_stream", json={"inputs": "Hi"}) as answer:
            stream = answer.iter_text()
            read_until(stream, "\n\n")
            live.until(lambda: len(engine_of(serving).at_work) == 2)
            live.call(engine_of(serving).die)
            assert '"error_type":"generation"' in read_until(stream, "}\n\n")
        whole.join(20)
        assert told[0].status_code == 503
        assert told[0].json()["error_type"] == "generation"
        assert http.get("/health").status_code == 503
        assert http.post("/generate", json={"inputs": "Hi"}).status_code == 503


def test_told_to_stop_it_finishes_what_it_has_and_takes_no_more(byte_tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    serving = serving_of(byte_tokenizer, port=0, engine=waiting_for(gate, byte_tokenizer))
    live = Live(serving)
    live.start()
    with (
        httpx.Client(base_url=live.url) as http,
        http.stream("POST", "/generate_stream", json={"inputs": "Hello"}) as answer,
    ):
        stream = answer.iter_text()
        read_until(stream, "\n\n")
        live.sigterm()
        live.until(lambda: engine_of(serving).status == "draining")
        for path in HEALTH:
            assert http.get(path).status_code == 503
        for path in ("/generate", "/generate_stream", "/v1/completions"):
            refused = http.post(path, json={"inputs": "Hi", "prompt": "Hi"})
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
        live.call(gate.set)
        assert '"generated_text":"Hello"' in read_until(stream, "input_length")
    live.join()
    assert engine_of(serving).stopped_with == [90.0]


def test_told_twice_it_ends_at_once_and_says_so(byte_tokenizer: Tokenizer) -> None:
    serving = serving_of(
        byte_tokenizer, port=0, engine=waiting_for(asyncio.Event(), byte_tokenizer)
    )
    live = Live(serving)
    live.start()
    with httpx.stream("POST", live.url + "/generate_stream", json={"inputs": "Hello"}) as answer:
        stream = answer.iter_text()
        read_until(stream, "\n\n")
        live.sigterm()
        live.until(lambda: engine_of(serving).status == "draining")
        live.hurry()
        assert '"error_type":"generation"' in read_until(stream, "}\n\n")
    live.join()
    assert engine_of(serving).stopped_with == [90.0, 0]


PROCESS = """
import asyncio, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from scripted import ScriptedEngine
from server_of import serving_of
from longwing.server import run
from longwing.server.access_log import log_to
from longwing.tokenizer import Tokenizer

async def open_serving():
    async def told():
        while engine.status == "ready":
            await asyncio.sleep(0.001)
    def answer(request, n):
        events = engine.echo(request)
        yield from events[:2]
        yield told
        yield from events[2:]
    serving = serving_of(tokenizer, port=0, engine=dict(answer=answer))
    engine = serving.service
    return serving

tokenizer = Tokenizer.from_folder(Path({folder!r}))
log_to()
options = serving_of(tokenizer, port=0).options
run.run(options, open_serving, announce=lambda url: print(url, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_well(tmp_path: Path, number: int) -> None:
    from tiny import write_tokenizer

    write_tokenizer(tmp_path)
    here = Path(__file__).parent
    script = PROCESS.format(paths=[str(here), str(here.parent)], folder=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx.stream("POST", url + "/generate_stream", json={"inputs": "Hello"}) as answer:
            stream = answer.iter_text()
            read_until(stream, "\n\n")
            process.send_signal(number)
            assert '"generated_text":"Hello"' in read_until(stream, "input_length")
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["path"] for line in lines if line["message"] == "request"] == ["/generate_stream"]

"""The guard: keys, hosts, origins, headers, bodies, admission, ids and the log's lines."""

import asyncio
import contextlib
import hmac
import io
import json
import logging
import socket
from typing import Any

import httpx
import pytest
from server_of import ask, engine_of, running, serving_of, within

from longwing.server import guard as guard_module
from longwing.server.access_log import JsonLines
from longwing.server.guard import OPEN_PATHS, Guard
from longwing.server.options import ServerOptions
from longwing.server.serving import Serving
from longwing.tokenizer import Tokenizer

KEY = "correct-horse-battery"
BODY = {"inputs": "H", "parameters": {"max_new_tokens": 1}}


@pytest.fixture(scope="module")
def locked(byte_tokenizer: Tokenizer) -> Serving:
    return serving_of(byte_tokenizer, api_keys=("another", KEY))


@pytest.fixture(scope="module")
def local(byte_tokenizer: Tokenizer) -> Serving:
    return serving_of(byte_tokenizer)


def test_without_a_key_every_route_but_health_is_closed(locked: Serving) -> None:
    app_paths = ask(locked, "/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    for path, methods in {**app_paths["paths"], "/openapi.json": {"get": {}}}.items():
        for method in methods:
            answer = ask(locked, path, {} if method == "post" else None, method.upper())
            assert (answer.status_code == 401) == (path not in OPEN_PATHS), path
            if answer.status_code == 401:
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "error" in answer.json()
    assert ask(locked, "/unknown").status_code == 401


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        ("Bearer another", 200),
        (f"Bearer {KEY.upper()}", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        ("Bearer ", 401),
        ("Bearer \xe9", 401),
    ],
)
def test_a_key_must_fit_exactly(locked: Serving, header: str, status: int) -> None:
    headers = {"Authorization": header.encode("latin-1")}
    assert ask(locked, "/generate", BODY, headers=headers).status_code == status


def test_every_key_is_compared_in_constant_time(
    locked: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By digests of one length, all of them, though the first fits."""
    seen: list[tuple[bytes, bytes]] = []
    equal = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        seen.append((left, right))
        return equal(left, right)

    monkeypatch.setattr(guard_module.hmac, "compare_digest", compare)
    for key in ("another", "wrong"):
        seen.clear()
        ask(locked, "/info", headers={"Authorization": f"Bearer {key}"})
        assert len(seen) == 2
        assert {len(side) for pair in seen for side in pair} == {32}


def test_prompts_are_salted_by_key_and_the_salt_is_not_the_key(locked: Serving) -> None:
    for key in (KEY, "another"):
        ask(locked, "/generate", BODY, headers={"Authorization": f"Bearer {key}"})
    one, other = (request.salt for request in engine_of(locked).seen[-2:])
    assert one
    assert one != other
    assert KEY not in one


def test_options_do_not_show_their_keys() -> None:
    assert KEY not in repr(ServerOptions(api_keys=(KEY,)))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8080", 200),
        ("127.0.0.1:9", 200),
        ("127.9.9.9", 200),
        ("[::1]:8080", 200),
        ("LOCALHOST", 200),
        ("mine.example", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example:127", 403),
        ("[::1", 403),
        ("a b", 403),
    ],
)
def test_a_local_server_answers_to_its_own_names(
    byte_tokenizer: Tokenizer, host: str, status: int
) -> None:
    serving = serving_of(byte_tokenizer, allowed_hosts=("mine.example",))
    assert ask(serving, "/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 200),
        ("http://LOCALHOST", 200),
        ("https://friend.example", 200),
        ("http://localhost:3000", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_pages_of_other_origins_may_not_ask(
    byte_tokenizer: Tokenizer, origin: str, status: int
) -> None:
    serving = serving_of(byte_tokenizer, cors_allow_origin=("https://friend.example",))
    answer = ask(serving, "/generate", BODY, headers={"Origin": origin})
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if "friend" in origin else None)


def test_a_browsers_preflight_needs_no_key_but_its_request_does(byte_tokenizer: Tokenizer) -> None:
    friend = "https://friend.example"
    serving = serving_of(byte_tokenizer, cors_allow_origin=(friend,), api_keys=(KEY,))
    asks = {"Origin": friend, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    preflight = ask(serving, "/generate", None, "OPTIONS", headers=asks)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == friend
    refused = ask(serving, "/generate", BODY, headers={"Origin": friend})
    assert refused.status_code == 401
    other = ask(serving, "/generate", None, "OPTIONS", headers={**asks, "Origin": "http://evil"})
    assert other.status_code == 400


def test_an_open_server_goes_by_any_name(byte_tokenizer: Tokenizer) -> None:
    serving = serving_of(byte_tokenizer, host="0.0.0.0")
    headers = {"Host": "anything.example", "Origin": "http://other.example"}
    assert ask(serving, "/generate", BODY, headers=headers).status_code == 200


def test_no_cross_origin_header_is_sent_unasked(local: Serving) -> None:
    assert not [name for name in ask(local, "/health").headers if name.startswith("access-")]


def test_headers_are_limited_in_number_and_size(local: Serving) -> None:
    many = {f"x-{n}": "1" for n in range(100)}
    for path in ("/generate", "/v1/completions"):
        assert ask(local, path, BODY, headers=many).status_code == 431
        assert ask(local, path, BODY, headers={"x": "y" * 65536}).status_code == 431
    assert ask(local, "/generate", BODY, headers={"x": "y" * 60000}).status_code == 200


def test_a_body_is_limited_as_announced_and_as_it_comes(byte_tokenizer: Tokenizer) -> None:
    serving = serving_of(byte_tokenizer, payload_limit=1000)
    long = b'{"inputs":"' + b"x" * 1000 + b'"}'

    async def trickle() -> Any:
        for place in range(0, len(long), 100):
            yield long[place : place + 100]

    kind = {"content-type": "application/json"}

    def in_parts(path: str) -> httpx.Response:
        return within(serving, lambda http: http.post(path, content=trickle(), headers=kind))

    for path, error in (("/generate", "payload_too_large"), ("/v1/completions", None)):
        announced = ask(serving, path, long)
        chunked = within(
            serving, lambda http, p=path: http.post(p, content=trickle(), headers=kind)
        )
        lying = ask(serving, path, b"{}", headers={"content-length": "9" * 5000})
        for answer in (announced, chunked, lying):
            assert answer.status_code == 413
            assert answer.json().get("error_type") == error


def test_a_body_that_does_not_come_is_not_waited_for(byte_tokenizer: Tokenizer) -> None:
    serving = serving_of(byte_tokenizer, body_timeout_s=0.01)
    never = asyncio.Event()

    async def stuck() -> Any:
        yield b'{"inputs":'
        await never.wait()

    kind = {"content-type": "application/json"}
    answer = within(serving, lambda http: http.post("/generate", content=stuck(), headers=kind))
    assert answer.status_code == 408
    assert answer.json()["error_type"] == "timeout"


def test_a_head_that_does_not_come_is_not_waited_for(byte_tokenizer: Tokenizer) -> None:
    with running(serving_of(byte_tokenizer, port=0, body_timeout_s=0.05)) as live:
        host, port = live.url.removeprefix("http://").split(":")
        for begun in (b"", b"POST /generate HTTP/1.1\r\nHost: loc"):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(begun)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(10) == b""  # closed, without a word
        assert httpx.get(live.url + "/health").status_code == 200


@pytest.mark.parametrize(("path", "status"), [("/generate", 429), ("/v1/completions", 503)])
def test_requests_beyond_the_limit_are_refused_at_once(
    byte_tokenizer: Tokenizer, path: str, status: int
) -> None:
    gate = asyncio.Event()
    serving = serving_of(
        byte_tokenizer, max_concurrent_requests=2, engine={"answer": lambda r, n: [gate.wait]}
    )

    async def main(http: httpx.AsyncClient) -> httpx.Response:
        at_work = [asyncio.create_task(http.post("/generate", json=BODY)) for _ in range(2)]
        while len(engine_of(serving).at_work) < 2:
            await asyncio.sleep(0)
        refused = await http.post(path, json={**BODY, "prompt": "x"})
        assert (await http.get("/health")).status_code == 200
        gate.set()
        await asyncio.gather(*at_work)
        return refused

    answer = within(serving, main)
    assert answer.status_code == status
    assert answer.headers["retry-after"] == "1"
    assert "error" in answer.json()
    assert 'tgi_request_failure{err="overloaded"} 1.0' in ask(serving, "/metrics").text
    assert ask(serving, "/tokenize", {"inputs": "x"}).status_code == 200  # places are given back


def test_a_request_keeps_its_id_if_that_is_harmless(local: Serving) -> None:
    assert (
        ask(local, "/health", headers={"X-Request-Id": "abc-1.2:3"}).headers["x-request-id"]
        == "abc-1.2:3"
    )
    for bad in ("a b", "x" * 65, 'a"b', "\xe9", ""):
        given = ask(local, "/health", headers={"X-Request-Id": bad.encode("latin-1")})
        assert given.headers["x-request-id"].isalnum()
        assert given.headers["x-request-id"] != bad


def log_of(serving: Serving, *calls: Any) -> list[dict[str, Any]]:
    """The lines that calls leave in the log."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("longwing")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        for call in calls:
            call(serving)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert stream.getvalue().isascii()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_the_log_has_a_line_a_request_without_its_texts(local: Serving) -> None:
    body = {"inputs": "secret words", "parameters": {"max_new_tokens": 3}}
    lines = log_of(
        local,
        lambda s: ask(s, "/generate", body, headers={"X-Request-Id": "mine"}),
        lambda s: ask(s, "/generate_stream", body),
        lambda s: ask(s, "/generate", {"inputs": 5}),
    )
    assert [line["status"] for line in lines] == [200, 200, 422]
    first = lines[0]
    assert (first["method"], first["path"], first["request_id"]) == ("POST", "/generate", "mine")
    assert (first["prompt_tokens"], first["generated_tokens"]) == (12, 3)
    assert first["seconds"] >= 0
    assert lines[1]["generated_tokens"] == 3
    assert "secret" not in json.dumps(lines)
    assert "sec" not in json.dumps(lines).replace("seconds", "")


def test_no_client_can_forge_a_line(local: Serving) -> None:
    evil = '/x%0a{"status":200}%1b[31m%e2%80%ae' + "y" * 500
    (line,) = log_of(local, lambda s: ask(s, evil))
    assert line["status"] == 404
    assert line["path"].startswith('/x\n{"status":200}\x1b[31m\u202e')
    assert len(line["path"]) == 200


def test_an_unforeseen_error_is_logged_by_its_place_and_not_its_text(
    byte_tokenizer: Tokenizer,
) -> None:
    def answer(request: Any, n: int) -> Any:
        raise RuntimeError("a secret prompt")

    serving = serving_of(byte_tokenizer, engine={"answer": answer})
    for path in ("/generate", "/generate_stream"):
        told, request = log_of(serving, lambda s, p=path: ask(s, p, BODY))
        assert told["error"] == "RuntimeError"
        assert told["request_id"] == request["request_id"]
        assert any("test_guard" in place for place in told["at"])
        assert "secret" not in json.dumps([told, request])


def test_what_is_not_http_passes() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Guard(app, ServerOptions())({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]

"""Who may act from the page, and what a request may say."""

import random
from pathlib import Path
from typing import Any

import pytest
from web_site import SERVED, Site, settled, until

from longwing.errors import ConfigError
from longwing.web.bodies import (
    DownloadName,
    LoadBody,
    Nothing,
    PlanBody,
    PromptBody,
    ReportBody,
    UnloadBody,
)
from longwing.web.options import WebOptions

ADMIN_GETS = ("/ui/api/models", "/ui/api/downloads", "/ui/api/evaluations")
ADMIN_POSTS = (
    "/ui/api/plan", "/ui/api/load", "/ui/api/load/cancel", "/ui/api/unload", "/ui/api/downloads",
    "/ui/api/downloads/cancel", "/ui/api/evaluations", "/ui/api/evaluations/x/cancel",
    "/ui/api/evaluations/x/resume", "/ui/api/evaluations/x/delete", "/ui/api/reports",
)  # fmt: skip


@pytest.mark.parametrize(
    ("server", "web", "mode"),
    [
        ({}, {}, "open"),
        ({"host": "::1"}, {}, "open"),
        ({"host": "0.0.0.0"}, {}, "off"),
        ({"api_keys": ("k",)}, {}, "off"),
        ({"allowed_hosts": ("example.org",)}, {}, "off"),
        ({"cors_allow_origin": ("*",)}, {}, "off"),
        ({}, {"admin_key": "a"}, "key"),
        ({"host": "0.0.0.0"}, {"admin_key": "a"}, "key"),
    ],
)
def test_who_may_act_follows_from_who_can_reach_the_server(
    shelf_folder: Path, tmp_path: Path, server: dict[str, Any], web: dict[str, Any], mode: str
) -> None:
    key = {"authorization": "Bearer k"} if "api_keys" in server else {}

    async def calls(http):
        session = (await http.get("/ui/api/session", headers=key)).json()
        refused = [await http.get(path, headers=key) for path in ADMIN_GETS]
        refused += [await http.post(path, json={}, headers=key) for path in ADMIN_POSTS]
        right = await http.get("/ui/api/downloads", headers={**key, "x-admin-key": "a"})
        wrong = await http.get("/ui/api/downloads", headers={**key, "x-admin-key": "A"})
        return session, refused, right, wrong

    session, answers, right, wrong = Site(shelf_folder, tmp_path, web=web, **server).run(calls)
    assert (session["admin"], session["admin_ok"]) == (mode, mode == "open")
    if mode == "open":
        assert {answer.status_code for answer in answers} & {401, 403} == set()
        return
    kind = {"key": "admin_key", "off": "admin_off"}[mode]
    assert {(a.status_code, a.json()["error_type"]) for a in answers} == {(403, kind)}
    assert right.status_code == (200 if mode == "key" else 403)
    assert wrong.status_code == 403
    if mode == "off":
        assert "--admin-key" in answers[0].json()["error"]


@pytest.mark.parametrize(
    ("server", "headers"),
    [
        ({}, {"origin": "https://evil.example"}),
        ({}, {"origin": "null"}),
        ({}, {"origin": "http://localhost.evil.example"}),
        ({}, {"origin": "http://localhost:8081"}),
        ({}, {"host": "evil.example"}),
        ({}, {"sec-fetch-site": "cross-site"}),
        ({}, {"sec-fetch-site": "same-site"}),
        ({"host": "0.0.0.0"}, {"origin": "https://evil.example"}),
        ({"cors_allow_origin": ("*",)}, {"origin": "https://evil.example"}),
    ],
)
def test_pages_from_elsewhere_reach_nothing(
    shelf_folder: Path, tmp_path: Path, server: dict[str, Any], headers: dict[str, str]
) -> None:
    async def calls(http):
        key = {**headers, "x-admin-key": "a"}
        return [
            await http.get("/ui/api/session", headers=key),
            await http.get("/ui/api/models", headers=key),
            await http.post("/ui/api/unload", json={}, headers=key),
            await http.post(
                "/ui/api/documents?name=a.txt",
                content=b"x",
                headers={**key, "content-type": "application/octet-stream"},
            ),
        ]

    site = Site(shelf_folder, tmp_path, web={"admin_key": "a"}, **server)
    assert [answer.status_code for answer in site.run(calls)] == [403] * 4
    assert site.engines[0].stopped_with == []


def test_the_servers_own_page_is_let_in(shelf_folder: Path, tmp_path: Path) -> None:
    own = {"origin": "http://localhost", "sec-fetch-site": "same-origin"}
    assert Site(shelf_folder, tmp_path).ask("/ui/api/models", headers=own).status_code == 200


def test_a_proxys_page_is_let_in_by_its_name(shelf_folder: Path, tmp_path: Path) -> None:
    site = Site(shelf_folder, tmp_path, web={"admin_key": "a"}, allowed_hosts=("example.org",))
    headers = {"origin": "https://example.org", "x-admin-key": "a"}
    assert site.ask("/ui/api/models", headers=headers).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_form_could_send_changes_nothing(
    shelf_folder: Path, tmp_path: Path, kind: str
) -> None:
    site = Site(shelf_folder, tmp_path)
    answer = site.ask(
        "/ui/api/unload", method="POST", content=b"{}", headers={"content-type": kind}
    )
    assert answer.status_code == 415
    assert site.engines[0].stopped_with == []


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("load", {"model": SERVED, "trust_remote_code": True}, "trust_remote_code: not to be set"),
        ("load", {"model": SERVED, "path": "/etc", "argv": []}, "path, argv: not to be set"),
        ("load", {"model": SERVED, "page_len": 8}, "page_len"),
        ("load", {}, "model: Field required"),
        ("load", [], "not a JSON object"),
        ("load", {"model": SERVED, "context": "many"}, "many"),
        ("load", {"model": SERVED, "context": 0}, "context"),
        ("load", {"model": SERVED, "context": True}, "context"),
        ("load", {"model": SERVED, "device": "cuda:0;rm"}, "device"),
        ("load", {"model": SERVED, "dtype": "int4"}, 'dtype "int4" is not one of'),
        ("load", {"model": SERVED, "kv_dtype": "int3"}, 'kv_dtype "int3" is not one of'),
        ("load", {"model": SERVED, "rope_method": "cubic"}, 'rope_method "cubic" is not one of'),
        ("load", {"model": SERVED, "rope": "dynamic", "rope_factor": 2}, "say the same twice"),
        ("load", {"model": SERVED, "rope_factor": "2"}, "rope_factor"),
        ("load", {"model": SERVED, "memory": "much"}, "much"),
        ("load", {"model": SERVED, "max_sequences": 10**6}, "max_sequences"),
        ("load", {"model": "x" * 600}, "model"),
        ("plan", {"model": SERVED, "batch": 0}, "batch"),
        ("unload", {"drain_s": -1}, "drain_s"),
        ("downloads", {"name": "../../etc"}, "not the name of a model"),
        ("downloads", {"name": "a/b", "endpoint": "http://10.0.0.1"}, "endpoint: not to be set"),
        ("downloads", {"name": "a/b", "dir": "/"}, "dir: not to be set"),
        ("downloads", {"name": "a/b", "include": ["../*"]}, "not a pattern"),
        ("downloads", {"name": "--help"}, "not the name of a model"),
        ("downloads", {"name": "http://127.0.0.1/a/b"}, "not the name of a model"),
        ("evaluations", {"tasks": ["passkey"], "data": "/etc/passwd"}, "data: not to be set"),
        ("evaluations", {"tasks": ["passkey"], "url": "http://10.0.0.1"}, "url: not to be set"),
        ("evaluations", {"tasks": ["perplexity"]}, "perplexity: not among"),
        ("evaluations", {"tasks": []}, "tasks"),
        ("evaluations", {"tasks": ["lines"], "lengths": [0]}, "lengths"),
        ("evaluations", {"tasks": ["lines"], "depths": [2]}, "depths"),
        ("evaluations", {"tasks": ["lines"], "name": "a\nb"}, "name"),
        ("reports", {"runs": []}, "runs"),
    ],
)
def test_what_the_page_may_not_set_is_refused_by_name(
    shelf_folder: Path, tmp_path: Path, path: str, body: Any, said: str
) -> None:
    answer = Site(shelf_folder, tmp_path).ask(f"/ui/api/{path}", body)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error_type"] in ("validation", "bad_request")
    assert answer.status_code == 400 or said in answer.json()["error"]


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[" * 300 + b"]" * 300, b"NaN"])
def test_what_is_not_json_is_refused(shelf_folder: Path, tmp_path: Path, raw: bytes) -> None:
    answer = Site(shelf_folder, tmp_path).ask(
        "/ui/api/load", method="POST", content=raw, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error_type"] == "bad_request"


def test_unknown_things_are_not_found(shelf_folder: Path, tmp_path: Path) -> None:
    async def calls(http):
        return [
            await http.get("/ui/api/nothing"),
            await http.post("/ui/api/load", json={"model": "../../etc"}),
            await http.post("/ui/api/plan", json={"model": "/etc"}),
            await http.get("/ui/api/evaluations/..%2f..%2fetc%2fpasswd"),
            await http.get("/ui/api/evaluations/nothing"),
            await http.post("/ui/api/evaluations/nothing/delete", json={}),
            await http.post("/ui/api/downloads/cancel", json={"name": "a/b"}),
            await http.post("/ui/api/reports", json={"runs": ["../x"]}),
        ]

    answers = Site(shelf_folder, tmp_path).run(calls)
    assert [answer.status_code for answer in answers] == [404] * 8
    assert all("etc" not in answer.text for answer in answers)


def test_an_admin_key_that_no_header_can_hold_is_refused() -> None:
    for key in ("", "clé", "a\nb"):
        with pytest.raises(ConfigError, match="admin key"):
            WebOptions(admin_key=key)
    assert "secret" not in repr(WebOptions(admin_key="secret"))


def test_no_body_is_a_fault_of_the_servers(shelf_folder: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [
        None, True, 0, -1, 1.5, 1e300, 2**70, "", "24k", "\0", "9" * 50, [], {}, ["passkey"], [0.5],
        "dynamic", "yarn,factor=4", "int8", "cuda:7", "100TB", "float16", "H200", "../..",
        [{"role": "user", "content": "hi"}],
    ]  # fmt: skip
    kinds = {
        "plan": PlanBody, "load": LoadBody, "unload": UnloadBody, "downloads/cancel": DownloadName,
        "reports": ReportBody, "prompt": PromptBody, "load/cancel": Nothing,
    }  # fmt: skip

    async def work(http):
        for _ in range(300):
            path, kind = rng.choice(list(kinds.items()))
            body = {name: rng.choice(values) for name in kind.model_fields if rng.random() < 0.3}
            if "model" in kind.model_fields:
                body["model"] = rng.choice([SERVED, "llama2", "cut"])
            answer = await http.post(f"/ui/api/{path}", json=body)
            assert answer.status_code < 500, (path, body, answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()) == {"error", "error_type"}
            elif answer.status_code == 202:
                await until(http, settled)

    Site(shelf_folder, tmp_path).run(work)

"""The page's files: where they are, what they may do, and that nothing else can be had."""

from pathlib import Path
from urllib.parse import quote

import pytest
from web_site import Site

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture
def site(shelf_folder: Path, tmp_path: Path) -> Site:
    return Site(shelf_folder, tmp_path)


@pytest.mark.parametrize("path", ["/ui", "/ui/", "/"])
def test_a_browser_finds_the_page(site: Site, path: str) -> None:
    answer = site.ask(path, headers=BROWSER)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "longwing" in answer.text


@pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
def test_other_clients_find_tgis_health_at_the_root(site: Site, accept: str) -> None:
    answer = site.ask("/", headers={"accept": accept})
    assert (answer.status_code, answer.content) == (200, b"")
    assert "content-security-policy" not in answer.headers


def test_tgis_compatible_route_still_takes_posts_at_the_root(site: Site) -> None:
    answer = site.ask("/", {"inputs": "Hi"}, headers=BROWSER)
    assert answer.status_code == 200
    assert answer.json()[0]["generated_text"] == "Hi"


@pytest.mark.parametrize("path", ["/ui", "/ui/parts/app.js"])
def test_every_file_may_reach_this_server_only(site: Site, path: str) -> None:
    headers = site.ask(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert {policy[k] for k in ("script-src", "connect-src", "style-src")} == {"'self'"}
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"


def test_a_file_that_is_known_is_not_sent_again(site: Site) -> None:
    async def twice(http):
        first = await http.get("/ui/parts/app.js")
        tags = {"if-none-match": f'W/"other", {first.headers["etag"]}'}
        return first, await http.get("/ui/parts/app.js", headers=tags)

    first, second = site.run(twice)
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    assert (second.status_code, second.content) == (304, b"")
    assert second.headers["etag"] == first.headers["etag"]


@pytest.mark.parametrize(
    "path",
    [
        "/ui/../outside.txt",
        "/ui/%2e%2e/outside.txt",
        "/ui/..%2foutside.txt",
        "/ui/parts/..%2f..%2foutside.txt",
        "/ui//etc/passwd",
        "/ui/%2fetc%2fpasswd",
        "/ui/parts",
        "/ui/parts/",
        "/ui/secret.py",
        "/ui/index.html%00.js",
        "/ui/nothing.js",
        "/ui/report/" + "a" * 32,
        "/ui/report/../../etc/passwd",
        "/ui/" + quote("\\..\\outside.txt"),
    ],
)
def test_no_other_file_can_be_had(site: Site, path: str) -> None:
    answer = site.ask(path)
    assert answer.status_code == 404
    assert "not yours" not in answer.text


def test_with_api_keys_the_page_is_open_and_all_else_is_not(
    shelf_folder: Path, tmp_path: Path
) -> None:
    async def calls(http):
        opened = [
            await http.get(path, headers=BROWSER) for path in ("/ui", "/", "/ui/parts/app.js")
        ]
        paths = ("/", "/ui/api/session", "/ui/api/state", "/ui/api/models", "/ui/none.js", "/info")
        closed = [await http.get(path) for path in paths]
        closed.append(await http.post("/ui", json={}))
        key = {"authorization": "Bearer k1"}
        return opened, closed, await http.get("/ui/api/session", headers=key)

    opened, closed, session = Site(shelf_folder, tmp_path, api_keys=("k1",)).run(calls)
    assert [answer.status_code for answer in opened] == [200] * 3
    assert [answer.status_code for answer in closed] == [401] * 7
    assert session.json()["admin"] == "off"


def test_the_page_cannot_be_posted_to(site: Site) -> None:
    assert site.ask("/ui", {}).status_code == 405


def test_reports_hold_for_a_while_and_may_do_nothing() -> None:
    from longwing.web.reports import LIFE_S, MAX_KEPT, Reports

    now = [0.0]
    reports = Reports(lambda: now[0])
    ticket = reports.add("<p>report</p>").removeprefix("/ui/report/")
    answer = reports.response(ticket)
    assert answer.body == b"<p>report</p>"
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert answer.headers["cache-control"] == "no-store"
    now[0] = LIFE_S + 1
    assert reports.response(ticket).status_code == 404
    tickets = [reports.add(str(n)) for n in range(MAX_KEPT + 1)]
    kept = [reports.response(t.removeprefix("/ui/report/")).status_code for t in tickets]
    assert kept == [404] + [200] * MAX_KEPT

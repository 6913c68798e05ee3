"""Evaluations from the page: what is listed, and a real run against the real server."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from web_live import LiveSite
from web_site import Site

from longwing.errors import EvalError
from longwing.web.bodies import RunBody
from longwing.web.records import Asked, Records
from longwing.web.runs import Runs, cells

HEADER = {
    "kind": "run",
    "model": {"name": "tiny"},
    "plan": {"tasks": ["passkey"], "lengths": [100, 200], "depths": [0, 1]},
    "begun": "2026-01-01T00:00:00Z",
}


def case(size: int, depth: float | None, correct: bool | None, **more: Any) -> dict[str, Any]:
    return {
        "kind": "case", "task": "passkey", "source": "generated", "unit": "tokens", "size": size,
        "index": 0, "depth": depth, "sha256": "", "expected": ["1"], "answer": "1",
        "correct": correct, "score": None if correct is None else float(correct),
        "prompt_tokens": size, "seconds": 1.0, **more,
    }  # fmt: skip


def write(folder: Path, run_id: str, *records: Any) -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{run_id}.jsonl").write_text(text)


def test_records_become_a_heat_map(tmp_path: Path) -> None:
    records = [
        case(100, 0.0, True), case(100, 0.0, False), case(100, 1.0, True), case(200, None, True),
        {"kind": "cell", "task": "passkey", "source": "generated", "unit": "tokens", "size": 900,
         "cases": 7, "needs": 900},
        case(200, 1.0, None, needs=300),
    ]  # fmt: skip
    found = cells(records)
    place = {"task": "passkey", "unit": "tokens", "size": 100}
    assert found["cells"] == [
        {**place, "depth": 0.0, "cases": 2, "correct": 1, "score": 0.5},
        {**place, "depth": 1.0, "cases": 1, "correct": 1, "score": 1.0},
    ]
    assert found["too_long"] == [
        {**place, "size": 200, "cases": 1}, {**place, "size": 900, "cases": 7}
    ]  # fmt: skip
    assert found["latest"]["depth"] == 1.0


def test_earlier_runs_are_listed_and_reported(shelf_folder: Path, tmp_path: Path) -> None:
    site = Site(shelf_folder, tmp_path)
    write(site.runs_dir, "good", HEADER, case(100, 0.0, True), case(100, 1.0, False))
    write(site.runs_dir, "other", {**HEADER, "model": {"name": "<b>big"}}, case(100, 0.0, True))
    write(site.runs_dir, "foreign", {"kind": "diary"})
    write(site.runs_dir, ".hidden", HEADER)
    write(site.runs_dir, "bad name", HEADER)
    (site.runs_dir / "folder.jsonl").mkdir()

    async def work(http):
        listed = (await http.get("/ui/api/evaluations")).json()
        one = (await http.get("/ui/api/evaluations/good")).json()
        foreign = await http.get("/ui/api/evaluations/foreign")
        report = (await http.post("/ui/api/reports", json={"runs": ["good", "other"]})).json()
        page = await http.get(report["url"])
        refused = await http.post("/ui/api/reports", json={"runs": ["foreign"]})
        resumed = await http.post("/ui/api/evaluations/good/resume", json={})
        idle = await http.post("/ui/api/evaluations/good/cancel", json={})
        deleted = await http.post("/ui/api/evaluations/good/delete", json={})
        gone = await http.get("/ui/api/evaluations/good")
        return listed, one, foreign, page, refused, resumed, idle, deleted, gone

    listed, one, foreign, page, refused, resumed, idle, deleted, gone = site.run(work)
    assert {run["id"]: run["state"] for run in listed["runs"]} == {
        "good": "done", "other": "done", "foreign": "failed"
    }  # fmt: skip
    assert (one["name"], one["accuracy"], one["lengths"]) == ("tiny", 0.5, [100, 200])
    assert one["rows"][0]["accuracy"] == 0.5
    assert not one["can_resume"]
    assert "foreign.jsonl, line 1: not the record" in foreign.json()["error"]
    assert str(tmp_path) not in foreign.text
    assert "&lt;b&gt;big" in page.text
    assert "<b>big" not in page.text
    assert page.headers["content-security-policy"].startswith("sandbox;")
    assert (refused.status_code, resumed.status_code, idle.status_code) == (422, 422, 409)
    assert (deleted.status_code, gone.status_code) == (200, 404)
    assert not (site.runs_dir / "good.jsonl").exists()


def test_a_record_is_read_again_when_it_grows(tmp_path: Path) -> None:
    runs = Runs(Records(tmp_path))
    write(tmp_path, "one", HEADER)
    assert runs.summary("one")["cases_done"] == 0
    write(tmp_path, "one", HEADER, case(100, 0.0, True))
    assert runs.summary("one")["cases_done"] == 1
    with (tmp_path / "one.jsonl").open("a") as file:
        file.write('{"kind": "case", "half')
    assert runs.summary("one")["cases_done"] == 1


@pytest.mark.parametrize("raw", ["", "{", "[]", '{"tasks": 1}', '{"evil": 1}', "null"])
def test_a_broken_note_of_what_was_asked_is_passed_over(tmp_path: Path, raw: str) -> None:
    (tmp_path / "one.json").write_text(raw)
    records = Records(tmp_path)
    assert records.asked("one") is None
    assert Runs(records).summary("one")["state"] == "stopped"


def test_what_is_asked_is_the_command_line_of_longwing_eval(tmp_path: Path) -> None:
    body = RunBody(
        tasks=["lines", "passkey", "lines"], lengths=["1k", 512], depths=[1, 0.5], cases=2,
        template="plain", name=" --out=/etc/x ",
    )  # fmt: skip
    asked = Asked.from_body(body)
    assert asked.arguments("http://here", Path("o.jsonl")) == [
        "eval", "--url=http://here", "--tasks=lines,passkey", "--lengths=512,1024",
        "--depths=0.5,1", "--cases=2", "--seed=0", "--template=plain", "--concurrency=1",
        "--name=--out=/etc/x", "--out=o.jsonl",
    ]  # fmt: skip
    records = Records(tmp_path / "new")
    first, second = records.begin(asked), records.begin(asked)
    assert first != second
    assert records.asked(first) == asked
    with pytest.raises(EvalError, match="has no finished case"):
        records.read_all([first])


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = Asked.from_body(RunBody(tasks=["lines"]))
    with pytest.raises(EvalError, match="cannot be written"):
        Records(tmp_path / "file" / "runs").begin(asked)


@pytest.mark.slow
def test_an_evaluation_runs_against_the_server_stops_and_goes_on(
    shelf_folder: Path, tmp_path: Path
) -> None:
    with LiveSite(shelf_folder, tmp_path, api_keys=("k1",), web={"admin_key": "a"}) as live:
        headers = {"authorization": "Bearer k1", "x-admin-key": "a"}
        body = {
            "tasks": ["passkey"], "lengths": [500, 600, 9000], "depths": [0, 1], "cases": 3,
            "template": "plain", "name": "tiny",
        }  # fmt: skip

        async def work(http):
            begun = await http.post("/ui/api/evaluations", json=body)
            run_id = begun.json()["id"]
            path = f"/ui/api/evaluations/{run_id}"
            busy = await http.post("/ui/api/evaluations", json=body)
            locked = await http.post(f"{path}/delete", json={})
            exchange = await http.post("/ui/api/load", json={"model": "llama2"})
            end = await http.post("/ui/api/unload", json={})
            early = (await http.post(f"{path}/cancel", json={})).json()
            again = await http.post(f"{path}/resume", json={})
            while (found := (await http.get(path)).json())["state"] == "running":
                await asyncio.sleep(0.1)
            refused = [busy, locked, exchange, end]
            return begun, refused, early, again, found

        begun, refused, early, again, found = live.run(work, headers=headers)
    assert begun.status_code == 202
    assert [answer.status_code for answer in refused] == [409] * 4
    assert early["state"] == "stopped"
    assert again.status_code == 202
    assert (found["state"], found["error"]) == ("done", None)
    assert (found["cases_done"], found["cases_total"]) == (9, 9)
    assert found["too_long"] == [{"task": "passkey", "unit": "tokens", "size": 9000, "cases": 3}]
    assert {(cell["size"], cell["depth"]) for cell in found["cells"]} == {
        (500, 0.0), (500, 1.0), (600, 0.0), (600, 1.0)
    }  # fmt: skip
    assert f"--url={live.url}" in found["command"]
    assert "k1" not in found["command"]
    assert os.listdir(live.runs_dir)

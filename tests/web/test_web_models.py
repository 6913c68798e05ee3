"""Models: what is listed, what a plan says, and the exchange of one engine for another."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from scripted import ScriptedEngine
from web_site import SERVED, Site, settled, until

from longwing.errors import CapacityError
from longwing.web import machine
from longwing.web.bodies import LoadBody
from longwing.web.settings import rope_words, shown

OTHER = "llama2"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; a machine without GPUs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(machine, "_ASK", ("no-such-program",))
    return tmp_path / "hub"


@pytest.fixture
def site(shelf_folder: Path, tmp_path: Path) -> Site:
    return Site(shelf_folder, tmp_path)


def listed(answer: Any) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in answer.json()["models"]}


def test_every_model_is_listed_with_what_it_is_or_why_it_is_not_loadable(site: Site) -> None:
    answer = site.ask("/ui/api/models")
    models = listed(answer)
    assert set(models) == {SERVED, OTHER, "cut", "mute", "strange"}
    falcon = models[SERVED]
    assert (falcon["loadable"], falcon["loaded"], falcon["why_not"]) == (True, True, None)
    assert (falcon["architecture"], falcon["layers"], falcon["context"]) == ("falcon", 2, 256)
    assert falcon["parameters"] > 1000
    assert falcon["bytes"] > 4 * falcon["parameters"]
    assert not models[OTHER]["loaded"]
    assert not models["cut"]["loadable"]
    assert "model.safetensors" in models["cut"]["why_not"]
    assert models["cut"]["layers"] is None
    assert "unheard" in models["strange"]["why_not"]


def test_no_answer_says_where_models_lie(site: Site, shelf_folder: Path) -> None:
    async def calls(http):
        answers = [await http.get("/ui/api/models"), await http.get("/ui/api/state")]
        for model in (SERVED, "cut", "mute", "strange"):
            answers.append(await http.post("/ui/api/plan", json={"model": model}))
            answers.append(await http.post("/ui/api/load", json={"model": model, "context": 64}))
            await until(http, settled)
        return answers

    for answer in site.run(calls):
        assert str(shelf_folder) not in answer.text


def test_the_hubs_cache_is_listed_by_name_and_commit(
    site: Site, hub_cache: Path, shelf_folder: Path
) -> None:
    home = hub_cache / "models--nest--wing"
    whole, old = "a" * 40, "b" * 40
    shutil.copytree(shelf_folder / OTHER, home / "snapshots" / whole)
    shutil.copytree(shelf_folder / SERVED, home / "snapshots" / old)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(whole)
    half = hub_cache / "models--nest--half" / "snapshots" / whole
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    begun = hub_cache / "models--nest--begun" / "blobs"
    begun.mkdir(parents=True)
    (begun / "0123.partial").write_bytes(b"x" * 10)
    models = listed(site.ask("/ui/api/models"))
    assert models["nest/wing"]["loadable"]
    assert models["nest/wing"]["place"] == "hub"
    assert models[f"nest/wing@{old}"]["revision"] == old
    for name in (f"nest/half@{whole}", "nest/begun"):
        assert (models[name]["loadable"], models[name]["resumable"]) == (False, True)
    assert models["nest/begun"]["bytes"] == 10


def test_a_folder_is_read_again_when_it_changes(shelf_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(shelf_folder, root)

    async def calls(http):
        before = listed(await http.get("/ui/api/models"))
        shutil.copytree(root / OTHER, root / "new")
        (root / OTHER / "config.json").unlink()
        shutil.rmtree(root / "cut")
        shutil.copytree(root / SERVED, root / "cut")
        return before, listed(await http.get("/ui/api/models"))

    before, after = Site(root, tmp_path).run(calls)
    assert "new" not in before
    assert after["new"]["loadable"]
    assert OTHER not in after
    assert after["cut"]["loadable"]


def test_a_plan_is_the_command_lines_plan(site: Site) -> None:
    body = {"model": SERVED, "context": "1k", "kv_dtype": "int8", "memory": "2GiB", "batch": 2}
    plan = site.ask("/ui/api/plan", body).json()
    assert (plan["context"], plan["kv_dtype"], plan["batch"]) == (1024, "int8", 2)
    assert (plan["memory_bytes"], plan["memory_source"]) == (2 << 30, "given")
    assert plan["kv_bytes"] == plan["kv_bytes_per_token"] * 1024 * 2
    assert plan["fits"]
    assert plan["longest_context"] > 1024
    assert plan["beyond_claim"]
    assert plan["rows"][0][0] == "context"


def test_a_plan_without_memory_takes_this_machines(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def calls(http):
        body = {"model": SERVED, "rope_method": "dynamic", "rope_factor": 2.0}
        on_host = (await http.post("/ui/api/plan", json=body)).json()
        said = 'printf "A card, with a comma, 1000\\nOther, 2000\\n"'
        monkeypatch.setattr(machine, "_ASK", ("sh", "-c", said))
        body["device"] = "cuda:1"
        on_card = (await http.post("/ui/api/plan", json=body)).json()
        cards = (await http.get("/ui/api/session")).json()["options"]["cards"]
        named = (await http.post("/ui/api/plan", json={**body, "card": "H200"})).json()
        assert named["memory_bytes"] == cards["H200"]
        unknown = await http.post("/ui/api/plan", json={**body, "card": "Voodoo 2"})
        return on_host, on_card, named, unknown

    host, card, named, unknown = site.run(calls)
    assert host["memory_source"] == "host"
    assert host["memory_bytes"] > 1 << 28
    assert (host["rope"], host["rope_max_len"]) == ("dynamic,factor=2", 512)
    assert (card["memory_source"], card["memory_name"]) == ("gpu", "Other")
    assert (named["memory_source"], named["memory_name"]) == ("card", "H200")
    assert unknown.status_code == 422
    assert "H200" in unknown.json()["error"]
    assert card["memory_bytes"] == int(machine.GPU_SHARE * 2000 * 2**20)


def test_a_model_is_loaded_with_the_options_that_were_asked_for(site: Site) -> None:
    body = {
        "model": OTHER, "context": "128", "rope_method": "dynamic", "rope_factor": 2,
        "memory": None, "kv_dtype": "int8", "max_sequences": 4, "prefix_cache": False,
    }  # fmt: skip

    async def work(http):
        began = await http.post("/ui/api/load", json=body)
        state = await until(http, settled)
        info = (await http.get("/info")).json()
        text = (await http.post("/generate", json={"inputs": "Hi"})).json()
        health = await http.get("/health")
        return began, state, info, text, health

    began, state, info, text, health = site.run(work)
    assert (began.status_code, began.json()["loading"]["name"]) == (202, OTHER)
    assert (state["status"], state["loading"]) == ("ready", None)
    model = state["model"]
    assert (model["id"], model["rope"], model["context"]) == (OTHER, "dynamic,factor=2", 128)
    options = {"context": 128, "rope": "dynamic,factor=2", "kv_dtype": "int8", "max_sequences": 4}
    assert model["options"] == {**options, "prefix_cache": False}
    assert (info["model_id"], info["max_total_tokens"]) == (OTHER, 128)
    assert text == {"generated_text": "Hi"}
    assert health.status_code == 200
    old, new = site.engines
    assert (old.status, new.options.kv_dtype) == ("dead", "int8")
    assert not new.options.prefix_cache


def test_what_is_shown_of_a_model_loads_it_again(site: Site) -> None:
    async def work(http):
        body = {"model": OTHER, "context": 64, "rope_theta": 5e5, "num_pages": 9}
        await http.post("/ui/api/load", json=body)
        first = (await until(http, settled))["model"]
        await http.post("/ui/api/load", json={"model": first["id"], **first["options"]})
        return first, (await until(http, settled))["model"]

    first, second = site.run(work)
    assert first == second
    assert first["rope"] == "theta=500000"
    assert site.engines[1].options == site.engines[2].options


@pytest.mark.parametrize("model", ["cut", "mute", "strange"])
def test_a_folder_at_fault_is_refused_while_the_old_model_goes_on(site: Site, model: str) -> None:
    async def work(http):
        refused = await http.post("/ui/api/load", json={"model": model})
        return refused, (await http.get("/ui/api/state")).json()

    refused, state = site.run(work)
    assert refused.status_code == 422
    assert (state["status"], state["loading"]) == ("ready", None)
    assert len(site.engines) == 1


def test_a_load_that_fails_is_told_and_the_old_model_can_be_loaded_again(site: Site) -> None:
    async def work(http):
        site.load_error = CapacityError("4 GiB are needed, 1 GiB is free; use fewer bits")
        await http.post("/ui/api/load", json={"model": OTHER})
        failed = await until(http, settled)
        health = await http.get("/health")
        refused = await http.post("/v1/completions", json={"model": SERVED, "prompt": "Hi"})
        site.load_error = None
        former = failed["model"]
        await http.post("/ui/api/load", json={"model": former["id"], **former["options"]})
        return failed, health, refused, await until(http, settled)

    failed, health, refused, again = site.run(work)
    assert failed["status"] == "dead"
    assert failed["loading"]["phase"] == "failed"
    assert failed["loading"]["error"].endswith("use fewer bits")
    assert failed["model"]["id"] == SERVED
    assert health.status_code == refused.status_code == 503
    assert "the engine is dead" in refused.json()["error"]["message"]
    assert (again["status"], again["loading"], again["model"]["id"]) == ("ready", None, SERVED)


def test_a_fault_nobody_foresaw_is_told_without_its_text(site: Site) -> None:
    async def work(http):
        site.load_error = RuntimeError("/secret/place")
        await http.post("/ui/api/load", json={"model": OTHER})
        return await until(http, settled)

    loading = site.run(work)["loading"]
    assert loading["phase"] == "failed"
    assert "secret" not in loading["error"]


def test_requests_at_work_end_well_before_the_exchange_and_later_ones_are_refused(
    site: Site,
) -> None:
    gate = asyncio.Event()

    def slowly(request, n):
        return engine.say(request, [*request.prompt_ids, 256], gate=gate.wait)

    site.answer = slowly
    engine: ScriptedEngine

    async def work(http):
        nonlocal engine
        engine = site.engines[0]
        asked = asyncio.ensure_future(http.post("/generate", json={"inputs": "Hi"}))
        while not engine.at_work:
            await asyncio.sleep(0)
        site.answer = None
        await http.post("/ui/api/load", json={"model": OTHER, "drain_s": 20})
        draining = await until(http, lambda state: state["status"] == "draining")
        late = await http.post("/generate", json={"inputs": "Hi"})
        busy = await http.post("/ui/api/load", json={"model": OTHER})
        gate.set()
        answer = await asked
        return draining, late, busy, answer, await until(http, settled)

    draining, late, busy, answer, state = site.run(work)
    assert draining["loading"]["phase"] == "draining"
    assert draining["loading"]["open_requests"] == 1
    assert (late.status_code, late.json()["error_type"]) == (503, "unavailable")
    assert (busy.status_code, busy.json()["error_type"]) == (409, "conflict")
    assert answer.json() == {"generated_text": "Hi"}
    assert (state["status"], state["model"]["id"]) == ("ready", OTHER)
    assert site.engines[0].reasons == ["the model is being exchanged for another"]


def test_what_is_not_done_when_draining_ends_gets_an_error_in_words(site: Site) -> None:
    gate = asyncio.Event()
    site.answer = lambda request, n: site.engines[0].say(request, [72], gate=gate.wait)

    async def work(http):
        asked = asyncio.ensure_future(http.post("/generate", json={"inputs": "Hi"}))
        while not site.engines[0].at_work:
            await asyncio.sleep(0)
        site.answer = None
        await http.post("/ui/api/load", json={"model": OTHER, "drain_s": 0})
        return await asked, await until(http, settled)

    answer, state = site.run(work)
    assert answer.status_code == 503
    assert set(answer.json()) == {"error", "error_type"}
    assert state["model"]["id"] == OTHER


@pytest.mark.parametrize("at_once", [True, False])
def test_a_load_cancelled_while_draining_leaves_the_old_model_at_work(
    site: Site, at_once: bool
) -> None:
    gate = asyncio.Event()
    site.answer = lambda request, n: site.engines[0].say(
        request, request.prompt_ids, gate=gate.wait
    )

    async def work(http):
        body = {"inputs": "Hi", "parameters": {"max_new_tokens": 2}}
        asked = asyncio.ensure_future(http.post("/generate", json=body))
        while not site.engines[0].at_work:
            await asyncio.sleep(0)
        await http.post("/ui/api/load", json={"model": OTHER})
        if not at_once:
            await until(http, lambda state: state["status"] == "draining")
        cancelled = await http.post("/ui/api/load/cancel", json={})
        gate.set()
        none = await http.post("/ui/api/load/cancel", json={})
        return cancelled, none, await asked, (await http.get("/ui/api/state")).json()

    cancelled, none, answer, state = site.run(work)
    assert cancelled.json()["loading"]["phase"] == "cancelled"
    assert none.status_code == 409
    assert answer.json() == {"generated_text": "Hi"}
    assert (state["status"], state["loading"], state["model"]["id"]) == ("ready", None, SERVED)
    assert len(site.engines) == 1


def test_a_load_cancelled_later_leaves_a_state_from_which_any_model_can_be_loaded(
    site: Site,
) -> None:
    async def work(http):
        site.load_gate = asyncio.Event()
        await http.post("/ui/api/load", json={"model": OTHER})
        under_way = await until(http, lambda state: state["loading"]["phase"] == "loading")
        await http.post("/ui/api/load/cancel", json={})
        cancelled = (await http.get("/ui/api/state")).json()
        site.load_gate = None
        await http.post("/ui/api/load", json={"model": OTHER})
        return under_way, cancelled, await until(http, settled)

    under_way, cancelled, state = site.run(work)
    assert (under_way["loading"]["done_bytes"], under_way["loading"]["total_bytes"]) == (50, 100)
    assert (cancelled["status"], cancelled["loading"]["phase"]) == ("dead", "cancelled")
    assert (state["status"], state["model"]["id"]) == ("ready", OTHER)
    assert site.engines[1].status == "dead"


def test_a_model_can_be_unloaded_and_come_back(site: Site) -> None:
    async def work(http):
        ended = await http.post("/ui/api/unload", json={"drain_s": 0})
        state = await until(http, settled)
        models = listed(await http.get("/ui/api/models"))
        await http.post("/ui/api/load", json={"model": SERVED})
        return ended, state, models, await until(http, settled)

    ended, state, models, back = site.run(work)
    assert ended.status_code == 202
    assert (state["status"], state["loading"]["phase"]) == ("dead", "unloaded")
    assert not models[SERVED]["loaded"]
    assert (back["status"], back["loading"]) == ("ready", None)


def test_the_servers_end_stops_a_load(site: Site) -> None:
    async def work(http):
        site.load_gate = asyncio.Event()
        await http.post("/ui/api/load", json={"model": OTHER})
        await until(http, lambda state: state["loading"]["phase"] == "loading")
        await site.web.settle()
        late = await http.post("/ui/api/load", json={"model": OTHER})
        return late, (await http.get("/ui/api/state")).json()

    late, state = site.run(work)
    assert state["loading"]["phase"] == "cancelled"
    assert site.engines[1].status == "dead"
    assert "shutting down" in late.json()["error"]


def test_the_operators_limits_hold_for_every_model(shelf_folder: Path, tmp_path: Path) -> None:
    site = Site(
        shelf_folder, tmp_path, engine={"memory": 2 << 30, "context": 200, "num_pages": 50},
        max_total_tokens=200, max_input_length=150,
    )  # fmt: skip

    async def work(http):
        long = await http.post("/ui/api/load", json={"model": OTHER, "context": 201})
        much = await http.post("/ui/api/load", json={"model": OTHER, "memory": "3GiB"})
        await http.post("/ui/api/load", json={"model": OTHER, "context": 100, "memory": "1GiB"})
        return long, much, (await until(http, settled))["model"]

    long, much, model = site.run(work)
    assert (long.status_code, much.status_code) == (422, 422)
    assert "--max-total-tokens" in long.json()["error"]
    assert "--memory" in much.json()["error"]
    assert (model["max_total_len"], model["max_input_len"]) == (100, 99)
    options = site.engines[1].options
    assert (options.memory, options.num_pages) == (1 << 30, None)


def test_rope_in_parts_is_rope_in_words() -> None:
    body = LoadBody(model="m", rope_method="falconlite", rope_alpha=0.25)
    assert rope_words(body) == "falconlite,alpha=0.25"
    assert rope_words(LoadBody(model="m", rope_theta=1e6)) == "theta=1000000"
    assert rope_words(LoadBody(model="m", rope="dynamic,factor=4")) == "dynamic,factor=4"
    assert rope_words(LoadBody(model="m")) is None


def test_metrics_count_the_engine_that_serves(site: Site) -> None:
    async def work(http):
        await http.post("/ui/api/load", json={"model": OTHER})
        await until(http, settled)
        await http.post("/generate", json={"inputs": "Hi"})
        return (await http.get("/metrics")).text

    metrics = site.run(work)
    assert "tgi_request_success 1.0" in metrics
    assert "longwing_pages_used" in metrics
    assert shown(site.engines[1].options) == {}

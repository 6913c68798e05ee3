"""The exchange of real engines while requests run, over real HTTP."""

import asyncio
import json
from pathlib import Path

import pytest
from web_live import LiveSite

from longwing.engine.generator import load

BODY = {"inputs": "Hello", "parameters": {"max_new_tokens": 60}}


@pytest.mark.slow
def test_models_are_exchanged_under_load_and_every_request_ends_well_or_in_words(
    shelf_folder: Path, tmp_path: Path
) -> None:
    with LiveSite(shelf_folder, tmp_path) as live:

        async def one(http):
            answer = await http.post("/generate", json=BODY)
            return answer.status_code, answer.json()

        async def stream(http):
            events = []
            async with http.stream("POST", "/generate_stream", json=BODY) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        events.append(json.loads(line.removeprefix("data:")))
            return events[-1] if events else {"error": answer.status_code}

        async def until_ready(http):
            while (state := (await http.get("/ui/api/state")).json())["loading"] is not None:
                assert state["loading"]["phase"] in ("draining", "loading"), state
                await asyncio.sleep(0.02)
            return state

        async def work(http):
            plain, streamed, texts = [], [], {}
            for name in ("llama2", "falcon-40b", "llama2"):
                plain += [asyncio.ensure_future(one(http)) for _ in range(4)]
                streamed += [asyncio.ensure_future(stream(http)) for _ in range(2)]
                await asyncio.sleep(0)
                body = {"model": name, "context": 200, "drain_s": 15}
                assert (await http.post("/ui/api/load", json=body)).status_code == 202
                plain += [asyncio.ensure_future(one(http)) for _ in range(4)]
                state = await until_ready(http)
                assert (state["status"], state["model"]["id"]) == ("ready", name)
                texts[name] = (await one(http))[1]["generated_text"]
            return await asyncio.gather(*plain), await asyncio.gather(*streamed), texts

        plain, streamed, texts = live.run(work)
    for name, text in texts.items():
        model = load(shelf_folder / name)
        ids = model.tokenizer.encode("Hello", special_tokens=True)
        assert text == model.generate(ids, max_new_tokens=60).text
    for status, body in plain:
        assert (status, set(body)) in ((200, {"generated_text"}), (503, {"error", "error_type"}))
        assert status == 503 or body["generated_text"] in texts.values()
    assert sum(status == 200 for status, _ in plain) >= 4
    assert all("generated_text" in event or "error" in event for event in streamed)

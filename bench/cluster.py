"""A Ray cluster under load: replicas killed, added and taken away, and who reads which document.

    python bench/cluster.py [--only PART…] [--requests N] [--out FILE]

Starts two Ray nodes on this machine and deploys a small random Falcon through `longwing.cluster`,
then asks over HTTP, a third of the requests streaming:

    kill       two replicas; one is killed while requests are at work in both
    scale      one replica, then three, then one again, under load
    affinity   documents, several questions each, one after another from many clients; a request
               found its document if the engine had most of it in its prefix cache
    eval       an evaluation's cases over two workers, one of which is killed (spread.py)
    quantize   calibration samples over two workers

Every answer is compared with the one given at rest. `lost`: no answer, or a wrong one, of a request
that had not begun to stream. `cut`: streams that had begun and ended with an error in words.
Needs the extra `cluster`.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx2
import ray
import spread
from ray import serve
from ray.cluster_utils import Cluster
from transformers import FalconConfig

from longwing.cluster.deploy import connect, deploy
from longwing.cluster.manifest import Deployment
from longwing.cluster.options import DeployOptions
from longwing.engine.options import EngineOptions
from longwing.server.options import ServerOptions
from tiny import COMMON, save_model, write_tokenizer

PORT = 8193
NAME = "longwing"
PARTS = ("kill", "scale", "affinity", "eval", "quantize")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=300, help="in each part")
    parser.add_argument("--clients", type=int, default=12, help="requests at work at once")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, help="append the figures to this JSONL file")
    arguments = parser.parse_args()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "include_dashboard": False, "object_store_memory": 2**27},
    )
    cluster.add_node(num_cpus=4, object_store_memory=2**27)
    folder = tempfile.TemporaryDirectory()
    bench = Bench(_model(Path(folder.name)), arguments.clients)
    connect(cluster.address, bench.size(1), bench.server)
    rows = []
    try:
        for part in arguments.only:
            row = {"part": part, **asyncio.run(getattr(bench, part)(arguments.requests))}
            rows.append(row)
            print(json.dumps(row), flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
        folder.cleanup()
    if arguments.out:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        about = {
            "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "commit": commit,
            "command": " ".join(["python", *sys.argv]),
            "ray": ray.__version__,
        }
        with arguments.out.open("a") as file:
            file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)


class Bench:
    """One cluster, one model, many requests."""

    def __init__(self, model: Path, clients: int) -> None:
        self.model = model
        self.clients = clients
        self.server = ServerOptions(port=PORT, drain_s=30.0, max_concurrent_requests=512)
        self.answers: dict[str, str] = {}
        self.dice = random.Random(0)

    def size(self, replicas: int) -> DeployOptions:
        return DeployOptions(replicas=replicas, proxies="head", cpus=1)

    async def deploy(self, replicas: int) -> None:
        what = Deployment(
            name=NAME,
            folder=self.model,
            model_id="bench",
            engine=EngineOptions(device="cpu", dtype="float32", cache_tokens=2**17, max_draft=0),
            server=self.server,
            size=self.size(replicas),
        )
        await asyncio.to_thread(deploy, what)

    async def kill(self, requests: int) -> dict[str, Any]:
        """One of two replicas dies a third of the way."""
        await self.deploy(2)
        return await self._load(requests, {requests // 3: self._kill_one})

    async def scale(self, requests: int) -> dict[str, Any]:
        """1, 3, 1 replicas; the load goes on until the last change is done."""
        await self.deploy(1)
        front = _actors("front")
        changes = {requests // 4: lambda: self.deploy(3), requests // 2: lambda: self.deploy(1)}
        row = await self._load(requests, changes)
        return {**row, "front_stayed": _actors("front") == front}

    async def affinity(self, requests: int) -> dict[str, Any]:
        """Follow-up questions: how many found their document read."""
        await self.deploy(2)
        questions = 5
        texts = [self._text(400) for _ in range(max(requests // questions, 2))]
        found: Counter[bool] = Counter()

        async def read(client: httpx2.AsyncClient, text: str) -> None:
            for place in range(questions):
                body = {
                    "model": "bench",
                    "prompt": f"{text}\n\nQuestion {place}: {self._text(20)}",
                    "max_tokens": 4,
                    "temperature": 0,
                }
                answer = await client.post("/v1/completions", json=body)
                usage = answer.raise_for_status().json()["usage"]
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                if place:
                    found[cached >= usage["prompt_tokens"] // 2] += 1

        async with self._client() as client:
            await _at_most(
                self.clients // 3, [lambda text=text: read(client, text) for text in texts]
            )
        return {"follow_ups": found.total(), "found": found[True] / found.total()}

    async def eval(self, requests: int) -> dict[str, Any]:
        """Workers that answer an evaluation."""
        return await asyncio.to_thread(spread.evaluated, self.model, max(requests // 10, 4))

    async def quantize(self, _requests: int) -> dict[str, Any]:
        """Workers that hold calibration samples."""
        return await asyncio.to_thread(spread.quantized, self.model)

    async def _load(
        self, requests: int, changes: dict[int, Callable[[], Awaitable[None]]]
    ) -> dict[str, Any]:
        """Ask, with something changing before some of the requests; judge every answer."""
        prompts = [self._text(self.dice.randrange(5, 60)) for _ in range(8)]
        outcome: Counter[str] = Counter()
        slowest = 0.0
        began = time.perf_counter()
        changing: list[asyncio.Task[None]] = []

        async def one(client: httpx2.AsyncClient, place: int) -> None:
            nonlocal slowest
            if place in changes:
                changing.append(asyncio.ensure_future(changes[place]()))
            start = time.perf_counter()
            outcome[await self._judge(client, prompts[place % 8], stream=place % 3 == 0)] += 1
            slowest = max(slowest, time.perf_counter() - start)

        async with self._client() as client:
            for prompt in prompts:
                self.answers[prompt] = await self._ask(client, prompt)
            await _at_most(
                self.clients, [lambda place=place: one(client, place) for place in range(requests)]
            )
            while not all(task.done() for task in changing):
                more = range(requests, requests + self.clients)
                await _at_most(
                    self.clients, [lambda place=place: one(client, place) for place in more]
                )
            await asyncio.gather(*changing)
        return {
            "requests": outcome.total(),
            "lost": outcome["lost"],
            "whole": outcome["whole"],
            "cut": outcome["cut"],
            "slowest_s": round(slowest, 2),
            "seconds": round(time.perf_counter() - began, 1),
        }

    async def _judge(self, client: httpx2.AsyncClient, prompt: str, *, stream: bool) -> str:
        if not stream:
            try:
                return (
                    "whole" if await self._ask(client, prompt) == self.answers[prompt] else "lost"
                )
            except (httpx2.HTTPError, KeyError):
                return "lost"
        text, has_begun = "", False
        try:
            async with client.stream("POST", "/generate_stream", json=_body(prompt)) as answer:
                async for line in answer.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    frame = json.loads(line.removeprefix("data:"))
                    if "error" in frame:
                        return "cut" if has_begun else "lost"
                    has_begun = True
                    text = frame["generated_text"] or text
        except httpx2.HTTPError:
            return "lost"
        return "whole" if text == self.answers[prompt] else "lost"

    async def _ask(self, client: httpx2.AsyncClient, prompt: str) -> str:
        answer = await client.post("/generate", json=_body(prompt))
        return str(answer.raise_for_status().json()["generated_text"])

    async def _kill_one(self) -> None:
        ray.kill(ray.get_actor(_actors("engines")[0], namespace="serve"))

    def _text(self, words: int) -> str:
        return " ".join(f"{self.dice.randrange(1000)}" for _ in range(words))

    def _client(self) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=None)
        return httpx2.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=120.0, limits=limits)


def _actors(deployment: str) -> list[str]:
    """The names of a deployment's replicas."""
    names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]
    return sorted(name for name in names if f"{NAME}#{deployment}#" in name)


def _model(folder: Path) -> Path:
    """A Falcon of two layers, with room for documents."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 2, "alibi": False}
    config = FalconConfig(
        **COMMON, **shape, new_decoder_architecture=True, max_position_embeddings=8192
    )
    save_model(config, folder)
    write_tokenizer(folder)
    return folder


def _body(prompt: str) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": 30, "details": True}}


async def _at_most(num: int, work: list[Callable[[], Awaitable[None]]]) -> None:
    """All of it, so many at a time."""
    gate = asyncio.Semaphore(num)

    async def through(item: Callable[[], Awaitable[None]]) -> None:
        async with gate:
            await item()

    await asyncio.gather(*(through(item) for item in work))


if __name__ == "__main__":
    main()

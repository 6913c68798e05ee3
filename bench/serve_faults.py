"""A server at its worst: cancels, overload, a stop under load, hostile bodies, a killed engine.

    python bench/serve_faults.py                 # everything, about five minutes
    python bench/serve_faults.py --only cancels streams --scale 0.1

Each trial starts `longwing serve` on a small random Falcon of its own, does its worst, and prints
one line of JSON. The exit status is 1 if any trial found a fault.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from transformers import FalconConfig

from tiny import COMMON, save_model, write_tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog. " * 3


@dataclass
class Reply:
    """One answer over HTTP; status 0 if the connection ended before it was whole."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    """A running `longwing serve`."""

    def __init__(self, process: subprocess.Popen[bytes], host: str, port: int) -> None:
        self.process, self.host, self.port = process, host, port

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in children.read_text().split():
            if b"longwing.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        raise LookupError("no engine process")

    def num_fds(self) -> int:
        pids = (self.process.pid, self.engine_pid)
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)

    def rss_mb(self) -> float:
        total = 0
        for pid in (self.process.pid, self.engine_pid):
            found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            total += int(found[1]) if found else 0
        return round(total / 1024, 1)

    async def send(self, path: str, body: Any = None, *, raw: bytes | None = None) -> Reply:
        """A whole exchange; never raises for what the server does."""
        began = time.monotonic()
        received = bytearray()
        try:
            async with self.opened(path, body, raw=raw) as (reader, _):
                while part := await reader.read(65536):
                    received += part
        except OSError:
            pass
        return _reply(bytes(received), time.monotonic() - began)

    @asynccontextmanager
    async def opened(
        self, path: str, body: Any = None, *, raw: bytes | None = None
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A request that has been sent; leaving closes the connection."""
        content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        method = "GET" if body is None and raw is None else "POST"
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**24)
        try:
            writer.write(
                f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
                + content
            )
            yield reader, writer
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def metric(self, name: str) -> float:
        text = (await self.send("/metrics")).body.decode()
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        if found is None:
            raise LookupError(f"no metric {name}")
        return float(found[1])

    async def num_at_work(self) -> float:
        running, waiting = "longwing_running_sequences", "longwing_waiting_sequences"
        return await self.metric(running) + await self.metric(waiting)

    async def idle(self) -> None:
        """Wait until nothing runs."""
        async with asyncio.timeout(120):
            while await self.metric("tgi_batch_current_size") or await self.metric(
                "tgi_queue_size"
            ):
                await asyncio.sleep(0.1)


def _reply(received: bytes, seconds: float) -> Reply:
    head, gap, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if not gap or not lines[0].startswith("HTTP/1.1 "):
        return Reply(0, {}, b"", seconds)
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
    status = int(lines[0].split()[1])
    if headers.get("transfer-encoding") == "chunked":
        whole, body = _unchunked(body)
    else:
        whole = len(body) == int(headers.get("content-length", len(body)))
    return Reply(status if whole else 0, headers, body, seconds)


def _unchunked(body: bytes) -> tuple[bool, bytes]:
    parts = []
    while body:
        size, gap, body = body.partition(b"\r\n")
        if not gap or not size:
            return False, b"".join(parts)
        length = int(size, 16)
        if length == 0:
            return True, b"".join(parts)
        parts.append(body[:length])
        body = body[length + 2 :]
    return False, b"".join(parts)


def generate(num: int = 20, **parameters: Any) -> dict[str, Any]:
    """A TGI request that runs to its length."""
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": num, "details": True, **parameters}}


def stream_is_whole(reply: Reply) -> bool:
    """Whether an event stream ended as it should: with a last event, or with an error in words."""
    events = re.findall(rb"^data: ?(.*)$", reply.body, re.MULTILINE)
    if reply.status != 200 or not events:
        return False
    if events[-1] == b"[DONE]":
        return True
    last = json.loads(events[-1])
    return last.get("generated_text") is not None or "error" in last


async def cancels(server: Served, scale: float) -> dict[str, Any]:
    """Clients leave at random points; nothing may stay behind."""
    dice = random.Random(1)
    await asyncio.gather(*(server.send("/generate", generate(5)) for _ in range(20)))
    await server.idle()
    fds_before = server.num_fds()
    num = int(2000 * scale)
    gate = asyncio.Semaphore(40)

    async def one(place: int) -> None:
        path = dice.choice(["/generate", "/generate_stream", "/v1/completions"])
        body: dict[str, Any] = generate(dice.choice([1, 20, 200]))
        if path.startswith("/v1"):
            body = {"model": "tgi", "prompt": PROMPT, "max_tokens": 100, "n": dice.choice([1, 2]),
                    "stream": dice.random() < 0.5}  # fmt: skip
        async with gate, server.opened(path, body) as (reader, _):
            for _ in range(dice.choice([0, 0, 1, 3, 10])):
                if not await reader.read(dice.choice([1, 200, 2000])):
                    break
            await asyncio.sleep(dice.random() * 0.05)

    await asyncio.gather(*(one(place) for place in range(num)))
    await server.idle()
    after = await server.send("/generate", generate(5))
    await asyncio.sleep(0.5)
    return {
        "cancels": num,
        "pages_used": await server.metric("longwing_pages_used"),
        "fds": [fds_before, server.num_fds()],
        "answers_after": after.status,
        "ok": after.status == 200
        and await server.metric("longwing_pages_used") == 0
        and server.num_fds() <= fds_before + 2,
    }


async def overload(server: Served, scale: float) -> dict[str, Any]:
    """Ten times as many clients as may be at work: all are answered, with 200 or a refusal."""
    counts: Counter[str] = Counter()
    refusals: list[float] = []
    rss: list[float] = []
    stop_at = time.monotonic() + 60 * scale
    capacity = 16

    async def client(place: int) -> None:
        paths = ("/generate", "/v1/completions")
        while time.monotonic() < stop_at:
            path = paths[place % 2]
            openai = {"model": "tgi", "prompt": PROMPT, "max_tokens": 20}
            reply = await server.send(path, openai if path.startswith("/v1") else generate(20))
            refusal = 503 if path.startswith("/v1") else 429
            if (
                reply.status == refusal
                and "retry-after" in reply.headers
                and b'"error"' in reply.body
            ):
                counts["refused"] += 1
                refusals.append(reply.seconds)
                await asyncio.sleep(0.05)
            elif reply.status == 200:
                counts["answered"] += 1
            else:
                counts[f"wrong {reply.status}"] += 1

    async def watch() -> None:
        while time.monotonic() < stop_at:
            rss.append(server.rss_mb())
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client(place) for place in range(10 * capacity)))
    await server.idle()
    refusals.sort()
    half = rss[len(rss) // 2 :] or [0.0]
    wrong = {name: num for name, num in counts.items() if name.startswith("wrong")}
    return {
        "seconds": 60 * scale,
        "clients": 10 * capacity,
        **counts,
        "refusal_p99_ms": round(1000 * refusals[int(0.99 * len(refusals))]) if refusals else None,
        "rss_mb_second_half": [min(half), max(half)],
        "ok": not wrong and counts["answered"] > 0 and max(half) <= 1.05 * min(half),
    }


def answer_end(answer: Any) -> tuple[str, int]:
    """Why a whole answer ended, and its number of tokens, in either dialect."""
    if "usage" in answer:
        return answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]
    return answer["details"]["finish_reason"], len(answer["details"]["tokens"])


async def drain(server: Served, scale: float) -> dict[str, Any]:
    """SIGTERM while streams and calls run: each is finished, new ones are refused, exit is 0."""
    num = max(int(24 * scale), 4)
    paths = ("/generate", "/generate_stream", "/v1/completions")
    bodies = (generate(120), generate(120), {"model": "tgi", "prompt": PROMPT, "max_tokens": 120})
    work = [
        asyncio.create_task(server.send(paths[i % 3], bodies[i % 3])) for i in range(min(num, 15))
    ]
    async with asyncio.timeout(60):  # all must have been let in: later ones are refused
        while await server.num_at_work() < len(work) and not any(one.done() for one in work):
            await asyncio.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.1)
    health = await server.send("/health")
    late = await server.send("/generate", generate(5))
    replies = await asyncio.gather(*work)
    status = await asyncio.to_thread(server.process.wait, 120)
    ends: Counter[str] = Counter()
    full = 0
    for place, reply in enumerate(replies):
        if place % 3 == 1:
            full += stream_is_whole(reply) and b'"error"' not in reply.body
        elif reply.status == 200:
            reason, tokens = answer_end(reply.json)
            ends[reason] += 1
            # The end token may come by itself; short of it there must be all that was asked for.
            full += tokens == 120 if reason == "length" else reason in ("eos_token", "stop")
    return {
        "at_work": len(replies),
        "complete": full,
        "health": health.status,
        "ends": dict(ends),
        "late": late.status,
        "exit": status,
        "ok": full == len(replies) and health.status == 503 and status == 0
        and late.status in (429, 503),
    }  # fmt: skip


async def kill(server: Served, scale: float) -> dict[str, Any]:
    """SIGKILL of the engine: an error in words within a second, 503, and then it serves again."""
    worst = 0.0
    wrong = 0
    unhealthy = 0
    restart_s: list[float] = []
    rounds = max(int(3 * scale), 1)
    paths = ("/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions")
    openai = {"model": "tgi", "max_tokens": 200}
    chat = {**openai, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    bodies = (generate(200), generate(200), {**openai, "prompt": PROMPT}, chat)

    async def one(place: int) -> tuple[Reply, float]:
        return await server.send(paths[place % 4], bodies[place % 4]), time.monotonic()

    for _ in range(rounds):
        work = [asyncio.create_task(one(place)) for place in range(12)]
        async with asyncio.timeout(60):
            while await server.num_at_work() < 1:
                await asyncio.sleep(0.01)
        os.kill(server.engine_pid, signal.SIGKILL)
        killed = time.monotonic()
        await asyncio.sleep(0.2)
        unhealthy += (await server.send("/health")).status == 503
        for reply, ended in await asyncio.gather(*work):
            worst = max(worst, ended - killed)
            wrong += b'"error"' not in reply.body
        async with asyncio.timeout(120):
            while (await server.send("/health")).status != 200:
                await asyncio.sleep(0.1)
        restart_s.append(round(time.monotonic() - killed, 1))
        wrong += (await server.send("/generate", generate(5))).status != 200
    return {
        "kills": rounds,
        "slowest_error_s": round(worst, 3),
        "without_words": wrong,
        "health_503": unhealthy,
        "restart_s": restart_s,
        "ok": wrong == 0 and worst <= 1.0 and unhealthy == rounds,
    }


async def streams(server: Served, scale: float) -> dict[str, Any]:
    """Two hundred open streams at once: all end as they should."""
    num = max(int(200 * scale), 10)
    began = time.monotonic()
    replies = await asyncio.gather(
        *(server.send("/generate_stream", generate(30)) for _ in range(num))
    )
    whole = sum(stream_is_whole(reply) and b'"error"' not in reply.body for reply in replies)
    return {
        "streams": num,
        "whole": whole,
        "seconds": round(time.monotonic() - began, 1),
        "ok": whole == num,
    }


async def hostile(server: Served, scale: float) -> dict[str, Any]:
    """Mutated bodies on every route that takes one: never a 5xx, never more than 5 s."""
    dice = random.Random(7)
    counts: Counter[int] = Counter()
    slowest = 0.0
    wrong: list[str] = []
    gate = asyncio.Semaphore(8)
    num = int(20_000 * scale)

    async def one() -> None:
        nonlocal slowest
        path, body = hostile_request(dice)
        async with gate:
            reply = await server.send(path, raw=body)
        slowest = max(slowest, reply.seconds)
        counts[reply.status] += 1
        if reply.status == 0 or reply.status >= 500:
            wrong.append(f"{path} {reply.status} {body[:120]!r}")
        elif reply.status >= 400 and b'"error"' not in reply.body:
            wrong.append(f"{path} {reply.status} without words")

    for start in range(0, num, 1000):
        await asyncio.gather(*(one() for _ in range(min(1000, num - start))))
    return {
        "bodies": num,
        "statuses": dict(sorted(counts.items())),
        "slowest_s": round(slowest, 2),
        "wrong": wrong[:5],
        "ok": not wrong and slowest < 5,
    }


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, -(2**63), 1e308, -1e308, 0.5, 1.0, "", "1",
    "a", "\0", "\ud800", "💥" * 50, [], [[]], {}, {"type": "json"}, ["a"] * 5, "x" * 5000, "NaN",
    {"type": "regex", "value": "(a+)+$"}, {"type": "json", "value": {"type": "object"}},
)  # fmt: skip
TGI_FIELDS = (
    "best_of", "temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p",
    "typical_p", "do_sample", "max_new_tokens", "return_full_text", "stop", "truncate", "watermark",
    "details", "decoder_input_details", "seed", "top_n_tokens", "grammar", "adapter_id", "unknown",
)  # fmt: skip
OPENAI_FIELDS = (
    "model", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "temperature", "top_p",
    "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "stream",
    "stream_options", "response_format", "tools", "tool_choice", "echo", "suffix", "prompt",
    "messages", "top_k", "min_p", "chat_template_kwargs", "truncate_prompt_tokens", "cache_salt",
)  # fmt: skip


def hostile_request(dice: random.Random) -> tuple[str, bytes]:
    """A route and a body that is wrong in one way or several."""
    path = dice.choice(
        ["/", "/generate", "/generate_stream", "/invocations", "/tokenize", "/chat_tokenize",
         "/v1/completions", "/v1/chat/completions"]
    )  # fmt: skip
    is_openai = path.startswith("/v1") or path == "/chat_tokenize"
    body: Any = generate(2)
    if is_openai:
        body = {"model": "tgi", "max_tokens": 2, "prompt": "a"}
        if "chat" in path:
            body = {"model": "tgi", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}
    target = body if is_openai else body["parameters"]
    for _ in range(dice.choice([1, 1, 2, 4])):
        target[dice.choice(OPENAI_FIELDS if is_openai else TGI_FIELDS)] = dice.choice(VALUES)
    if dice.random() < 0.2 and not is_openai:
        body[dice.choice(["inputs", "parameters", "stream"])] = dice.choice(VALUES)
    raw = json.dumps(body).encode()
    damage = dice.random()
    if damage < 0.1:
        raw = raw[: dice.randrange(len(raw) + 1)]
    elif damage < 0.15:
        at = dice.randrange(len(raw))
        raw = raw[:at] + dice.randbytes(dice.choice([1, 4])) + raw[at + 1 :]
    elif damage < 0.17:
        raw = b"[" * dice.choice([10, 1000, 100_000])
    elif damage < 0.18:
        raw = b'{"inputs":"a","parameters":{"temperature":NaN,"top_p":Infinity}}'
    return path, raw


TRIALS: dict[str, Callable[[Served, float], Awaitable[dict[str, Any]]]] = {
    "streams": streams,
    "cancels": cancels,
    "hostile": hostile,
    "overload": overload,
    "kill": kill,
    "drain": drain,
}
OPTIONS = {"overload": ["--max-concurrent-requests", "16"], "streams": [
    "--max-concurrent-requests", "256"], "drain": ["--max-concurrent-requests", "64"]}  # fmt: skip


def make_model(folder: Path) -> Path:
    """A Falcon of the 40B's form with random weights, some 50,000 of them."""
    folder.mkdir()
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 2, "alibi": False}
    config = FalconConfig(
        **COMMON, **shape, new_decoder_architecture=True, max_position_embeddings=1024
    )
    save_model(config, folder)
    write_tokenizer(folder)
    return folder


@asynccontextmanager
async def served(model: Path, *options: str) -> AsyncIterator[Served]:
    """Start `longwing serve`, and end it."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 closed by its end
    process = subprocess.Popen(
        [sys.executable, "-m", "longwing", "serve", str(model), "--port", "0", *options],
        stderr=log,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        async with asyncio.timeout(180):
            while True:
                text = os.pread(log.fileno(), 2**20, 0).decode(errors="replace")
                if found := re.search(r" at http://([^:\s]+):(\d+)", text):
                    break
                if process.poll() is not None:
                    raise RuntimeError(f"the server did not start:\n{text}")
                await asyncio.sleep(0.1)
        yield Served(process, found[1], int(found[2]))
    finally:
        process.kill()
        process.wait()


async def main() -> int:
    """Run the trials; the number of those that found a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--scale", type=float, default=1.0, help="size of each trial")
    args = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as base:
        model = make_model(Path(base) / "falcon")
        for name in args.only:
            async with served(model, *OPTIONS.get(name, [])) as server:
                found = await TRIALS[name](server, args.scale)
            faults += not found["ok"]
            print(json.dumps({"trial": name, **found}), flush=True)
    return faults


if __name__ == "__main__":
    sys.exit(1 if asyncio.run(main()) else 0)

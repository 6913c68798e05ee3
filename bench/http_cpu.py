"""What a core of the HTTP process and of the tokenizer does in a second; no model, no GPU.

    PYTHONPATH=src:tests:tests/server python bench/http_cpu.py TOKENIZER.json TEXT.txt

A scripted engine answers at once, so what is counted is the server: CPU seconds of its process over
streamed tokens, and over small requests. The tokenizer reads documents of 110,000 letters, on one
core. Prints the line of results/http_cpu.jsonl.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from server_of import Live, serving_of

from longwing.tokenizer import Tokenizer
from tiny import write_tokenizer

CLIENT = """
import asyncio, sys, httpx
url, num, length, stream = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "stream"
body = {"inputs": "a" * length, "parameters": {"max_new_tokens": length}}
async def one(http):
    if not stream:
        return (await http.post(url + "/generate", json=body)).status_code == 200
    async with http.stream("POST", url + "/generate_stream", json=body) as answer:
        return sum([line.startswith("data:") async for line in answer.aiter_lines()])
async def main():
    async with httpx.AsyncClient(timeout=60) as http:
        rounds = [await asyncio.gather(*(one(http) for _ in range(16))) for _ in range(num // 16)]
        print(sum(map(sum, rounds)))
asyncio.run(main())
"""


def rate(live: Live, num: int, length: int, how: str) -> float:
    """What clients counted, per CPU second of this process, which holds the server."""
    before = time.process_time()
    args = [sys.executable, "-c", CLIENT, live.url, str(num), str(length), how]
    counted = int(subprocess.run(args, capture_output=True, text=True, check=True).stdout)
    return counted / (time.process_time() - before)


def main() -> None:
    from tokenizers import Tokenizer as Plain

    os.environ["RAYON_NUM_THREADS"] = "1"
    plain = Plain.from_file(sys.argv[1])
    text = Path(sys.argv[2]).read_text(errors="replace")
    documents = [text[at : at + 110_000] for at in range(0, len(text) - 110_000, 110_000)]
    before = time.process_time()
    num_tokens = sum(len(plain.encode(document).ids) for document in documents)
    tokens_per_cpu_s = num_tokens / (time.process_time() - before)
    letters = sum(map(len, documents)) / num_tokens
    folder = Path(tempfile.mkdtemp())
    write_tokenizer(folder)
    live = Live(serving_of(Tokenizer.from_folder(folder), max_input_len=400, max_total_len=801))
    live.start()
    rate(live, 32, 4, "stream")
    facts = {
        "tokens_per_cpu_s": round(tokens_per_cpu_s),
        "letters_per_token": round(letters, 2),
        "events_per_cpu_s": round(rate(live, 160, 200, "stream")),
        "requests_per_cpu_s": round(rate(live, 640, 1, "plain")),
    }
    print(json.dumps(facts))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

"""A Hub on localhost: the two addresses a pull asks for, over real HTTP, with faults on demand.

Small files are answered directly; files in LFS (here: weights) redirect to a second server, as the
real Hub redirects to its CDN, with Range support there.
"""

import contextlib
import hashlib
import json
import random
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "nest/wing-7b"


def some_bytes(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def model_files(weights_size: int = 200_000) -> dict[str, bytes]:
    """A model repository as they are: the wanted files among others."""
    return {
        "config.json": b'{"model_type": "falcon"}',
        "tokenizer.json": some_bytes(5_000, seed=1),
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"# wing\n",
        "LICENSE": b"Apache-2.0",
        "model.safetensors": some_bytes(weights_size, seed=2),
        "gptq_model-4bit--1g.safetensors": some_bytes(weights_size // 2, seed=3),
        "modeling_falcon.py": b"raise SystemExit('never run this')",
        "pytorch_model.bin": some_bytes(1_000, seed=4),
        "model.Q4_K_M.gguf": some_bytes(3_000, seed=5),
        "training_args.bin": b"pickle",
        ".gitattributes": b"*.safetensors filter=lfs",
        "onnx/config.json": b"{}",
    }


TAKEN = {
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
    "model.safetensors",
    "gptq_model-4bit--1g.safetensors",
}


class FakeHub:
    """What the servers hold, what they were asked, and how they are to misbehave."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {REPO: model_files()}
        self.refs = {"main": COMMIT}
        self.listed_digests: dict[str, str] = {}  # lies about a file, by name
        self.answers: dict[str, list[tuple[int, dict[str, str]]]] = {}  # path suffix -> refusals
        self.cut_after: dict[str, list[int]] = {}  # file name -> bytes until the line is cut
        self.ignores_range = False
        self.stalled = threading.Event()  # set: answers stop after the cut and wait for release
        self.release = threading.Event()
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # server, path, headers
        self.lock = threading.Lock()
        self.endpoint = self.cdn = ""

    def paths(self, server: str = "hub") -> list[str]:
        return [path for name, path, _ in self.requests if name == server]

    def ranges(self) -> list[str]:
        return [headers["range"] for _, _, headers in self.requests if "range" in headers]

    def listing(self, repo: str, commit: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.repos[repo].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = self.listed_digests.get(name, git_blob_id(content))
            if name.endswith((".safetensors", ".gguf", ".bin")):
                digest = self.listed_digests.get(name, sha256(content))
                entry["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
            siblings.append(entry)
        return {"id": repo, "sha": commit, "siblings": siblings}


class Server(ThreadingHTTPServer):
    """Says nothing about clients that hang up: here they are meant to."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def handler(hub: FakeHub, server_name: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            with hub.lock:
                headers = {key.lower(): value for key, value in self.headers.items()}
                hub.requests.append((server_name, path, headers))
                refusals = next((a for end, a in hub.answers.items() if path.endswith(end)), [])
                refusal = refusals.pop(0) if refusals else None
            if refusal is not None:
                return self.refuse(*refusal)
            if server_name == "cdn":
                return self.send_content(path.rpartition("/")[2], *self.of_digest(path))
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
                return self.send_listing(*match.groups())
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path):
                return self.send_file(*match.groups())
            return self.refuse(404, {})

        def refuse(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": "0", **headers}.items():
                self.send_header(key, value)
            self.end_headers()

        def send_listing(self, repo: str, revision: str) -> None:
            commit = hub.refs.get(revision) or (revision if revision in hub.refs.values() else "")
            if repo not in hub.repos:
                return self.refuse(404, {"X-Error-Code": "RepoNotFound"})
            if not commit:
                return self.refuse(404, {"X-Error-Code": "RevisionNotFound"})
            body = json.dumps(hub.listing(repo, commit)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_file(self, repo: str, commit: str, name: str) -> None:
            content = hub.repos[repo].get(name)
            if content is None:
                return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
            if not name.endswith((".safetensors", ".gguf")):
                return self.send_content(name, content)
            location = f"{hub.cdn}/{sha256(content)}/{name}"
            return self.refuse(302, {"Location": location, "X-Repo-Commit": commit})

        def of_digest(self, path: str) -> tuple[bytes]:
            files = [content for files in hub.repos.values() for content in files.values()]
            digest = path.split("/")[1]
            return (next(content for content in files if sha256(content) == digest),)

        def send_content(self, name: str, content: bytes) -> None:
            start, end = 0, len(content)
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and not hub.ignores_range:
                start, end = int(asked[1]), int(asked[2]) + 1
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            with hub.lock:
                cuts = hub.cut_after.get(name, [])
                cut = cuts.pop(0) if cuts else None
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content[start:end] if cut is None else content[start:end][:cut])
            if cut is not None:
                self.wfile.flush()
                if hub.stalled.is_set():
                    hub.release.wait(30)
                self.close_connection = True

    return Handler

"""Compiles a stranger's grammar in a process that may die of it, before the engine's own does.

llguidance bounds most of its work by itself, but not all: among 8 KiB regular expressions and
64 KiB schemas are some that take minutes (a thousand `multipleOf`) or overflow the stack, which no
handler can catch. So each grammar is first compiled here, once, under limits of time, memory and
stack. What passed is compiled again where it is needed, at the same cost; there it has twice the
stack.

This file is also the program that runs in that process, started by its path: it imports only the
standard library and llguidance. The two talk in lines of JSON over pipes.
"""

import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

COMPILE_S = 1.0
EXTRA_BYTES = 64 * 2**20
STACK_BYTES = 4 * 2**20
_START_S = 60.0  # a cold disk, a busy machine; half a second as a rule
_ORPHAN_S = 5  # after this long over one grammar the process ends itself, should its parent be gone

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""At each place in JSON that allows any: enough to indent, and a model cannot go on for ever."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A model's tokens.

    Attributes:
        tokens: what each adds to a text; empty for ids that add nothing, and are never allowed.
        special_ids: tokens that are no text.
        eos_ids: tokens that end a text, one at least.
        encode: text to ids, for text that a grammar forces. Where the ids say anything else, as
            "▁Hello" does, and without a function, the longest tokens are taken.
    """

    tokens: Sequence[bytes]
    special_ids: Sequence[int]
    eos_ids: Sequence[int]
    encode: Callable[[str], list[int]] | None = None


def read_vocabulary(vocabulary: Vocabulary) -> LLTokenizer:
    """Llguidance's tokenizer: a tree of all tokens. 0.1 s for 65,024 of them."""
    return _tree(_Wrapper(vocabulary), None)


class _Wrapper:
    """A vocabulary with the attributes of llguidance's TokenizerWrapper."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_ids
        self.eos_token_id = vocabulary.eos_ids[0]
        self.vocabulary = vocabulary
        self._plain_tree: LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        encode = self.vocabulary.encode
        ids = encode(text) if encode else []
        if b"".join(self.tokens[token_id] for token_id in ids) == text.encode():
            return ids
        # A tree of its own: the one that calls this would make a circle no collector can see.
        if self._plain_tree is None:
            self._plain_tree = _tree(_Wrapper(self.vocabulary), [])
        return list(self._plain_tree.greedy_tokenize(text))


def _tree(wrapper: _Wrapper, slices: list[str] | None) -> LLTokenizer:
    return LLTokenizer(
        wrapper,  # type: ignore[arg-type]  # it asks for its own class, but means these attributes
        n_vocab=len(wrapper.tokens),
        eos_token=list(wrapper.vocabulary.eos_ids),
        slices=slices,
    )


def compile_matcher(tokenizer: LLTokenizer, kind: str, source: str) -> tuple[LLMatcher, str]:
    """A grammar's matcher at the beginning of a text, and why it cannot be used ("" if it can).

    The first mask is computed too, because llguidance does some of its work only then.
    """
    try:
        matcher = LLMatcher(tokenizer, _grammar(kind, source), log_level=0, limits=_limits())
    except ValueError as fault:
        return LLMatcher(tokenizer, "start: "), str(fault)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher, matcher.get_error()


def _limits() -> LLParserLimits:
    """Llguidance's own: a fifth of its defaults or so, as sources here are short."""
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=10_000,  # 1 to 2 KB each
        max_grammar_size=100_000,
        verbose_errors=False,  # messages go to clients
    )


def _grammar(kind: str, source: str) -> str:
    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if kind == "lark":
        return LLMatcher.grammar_from_lark(source)
    schema = source if kind == "json_schema" else '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})


class Rehearsal:
    """The process in which grammars are tried; started at the first, and again after a death.

    Not for more than one thread at a time. Close it, or use it in a `with` block.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def trial(self, kind: str, source: str) -> tuple[str, int]:
        """Compile one grammar there.

        Returns:
            reason: why it cannot be used; "" if it can.
            num_bytes: how much memory that took.
        """
        process = self._started()
        _write(process, {"kind": kind, "source": source})
        answer = _read(process, COMPILE_S)
        if answer is not None:
            return str(answer["reason"]), int(answer["num_bytes"])
        is_late = process.poll() is None
        self.close()
        if is_late:
            return f"it takes longer than {COMPILE_S:g} s to compile", 0
        return f"it takes more than {EXTRA_BYTES >> 20} MiB of memory, or nests too deep", 0

    def close(self) -> None:
        """End the process; the next trial starts another."""
        self._process = None
        self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            # Also when this object is forgotten, or the program ends.
            self._end = weakref.finalize(self, _end, self._process)
            vocabulary = self._vocabulary
            greeting = {
                "tokens": [token.hex() for token in vocabulary.tokens],
                "special": list(vocabulary.special_ids),
                "eos": list(vocabulary.eos_ids),
            }
            _write(self._process, greeting)
            if _read(self._process, _START_S) is None:
                self.close()
                raise OSError("the process that tries grammars does not start")
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process:  # closes the pipes and waits
        pass


def _write(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # reading will show that it is gone
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()


def _read(process: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any] | None:
    """The next line; None if the process ends first, or the time does."""
    if process.stdout is None:
        return None
    deadline = time.monotonic() + timeout_s
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                process.wait()
                return None
            line += part
    answer: dict[str, Any] = json.loads(line)
    return answer


# What follows runs in the other process.


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's business
    _lower(resource.RLIMIT_STACK, STACK_BYTES)
    _lower(resource.RLIMIT_CORE, 0)
    greeting = json.loads(sys.stdin.buffer.readline())
    tokenizer = read_vocabulary(
        Vocabulary(
            tokens=[bytes.fromhex(token) for token in greeting["tokens"]],
            special_ids=greeting["special"],
            eos_ids=greeting["eos"],
        )
    )
    # What llguidance sets up once is no grammar's fault.
    compile_matcher(tokenizer, "json_object", "")
    _answer({})
    while line := sys.stdin.buffer.readline():
        task = json.loads(line)
        signal.alarm(_ORPHAN_S)
        before = _own_bytes(0)
        if before:
            _lower(resource.RLIMIT_AS, before + EXTRA_BYTES)
        resident = _own_bytes(1)
        matcher, reason = compile_matcher(tokenizer, task["kind"], task["source"])
        used = max(0, _own_bytes(1) - resident)
        del matcher
        signal.alarm(0)
        _answer({"reason": reason, "num_bytes": used})


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _lower(what: int, limit: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard == resource.RLIM_INFINITY or limit <= hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(what, (limit, hard))


def _own_bytes(field: int) -> int:
    """This process's memory: 0 its address space, 1 what is resident; 0 where no /proc says so."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[field]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    _main()

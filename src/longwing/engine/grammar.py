"""Answers that conform to a grammar: which tokens may come next. llguidance does the parsing.

`GrammarCompiler` belongs to a model and makes, of a grammar, a `GrammarState`, which belongs to one
answer: before each token it says which are allowed (`penalties.py` rules out the others), after
each it is told which came. JSON schemas, regular expressions and Lark grammars all become the same
kind of parser over bytes, which is walked along the tree of the vocabulary's tokens: a token may
begin and end anywhere in the grammar.

Grammars come from strangers: `grammar_source.py` bounds what is looked at, `rehearsal.py` compiles
it first where it can do no harm. Masks have limits of their own (tens of milliseconds), held by
llguidance; a grammar that passes them in the middle of an answer fails that answer alone.

Shapes: `V` the vocabulary, `C` tokens of a draft.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from longwing.engine.grammar_source import check_source, described
from longwing.engine.rehearsal import (
    STACK_BYTES,
    Rehearsal,
    Vocabulary,
    compile_matcher,
    read_vocabulary,
)
from longwing.engine.request import Grammar
from longwing.errors import EngineError, GrammarError, RequestError
from longwing.tokenizer import Tokenizer

CACHE_BYTES = 128 * 2**20
_BYTES_PER_CHAR = 128  # measured: a compiled schema of many properties has some 100 times its size
_LEAST_BYTES = 64 * 2**10


class GrammarState:
    """Where one answer stands in its grammar. Not for more than one thread at a time.

    Args:
        matcher: llguidance's, at the beginning of the text; the state's own from here on.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """The text is complete and no token but an end token can follow: end it."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """The text conforms as it is; an end token is allowed, perhaps among others."""
        return bool(self._matcher.is_accepting())

    def mask(self, vocab_size: int) -> Tensor:
        """Which tokens may come next: (V,) bool, on the CPU. 20 µs as a rule, at most some 50 ms.

        An end token is allowed exactly where the text may end, and alone once it is `finished`.

        Args:
            vocab_size: V; ids beyond the compiler's own are not allowed.

        Raises:
            GrammarError: to go on would pass a limit of time or memory.
        """
        allowed_V = numpy.frombuffer(self._matcher.compute_logit_bias(), dtype=numpy.uint8) != 0
        self._check()
        if allowed_V.size < vocab_size:
            allowed_V = numpy.pad(allowed_V, (0, vocab_size - allowed_V.size))
        return torch.from_numpy(allowed_V[:vocab_size])

    def masks(self, draft_ids: Sequence[int], vocab_size: int) -> Tensor:
        """The masks after 0, 1, 2… tokens of a draft, as far as the grammar allows it.

        Returns:
            allowed_CV: (1 + tokens that conform, V) bool. The state stays where it is.

        Raises:
            GrammarError: as for `mask`.
        """
        rows = [self.mask(vocab_size)]
        for token_id in draft_ids[: self.num_conforming(draft_ids)]:
            self.accept(token_id)
            rows.append(self.mask(vocab_size))
        self.rollback(len(rows) - 1)
        return torch.stack(rows)

    def num_conforming(self, draft_ids: Sequence[int]) -> int:
        """How many tokens of a draft, from its first, could come next."""
        return int(self._matcher.validate_tokens(list(draft_ids)))

    def accept(self, token_id: int) -> None:
        """The token became text.

        Raises:
            GrammarError: it was not allowed, or passes a limit.
        """
        if not self._matcher.consume_token(token_id):
            self._check()
            raise GrammarError(f"token {token_id} does not conform to the grammar")

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens."""
        if num_tokens and not self._matcher.rollback(num_tokens):
            self._check()

    def fork(self) -> "GrammarState":
        """The same place, to go on from independently. Microseconds."""
        return GrammarState(self._matcher.deep_copy())

    def _check(self) -> None:
        if reason := self._matcher.get_error():
            raise GrammarError(f"the answer cannot follow its grammar further: {_brief(reason)}")


class GrammarCompiler:
    """Compiles grammars for one model; safe to share between threads.

    A grammar seen before costs microseconds. A new one costs up to 2 s in all, 10 ms as a rule,
    and half a second more where the trial process has to start; so ask with `submit` where other
    work must go on. The vocabulary's tree (0.3 s and 10 MB for 65,024 tokens) is made at first use.

    Args:
        tokenizer: the model's.
        vocab_size: width of its logits; ids beyond the tokenizer's are never allowed.
        eos_ids: tokens that end an answer.
        cache_bytes: memory that compiled grammars may take, by estimate; the least lately used go.

    Raises:
        RequestError: an end token is not in the vocabulary.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: Collection[int],
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        for token_id in eos_ids:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"end token {token_id} is not in a vocabulary of {vocab_size}")
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[Grammar, tuple[LLMatcher, int]] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._tree: LLTokenizer | None = None
        self._rehearsal: Rehearsal | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def compile(self, grammar: Grammar) -> GrammarState:
        """The state of an answer that has not begun.

        Raises:
            GrammarError: the grammar is malformed, unsatisfiable or beyond a limit.
            EngineError: no grammar can be tried, because the process for it does not start.
        """
        return self.submit(grammar).result()

    def submit(self, grammar: Grammar) -> Future[GrammarState]:
        """As `compile`, in a thread of its own; grammars are compiled one after another.

        One that is known, or refused at a glance, is done at once.
        """
        future: Future[GrammarState] = Future()
        try:
            check_source(grammar)
            if (known := self._known(grammar)) is not None:
                future.set_result(known)
                return future
        except GrammarError as error:
            future.set_exception(error)
            return future
        return self._own_thread().submit(self._compiled, grammar)

    def close(self) -> None:
        """End the thread and the process; compiled states live on."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        if self._rehearsal is not None:
            self._rehearsal.close()

    def _known(self, grammar: Grammar) -> GrammarState | None:
        with self._cache_lock:
            if (entry := self._cache.get(grammar)) is None:
                return None
            self._cache.move_to_end(grammar)
            return GrammarState(entry[0].deep_copy())

    def _compiled(self, grammar: Grammar) -> GrammarState:
        """Runs in the thread."""
        if (known := self._known(grammar)) is not None:
            return known
        if self._tree is None or self._rehearsal is None:
            vocabulary = _vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)
            self._tree, self._rehearsal = read_vocabulary(vocabulary), Rehearsal(vocabulary)
        num_bytes = 0
        if grammar.kind != "json_object":
            try:
                reason, num_bytes = self._rehearsal.trial(grammar.kind, grammar.source)
            except OSError as fault:
                raise EngineError("grammars cannot be compiled now; try again later") from fault
            if reason:
                raise _refusal(grammar, reason)
        matcher, reason = compile_matcher(self._tree, grammar.kind, grammar.source)
        if reason:
            raise _refusal(grammar, reason)
        self._remember(grammar, matcher, num_bytes)
        return GrammarState(matcher.deep_copy())

    def _remember(self, grammar: Grammar, matcher: LLMatcher, num_bytes: int) -> None:
        cost = max(num_bytes, _BYTES_PER_CHAR * len(grammar.source), _LEAST_BYTES)
        with self._cache_lock:
            self._cache[grammar] = (matcher, cost)
            while sum(known for _, known in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)

    def _own_thread(self) -> ThreadPoolExecutor:
        """One thread, with several times the stack that the rehearsal allows."""
        with self._cache_lock:
            if self._thread is None:
                usual = threading.stack_size(4 * STACK_BYTES)
                try:
                    self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
                    self._thread.submit(int)  # starts the thread now, while the size holds
                finally:
                    threading.stack_size(usual)
            return self._thread


def _vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> Vocabulary:
    tokens = [_bytes_or_none(tokenizer, token_id) for token_id in range(vocab_size)]
    if not eos_ids:  # llguidance needs one: an id that the model does not have
        tokens.append(b"")

    def encode(text: str) -> list[int]:
        try:
            return tokenizer.encode(text, add_bos=False)
        except RequestError:  # it cannot be written without special tokens
            return []

    return Vocabulary(
        tokens=tokens,
        special_ids=sorted(i for i in tokenizer.special_ids if i < vocab_size),
        eos_ids=list(eos_ids) or [vocab_size],
        encode=encode,
    )


def _bytes_or_none(tokenizer: Tokenizer, token_id: int) -> bytes:
    try:
        return tokenizer.token_bytes(token_id)
    except RequestError:  # a padded vocabulary
        return b""


def _refusal(grammar: Grammar, reason: str) -> GrammarError:
    return GrammarError(f"the {described(grammar)} cannot be used: {_brief(reason)}")


def _brief(reason: str) -> str:
    """The first line of what llguidance says, without the pages it may quote."""
    line = reason.strip().split("\n", 1)[0]
    if line.startswith("NoExtension"):
        return "no text of this model's tokens matches it"
    return line if len(line) <= 200 else f"{line[:197]}..."

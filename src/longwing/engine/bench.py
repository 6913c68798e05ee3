"""`Bench`: how fast an engine decodes and reads, beside what the device could do at most.

Everything goes through the engine that serves: requests are added, steps are taken, and the clock
is read between tokens. What a step must cost at least (`floor_ms`) is the plan room's arithmetic
over rates that `ceilings.py` measured.

The one idea: what a decode step costs depends on how much its sequences have behind them, not on
what. So a long context need not be read to be measured: its pages are filled with random numbers
and put where the prefix cache will find them, as if the text had been read before.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longwing.engine.cache import CacheKey
from longwing.engine.ceilings import Ceilings, measure_ceilings, synchronise
from longwing.engine.engine import Engine
from longwing.engine.events import Event, Failed, Finished, Step
from longwing.engine.findings import WARM_TOKENS, BenchSpec, Loading, Measured, Quoting
from longwing.engine.folder import ModelFolder
from longwing.engine.footprint import forget_host_peak, limit_device
from longwing.engine.loading import NCCL_BYTES, load_engine
from longwing.engine.lookup import PromptLookup
from longwing.engine.options import EngineOptions
from longwing.engine.request import Request, SamplingParams
from longwing.engine.status import EngineInfo
from longwing.engine.warmup import warm_up
from longwing.errors import CapacityError, EngineError, RequestError
from longwing.models import DTYPES, find_device
from longwing.plan import Plan, decode_bound, graphs_bytes, plan, prefill_bound

_QUOTED_NGRAM = 4
"""An answer's token is a quotation if it ends so many tokens that stand in the prompt in a row."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class Bench:
    """Measures one engine. Requests at work are dropped.

    Args:
        engine: warmed up; with num_pages for what is to be measured.
        info: what it is.
        folder: where it came from; None measures without floors.
        ceilings: its device's.
        spec: how long and how often to measure.

    Attributes:
        loading: what loading took, if `load` did it.
    """

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        folder: ModelFolder,
        ceilings: Ceilings,
        spec: BenchSpec,
        loading: Loading | None = None,
    ) -> None:
        self.engine = engine
        self.info = info
        self.folder = folder
        self.ceilings = ceilings
        self.spec = spec
        self.loading = loading
        self._options = engine.options
        self._dice = random.Random(0)
        if not spec.reads:
            _fill(engine)

    @classmethod
    def load(
        cls,
        path: str | Path,
        options: EngineOptions,
        spec: BenchSpec,
        *,
        progress: Progress | None = None,
    ) -> "Bench":
        """Load a folder for what is to be measured, and time it.

        Args:
            path: the folder.
            options: how; its context and, unless it says more, its number of sequences are raised
                to what the measurements need. `memory` becomes a hard limit on a GPU.
            spec: what is to be measured.
            progress: called with (bytes read, bytes in all).

        Raises:
            RequestError: the options rule out what is to be measured.
            CheckpointError, CapacityError: as `load_engine`.
        """
        if not (options.prefix_cache or spec.reads):
            raise RequestError("without a prefix cache contexts must really be read")
        device = find_device(options.device)
        folder = ModelFolder.open(path, options.rope)
        word = folder.config.dtype if options.dtype == "auto" else options.dtype
        on_gpu = device.type == "cuda"
        dtype = DTYPES.get(word, torch.bfloat16) if on_gpu else torch.float32
        most = max(spec.batches, default=1)
        if options.max_sequences != EngineOptions.max_sequences:
            most = max(most, options.max_sequences)
        if on_gpu and options.memory is not None:
            set_aside = graphs_bytes(folder.config, most)
            set_aside += NCCL_BYTES if options.tensor_parallel > 1 else 0
            limit_device(device, options.memory, set_aside=set_aside)
        ceilings = measure_ceilings(device, dtype)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        forget_host_peak()
        # A page beyond the room: the scheduler keeps one free for each sequence at work.
        context = max(spec.longest, options.context or 0) + 2 * (options.page_len or 128)
        options = replace(options, context=context, max_sequences=most)
        began = time.perf_counter()
        engine, info = load_engine(path, options, progress=progress)
        synchronise(device)
        loaded = time.perf_counter()
        warm_up(engine)
        synchronise(device)
        loading = Loading(
            seconds=loaded - began,
            warm_up_s=time.perf_counter() - loaded,
            stored_bytes=sum(tensor.nbytes for tensor in folder.checkpoint.tensors.values()),
        )
        return cls(engine, info, folder, ceilings, spec, loading)

    def measurements(self) -> list[Callable[[], Measured]]:
        """Everything that the spec asks for, to be called in turn."""
        spec = self.spec
        cells = [(b, c, 0) for c in spec.contexts for b in spec.batches] if spec.decodes else []
        cells += [(spec.batches[0], spec.contexts[0], drafts) for drafts in spec.drafts]
        return [
            *(partial(self.decode, *cell) for cell in cells),
            *(partial(self.prefill, num_tokens) for num_tokens in spec.prompts),
        ]

    def decode(self, batch: int, context: int, drafts: int = 0) -> Measured:
        """Time the steps of `batch` sequences that have `context` tokens behind them.

        Args:
            batch: sequences at once.
            context: tokens behind each, before the first step.
            drafts: wrong tokens that each of them brings along in every step, to be checked.
        """
        spec = self.spec
        done = Measured(
            what="check drafts" if drafts else "decode", batch=batch, context=context, drafts=drafts
        )
        cache = self.engine.cache
        needed = batch * (cache.pages_for(context + spec.room) + 1)
        if needed > cache.num_pages:
            held = cache.num_pages * cache.page_len
            return replace(done, note=f"the cache holds {held:,} tokens")
        self._restart(max_draft=drafts, draft_sequences=batch)
        for place in range(batch):
            self._begin(str(place), self._random_ids(context))
            if drafts:
                for sequence in self.engine.scheduler.running:
                    sequence._lookup = _Insistent(drafts, self._dice, self.info.vocab_size)
        while min(self._tokens_of.values()) < WARM_TOKENS:
            self._step()
        times = []
        for _ in range(spec.repeats):
            began, num_steps = time.perf_counter(), 0
            while num_steps < spec.tokens:
                num_steps += self._step()
            times.append((time.perf_counter() - began) / num_steps)
        num_running = len(self.engine.scheduler.running)
        self._restart()
        if num_running < batch:  # who began first was at his end before the last had been read
            least = "more than 256 tokens a step (max_batch_tokens, max_beside_tokens)"
            return replace(done, note=f"{num_running} of {batch} at work; read {least}")
        return self._timed(done, times, batch, self._decode_floor(batch, context))

    def prefill(self, num_tokens: int) -> Measured:
        """Time the reading of a prompt, up to its first token."""
        times = []
        for _ in range(self.spec.repeats):
            self._restart()
            request = Request(
                prompt_ids=self._random_ids(num_tokens),
                params=SamplingParams(max_new_tokens=1, ignore_eos=True),
            )
            began = time.perf_counter()
            self.engine.add("0", request)
            while not self._step():
                pass
            times.append(time.perf_counter() - began)
        self._restart()
        rate = self.ceilings.flops_per_s * self.info.ranks
        floor = prefill_bound(self.folder.config, num_tokens, rate)
        done = Measured(what="prefill", batch=1, context=num_tokens)
        return self._timed(done, times, num_tokens, floor)

    def quoting(self, prompt_ids: Sequence[int], max_new: int) -> Quoting:
        """Answer a prompt greedily with and without drafts, by turns, as often as `repeats`.

        Args:
            prompt_ids: the prompt.
            max_new: tokens of the answer, 2 at least; it goes on past its end.
        """
        plain, ahead = [], []
        for _ in range(self.spec.repeats):
            plain_ids, plain_s = self._answer(prompt_ids, max_new, max_draft=0)
            ids, ahead_s = self._answer(prompt_ids, max_new)
            stats = self.engine.stats
            plain.append((len(plain_ids) - 1) / plain_s)
            ahead.append((len(ids) - 1) / ahead_s)
        self._restart()
        return Quoting(
            num_tokens=len(ids),
            quoted=quoted_share(prompt_ids, ids),
            plain_tokens_per_s=statistics.median(plain),
            tokens_per_s=statistics.median(ahead),
            num_drafted=stats.num_drafted,
            num_accepted=stats.num_accepted,
            same=ids == plain_ids,
        )

    def _answer(
        self, prompt_ids: Sequence[int], max_new: int, max_draft: int | None = None
    ) -> tuple[list[int], float]:
        """A greedy answer's ids, and the seconds from its first token to its last."""
        self._restart(max_draft=max_draft)
        params = SamplingParams(max_new_tokens=max_new, ignore_eos=True)
        self.engine.add("0", Request(prompt_ids=tuple(prompt_ids), params=params))
        ids: list[int] = []
        seconds = 0.0
        while self.engine.busy:
            for _, event in self._events():
                if isinstance(event, Step):
                    ids.append(event.id)
                elif isinstance(event, Finished):
                    seconds = event.decode_s
        return ids, seconds

    def _restart(self, max_draft: int | None = None, draft_sequences: int | None = None) -> None:
        """An idle engine, as it was loaded but for these limits on drafts."""
        own = self._options
        self.engine.options = replace(
            own,
            max_draft=own.max_draft if max_draft is None else max_draft,
            draft_sequences=own.draft_sequences if draft_sequences is None else draft_sequences,
        )
        self.engine.forget()
        self._tokens_of: dict[str, int] = {}

    def _begin(self, name: str, prompt_ids: tuple[int, ...]) -> None:
        """Bring a sequence to its first token."""
        max_new = self.spec.room
        if not self.spec.reads:
            self._invent(prompt_ids, max_new)
        params = SamplingParams(max_new_tokens=max_new, ignore_eos=True)
        self.engine.add(name, Request(prompt_ids=prompt_ids, params=params))
        self._tokens_of[name] = 0
        while not self._tokens_of[name]:
            self._step()

    def _invent(self, prompt_ids: tuple[int, ...], max_new: int) -> None:
        """Let the prefix cache find a prompt that was never read, but for its last page."""
        cache, rotary = self.engine.cache, self.engine.model.rotary
        rung = rotary.rung_for(len(prompt_ids), max_new) if rotary else 0
        num = (len(prompt_ids) - 1) // cache.page_len
        pages: list[int] = []
        while len(pages) < num:
            page = cache.allocate(pages[-1] if pages else None, room=num + 1 - len(pages))
            if page is None:
                raise CapacityError(f"{num} pages of the cache are wanted and {len(pages)} free")
            pages.append(page)
        cache.publish(CacheKey(salt="", rung=rung), prompt_ids, pages, 0, num)
        cache.release(pages)

    def _step(self) -> int:
        """Take a step; 1 if any sequence gained a token by it, else 0."""
        gained = 0
        for name, event in self._events():
            if isinstance(event, Step):
                gained = 1
                self._tokens_of[name] = self._tokens_of.get(name, 0) + 1
        return gained

    def _events(self) -> Iterable[tuple[str, Event]]:
        if not self.engine.busy:
            raise EngineError("the engine ended an answer before it was measured")
        events = self.engine.step()
        for _, event in events:
            if isinstance(event, Failed):
                raise EngineError(f"a measurement failed: {event.message}")
        return events

    def _random_ids(self, num: int) -> tuple[int, ...]:
        return tuple(self._dice.choices(range(self.info.vocab_size), k=num))

    def _timed(
        self, done: Measured, times: Sequence[float], num_tokens: int, floor_s: float | None
    ) -> Measured:
        middle = statistics.median(times)
        return replace(
            done,
            ms=1e3 * middle,
            ms_low=1e3 * min(times),
            ms_high=1e3 * max(times),
            tokens_per_s=num_tokens / middle,
            floor_ms=None if floor_s is None else 1e3 * floor_s,
        )

    def _decode_floor(self, batch: int, context: int) -> float | None:
        """Seconds that a step takes at least; None for folders that cannot be planned."""
        planned = self.plan(batch, context)
        if planned is None:
            return None
        return batch / decode_bound(planned, self.ceilings.bytes_per_s * self.info.ranks)

    def plan(self, batch: int, context: int) -> Plan | None:
        """The plan of what is measured: weights as the folder holds them, the cache as it is kept.

        None for folders whose layers differ in bits, which no plan counts.
        """
        quant = self.folder.checkpoint.quant
        if quant is not None and (quant.overrides or quant.lm_head):
            return None
        word = self.folder.config.dtype if self.info.device == "cpu" else self.info.dtype
        asked = self._options.kv_dtype
        return plan(
            self.folder.config,
            context=context,
            batch=batch,
            quant=quant,
            dtype=word if word in DTYPES else "bfloat16",
            kv_dtype=self.info.kv_dtype if asked == "auto" else asked,
            prefill_chunk=self.info.max_batch_tokens,
        )

    @property
    def planned_bytes(self) -> int | None:
        """What the plan counts for this engine's first rank: weights, workspace, cache as it is."""
        planned = self.plan(self.info.max_sequences, self.info.context)
        if planned is None:
            return None
        weights = self.folder.part_bytes(planned.weights, self.info.ranks)
        return weights + planned.workspace.total + self.info.kv_bytes


class _Insistent(PromptLookup):
    """Guesses at random, always as many, whatever comes of it: to time the checking."""

    def __init__(self, num: int, dice: random.Random, vocab_size: int) -> None:
        super().__init__(max_draft=num)
        self._dice = dice
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return 2**31  # more than any text has: nothing is to be indexed

    def draft(self, limit: int) -> list[int]:
        """`max_draft` random tokens, or as many as may be."""
        num = min(limit, self._max_draft)
        return [self._dice.randrange(self._vocab_size) for _ in range(num)]

    def may_draft_next(self) -> bool:
        """Yes."""
        return True

    def judge(self, num_drafted: int, num_accepted: int) -> None:
        """Learn nothing."""


def quoted_share(prompt_ids: Sequence[int], ids: Sequence[int]) -> float:
    """Part of an answer's tokens that end `_QUOTED_NGRAM` in a row which the prompt has, too."""
    found = set(_ngrams(prompt_ids))
    ends = sum(ngram in found for ngram in _ngrams(ids))
    return ends / max(len(ids) - _QUOTED_NGRAM + 1, 1)


def _ngrams(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return zip(*(ids[at:] for at in range(_QUOTED_NGRAM)), strict=False)


@torch.inference_mode()
def _fill(engine: Engine) -> None:
    """Random numbers in every slot of the cache: one random page a tensor, over and over."""
    for layer in engine.runner.pages:
        for name, numbers in vars(layer).items():
            if not isinstance(numbers, Tensor):
                continue
            page = torch.randn(numbers.shape[1:], device=numbers.device)
            if "scale" in name:
                page = page.abs() / 40
            elif not numbers.is_floating_point():
                page = (40 * page).round().clamp(-127, 127)
            numbers.copy_(page.to(numbers.dtype).expand_as(numbers))

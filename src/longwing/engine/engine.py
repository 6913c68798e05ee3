"""`Engine`: many requests at once over one model, a step at a time.

`add` and `cancel` requests; `step` runs one batch and says what happened. It has no loop of its
own: who drives it (`worker.py`) decides when. The scheduler chooses the work, the runner
does it, and here tokens become text, and text events. While a step's tokens do, the next
may be under way already (`ahead.py`).

Shape key: T packed tokens, D model dim, R rows whose logits are wanted, V vocabulary.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace

from torch import Tensor

from longwing.engine.ahead import Flight, launch
from longwing.engine.cache import CacheKey, PageCache
from longwing.engine.events import (
    Event,
    Failed,
    Finished,
    PromptRead,
    PromptToken,
    Reading,
    Step,
)
from longwing.engine.grammar import GrammarCompiler, GrammarState
from longwing.engine.options import EngineOptions
from longwing.engine.request import FinishReason, Request
from longwing.engine.runner import Runner, runner_settings
from longwing.engine.sampler import Choice, prompt_logprobs
from longwing.engine.sampling_state import SamplingState
from longwing.engine.scheduler import Scheduler
from longwing.engine.sequence import Sequence as Scheduled
from longwing.engine.sequence import Work
from longwing.engine.status import EngineStats, StepRecord
from longwing.engine.transcript import Transcript
from longwing.errors import (
    CapacityError,
    ContextLengthError,
    EngineError,
    GrammarError,
    LogitsError,
    OverloadedError,
    RequestError,
)
from longwing.models import Decoder
from longwing.models.memory import out_of_memory
from longwing.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_NO_TOKEN = "the model's output allows no next token"
_NO_MEMORY = "the engine ran out of memory; try again, or ask for less"

_Said = tuple[str, Event]
"""A request's id and what is said about it."""

_GRAMMAR_WAIT_S = 0.02
"""How long a step waits for a grammar when there is nothing else to do."""

_LOGIT_ROWS = 64
"""Prompt rows whose logits are held at once: 65,024 float32 logits take 260 kB each."""


@dataclass(kw_only=True, eq=False)
class _Job:
    """A request at work."""

    id: str
    request: Request
    sequence: Scheduled
    state: SamplingState
    transcript: Transcript
    grammar: GrammarState | None
    added: float
    fault: GrammarError | None = None
    started: float = 0.0
    first_token: float = 0.0
    prompt_tokens: list[PromptToken] = field(default_factory=list)


class Engine:
    """A model that answers many requests at once. One thread at a time may use it.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        options: how many sequences, tokens and pages; num_pages must be set.
        runner: makes the runner, where it is not this process alone that runs the model.

    Attributes:
        context: longest prompt and answer together, in tokens.
        steps: a record of each step since `take_steps` was last called.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        options: EngineOptions,
        *,
        runner: Callable[..., Runner] = Runner,
    ) -> None:
        if options.num_pages is None:
            raise RequestError("num_pages is not set; load_engine chooses it by the memory")
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.context = min(model.context, options.num_pages * options.page_len)
        self.runner = runner(model, **runner_settings(model, options))
        self._end_ids = tokenizer.eos_ids | set(model.config.eos_ids)
        self._grammars = GrammarCompiler(
            tokenizer, vocab_size=model.config.vocab_size, eos_ids=self._end_ids
        )
        self.forget()

    def forget(self) -> None:
        """Start anew: no requests, an empty prefix cache, all counts at 0."""
        options = self.options
        self.cache = PageCache(
            self.runner.num_pages,
            options.page_len,
            sharing=options.prefix_cache,
            max_share=options.cache_share,
        )
        self.scheduler = Scheduler(self.cache, options)
        self._jobs: dict[str, _Job] = {}
        self._compiling: dict[str, tuple[Request, Future[GrammarState], float]] = {}
        self._job_of: dict[Scheduled, _Job] = {}
        self._steps: list[StepRecord] = []
        on_gpu = self.model.device.type == "cuda"
        self._overlaps = options.overlap == "on" or (options.overlap == "auto" and on_gpu)
        self._flight: Flight | None = None
        self._too_full_ahead = False

    def close(self) -> None:
        """End what runs beside the engine; requests at work are dropped."""
        self._grammars.close()
        self.runner.close()

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._jobs or self._compiling)

    @property
    def stats(self) -> EngineStats:
        """How it is doing."""
        return self.scheduler.stats

    def take_steps(self) -> list[StepRecord]:
        """The steps done since this was last asked."""
        taken, self._steps = self._steps, []
        return taken

    def add(self, request_id: str, request: Request) -> None:
        """Take a request; its events come from `step` under this id.

        Raises:
            ContextLengthError: prompt and answer do not fit the context.
            RequestError: a token id is unknown, or the adapter.
            CapacityError: the answer could never have enough pages.
            OverloadedError: too many wait already.
        """
        self._check(request)
        if request.grammar is None:
            self._begin(request_id, request, None, time.perf_counter())
        else:
            compiled = self._grammars.submit(request.grammar)
            self._compiling[request_id] = (request, compiled, time.perf_counter())

    def _check(self, request: Request) -> None:
        prompt_len, max_new = len(request.prompt_ids), request.params.max_new_tokens or 1
        if prompt_len + max_new > self.context:
            raise ContextLengthError(prompt_len, max_new, self.context)
        vocab_size = self.model.config.vocab_size
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab_size:
            raise RequestError(f"a prompt's token ids must be at least 0 and below {vocab_size}")
        if self.runner.adapters is not None:
            self.runner.adapters.index(request.adapter)
        elif request.adapter:
            raise RequestError(f"there is no adapter {request.adapter[:100]!r}; none is served")

    def _begin(
        self, request_id: str, request: Request, grammar: GrammarState | None, added: float
    ) -> None:
        """Let a checked request wait for its turn."""
        prompt_len, max_new = len(request.prompt_ids), request.params.max_new_tokens or 1
        params = request.params
        if grammar is not None:
            params = replace(params, ignore_eos=False)  # a complete text cannot go on
        rotary = self.model.rotary
        # The RoPE base is chosen here, once, for the sequence's whole life.
        rung = rotary.rung_for(prompt_len, max_new) if rotary else 0
        sequence = Scheduled(
            id=request_id,
            prompt_ids=request.prompt_ids,
            max_len=prompt_len + max_new,
            key=CacheKey(salt=request.salt, rung=rung, adapter=request.adapter),
            can_share=request.prompt_logprobs is None,
            can_draft=grammar is None,
        )
        self.scheduler.add(sequence)
        job = _Job(
            id=request_id,
            request=request,
            sequence=sequence,
            state=SamplingState(params, request.prompt_ids, eos_token_ids=self._end_ids),
            transcript=Transcript(
                self.tokenizer,
                params,
                end_ids=self._end_ids,
                max_new=max_new,
                include_stop=request.include_stop,
            ),
            grammar=grammar,
            added=added,
        )
        self._jobs[request_id] = self._job_of[sequence] = job

    def cancel(self, request_id: str) -> None:
        """Drop a request at once, whatever it is doing; no event follows. Knows no unknown id."""
        self._compiling.pop(request_id, None)
        job = self._jobs.get(request_id)
        if job is not None:
            self._end(job)

    def step(self) -> list[_Said]:
        """Run one batch; what happened, as (request id, event) in order.

        It may have been launched by the step before, and another may be by this one.
        """
        began = time.perf_counter()
        refused = self._begin_compiled()
        flight, self._flight = self._flight, None
        if flight is not None and not any(work.sequence in self._job_of for work in flight.batch):
            flight = None
        batch = self.scheduler.schedule() if flight is None else flight.batch
        if not batch:
            return refused + (self._stuck() if self._jobs else [])
        try:
            with out_of_memory(f"a step of {sum(len(work.token_ids) for work in batch)} tokens"):
                if flight is None:
                    flight = self._launch(batch, began)
                self._flight = self._launch_ahead(flight)
                events = self._advance(flight)
        except CapacityError as error:
            self._flight = None
            events = self._shed(batch, error)
        self._record(batch, time.perf_counter() - began)
        return refused + events

    def _launch(self, batch: Sequence[Work], began: float) -> Flight:
        for work in batch:
            job = self._job_of[work.sequence]
            job.started = job.started or began
        all_rows = any(
            work.start < work.sequence.prompt_len
            and self._job_of[work.sequence].request.prompt_logprobs is not None
            for work in batch
        )
        return launch(self.runner, batch, self._states, all_rows=all_rows)

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        """The step after one whose tokens are not known yet, if that can be."""
        overlaps = self._overlaps and not self._too_full_ahead
        batch = self.scheduler.schedule_ahead(flight.batch) if overlaps else []
        if not batch:
            return None
        try:
            with out_of_memory(f"a step of {len(batch)} tokens, ahead"):
                return flight.launch_next(self.runner, batch, lambda s: self._job_of[s].state)
        except CapacityError as error:
            _log.warning("%s", error)  # it will be taken in its turn, or that will be told
            self._too_full_ahead = True  # until a request has ended
            return None

    def _begin_compiled(self) -> list[_Said]:
        """Begin the requests whose grammars are compiled; fail those whose cannot be."""
        if not self._compiling:
            return []
        if not self._jobs:  # nothing else to do
            futures = [compiled for _, compiled, _ in self._compiling.values()]
            wait_for(futures, _GRAMMAR_WAIT_S, FIRST_COMPLETED)
        refused: list[_Said] = []
        for request_id, (request, compiled, added) in list(self._compiling.items()):
            if not compiled.done():
                continue
            del self._compiling[request_id]
            try:
                self._begin(request_id, request, compiled.result(), added)
            except (RequestError, CapacityError) as error:
                refused.append((request_id, Failed(kind="request", message=str(error))))
            except (EngineError, OverloadedError) as error:
                refused.append((request_id, Failed(kind="generation", message=str(error))))
        return refused

    def _advance(self, flight: Flight) -> list[_Said]:
        """From tokens, as soon as they are there, to text and events."""
        chosen = flight.read()
        if not flight.stands:
            self._flight = None
        events: list[_Said] = []
        end = 0
        for work in flight.batch:
            row, end = end, end + len(work.token_ids)
            job = self._job_of.get(work.sequence)
            if job is None:
                continue  # ended or cancelled since this was launched
            try:
                if work.start < work.sequence.prompt_len:
                    events += self._read(job, work, flight.hidden_TD, row)
                steps = self._accept(job, work, chosen.get(work.sequence, []))
            except LogitsError:
                _log.exception("request %s: no token can be chosen", job.id)
                events.append((job.id, Failed(kind="generation", message=_NO_TOKEN)))
                self._end(job)
                continue
            except CapacityError as error:
                _log.error("request %s: %s", job.id, error)
                events.append((job.id, Failed(kind="generation", message=_NO_MEMORY)))
                self._end(job)
                continue
            except GrammarError as error:
                events.append((job.id, Failed(kind="request", message=str(error))))
                self._end(job)
                continue
            self.scheduler.commit(work, [step.id for step in steps])
            events += [(job.id, step) for step in steps]
            if job.transcript.finish_reason is not None:
                events.append((job.id, self._finished(job, job.transcript.finish_reason)))
                self._end(job)
        return events

    def _states(self, work: Work) -> list[SamplingState]:
        """What sampling knows after each draft of a work, and last; [] if it gets no token."""
        if not work.wants_token:
            return []
        job, num = self._job_of[work.sequence], work.num_drafts
        if job.grammar is not None:
            try:
                job.state.allowed_V = job.grammar.mask(self.model.config.vocab_size)
            except GrammarError as error:
                job.fault = error
                return []
        drafts = work.token_ids[len(work.token_ids) - num :]
        return [job.state.ahead(drafts[:i]) if i else job.state for i in range(num + 1)]

    def _accept(self, job: _Job, work: Work, choices: Sequence[Choice | None]) -> list[Step]:
        """The tokens that become text: drafts for as long as they agree, and one more."""
        if job.fault is not None:
            raise job.fault
        steps: list[Step] = []
        drafts = work.token_ids[len(work.token_ids) - work.num_drafts :]
        for place, choice in enumerate(choices):
            if choice is None:
                raise LogitsError("a row's logits allow no token", [place])
            token_id, logprob, top = choice
            job.state.accept(token_id)
            if job.grammar is not None:
                job.grammar.accept(token_id)
            said = job.transcript.push(token_id)
            steps.append(
                Step(
                    id=token_id,
                    piece=said.piece,
                    special=said.special,
                    text=said.text,
                    logprob=logprob,
                    top=tuple(top),
                )
            )
            if job.transcript.finish_reason is not None:
                break
            if place < len(drafts) and drafts[place] != token_id:
                break
        if steps and not job.first_token:
            job.first_token = time.perf_counter()
        return steps

    def _read(self, job: _Job, work: Work, hidden_TD: Tensor, row: int) -> list[_Said]:
        """What a chunk of the prompt gives: progress, and log-probabilities if asked for.

        Its hidden states begin at `row` of the step's, if these are of all tokens.
        """
        prompt_len = work.sequence.prompt_len
        done = min(work.start + len(work.token_ids), prompt_len)
        cached_len = work.sequence.cached_len
        events: list[_Said] = [(job.id, Reading(done=done, total=prompt_len, cached=cached_len))]
        num_top = job.request.prompt_logprobs
        # After a preemption the prompt is read again; what was told is not told twice.
        if num_top is None or len(job.prompt_tokens) == prompt_len:
            return events
        ids = job.request.prompt_ids
        if not job.prompt_tokens:
            job.prompt_tokens.append(PromptToken(id=ids[0], logprob=None))
        for start in range(len(job.prompt_tokens) - 1, min(done, prompt_len - 1), _LOGIT_ROWS):
            stop = min(start + _LOGIT_ROWS, done, prompt_len - 1)
            rows = range(row + start - work.start, row + stop - work.start)
            targets = ids[start + 1 : stop + 1]
            # Here, not around the step: others of the batch have been told their tokens.
            with out_of_memory(f"the log-probabilities of {len(rows)} prompt tokens"):
                logits_RV = self.runner.logits(hidden_TD, rows)
            reports = prompt_logprobs(logits_RV, targets, num_top)
            job.prompt_tokens += [
                PromptToken(id=token_id, logprob=own, top=tuple(top))
                for token_id, (own, top) in zip(targets, reports, strict=True)
            ]
        if len(job.prompt_tokens) == prompt_len:
            events.append((job.id, PromptRead(tokens=tuple(job.prompt_tokens))))
        return events

    def _finished(self, job: _Job, reason: FinishReason) -> Finished:
        now = time.perf_counter()
        return Finished(
            reason=reason,
            seed=job.state.seed,
            prompt_len=len(job.request.prompt_ids),
            cached_len=job.sequence.cached_len,
            num_generated=len(job.transcript.ids),
            queue_s=job.started - job.added,
            prefill_s=job.first_token - job.started,
            decode_s=now - job.first_token,
            stop=job.transcript.stop,
        )

    def _end(self, job: _Job) -> None:
        self._too_full_ahead = False
        self.scheduler.finish(job.sequence)
        del self._jobs[job.id], self._job_of[job.sequence]

    def _shed(self, batch: Sequence[Work], error: CapacityError) -> list[_Said]:
        """The step ran out of memory: give up its newest request, and let the others go on."""
        _log.error("out of memory: %s", error)
        job = next(
            self._job_of[work.sequence] for work in reversed(batch) if work.sequence in self._job_of
        )
        self._end(job)
        return [(job.id, Failed(kind="generation", message=_NO_MEMORY))]

    def _stuck(self) -> list[_Said]:
        """Requests wait and nothing can run: a defect. Fail them rather than spin for ever."""
        _log.error("%d requests wait and none can run", len(self._jobs))
        jobs = list(self._jobs.values())
        for job in jobs:
            self._end(job)
        return [(job.id, Failed(kind="generation", message=_NO_MEMORY)) for job in jobs]

    def _record(self, batch: Sequence[Work], seconds: float) -> None:
        reads = any(work.start < work.sequence.prompt_len for work in batch)
        self._steps.append(
            StepRecord(
                method="prefill" if reads else "decode",
                num_sequences=len(batch),
                num_tokens=sum(len(work.token_ids) for work in batch),
                seconds=seconds,
            )
        )

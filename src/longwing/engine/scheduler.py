"""Who runs next: turns sequences into steps of bounded size. Knows numbers only. No torch.

`schedule` says what to run, the engine runs it, `commit` says what came of it, and `finish` ends a
sequence at any time. A step decodes first: a token for every sequence whose prompt has been read,
with drafts where few run (`drafting.py`). What is left of its budget reads prompts, in chunks;
smaller ones where others wait for their next token.

The one idea: age decides. Sequences are numbered as they come; whoever waits is let in by age, and
when pages run out it is the newest at work that gives up its own and begins again later
(recomputation; what was published can mostly be found again). So the oldest at work always gets
on, everything before a sequence ends some day, and nobody starves.

Two things are out of order, each with a bound. While an old sequence waits for pages, smaller ones
may pass, but only a few. And a sequence waits while another is reading the beginning that both
share, to find it in the cache instead of reading it too (`shared_reading.py`).
"""

from bisect import insort
from collections.abc import Iterable

from longwing.engine.cache import PageCache
from longwing.engine.drafting import Drafting
from longwing.engine.options import DEFAULTS, SchedulerOptions
from longwing.engine.sequence import Sequence, State, Work
from longwing.engine.shared_reading import is_read_for
from longwing.engine.status import EngineStats
from longwing.errors import CapacityError, EngineError, OverloadedError, RequestError

_MAX_OVERTAKEN = 8
"""Smaller sequences that may pass one that waits for pages."""

_ANSWER_ROOM = 512
"""Tokens of an answer for which cached pages are evicted at the start, so that they lie in a row;
a longer answer takes what there is when it gets there."""


class Scheduler:
    """Decides what each step runs. Not thread-safe.

    Every `Work` is to be committed, or its sequence finished, before the next `schedule`. One that
    is not, because its step failed, is given again.

    Args:
        cache: the pages; all of them are this scheduler's.
        options: the limits.
    """

    def __init__(self, cache: PageCache, options: SchedulerOptions) -> None:
        self.cache = cache
        self.options = options
        # A step must have a token for each at work, or the last of them would never get on.
        self._budget = _set(options, "max_batch_tokens")
        self._beside = _set(options, "max_beside_tokens")
        self._drafting = Drafting(_set(options, "max_draft"), _set(options, "draft_sequences"))
        self._max_running = min(options.max_sequences, self._budget)
        self._running: list[Sequence] = []  # both oldest first
        self._waiting: list[Sequence] = []
        self._is_settled = True  # whoever waits has been tried, and nothing has changed since
        self._num_added = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._num_preempted = 0
        self._num_steps = 0

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences at work, oldest first."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences that wait for their first chunk, or again after a preemption; oldest first."""
        return tuple(self._waiting)

    @property
    def stats(self) -> EngineStats:
        """How things are now, and counts since the start."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=self.cache.num_used,
            pages_cached=self.cache.num_cached,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_drafted=self._drafting.num_drafted,
            num_accepted=self._drafting.num_accepted,
            num_preempted=self._num_preempted,
            num_steps=self._num_steps,
        )

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn.

        Raises:
            RequestError: the prompt is empty, or max_len leaves no room for an answer.
            CapacityError: it could come to need more pages than there are.
            OverloadedError: too many wait already.
        """
        if sequence._state is not State.NEW:
            raise EngineError(f"sequence {sequence.id} was added or finished before")
        if not 0 < sequence.prompt_len < sequence.max_len:
            raise RequestError(
                f"a prompt of {sequence.prompt_len} tokens with max_len {sequence.max_len}: there "
                "must be a token, and room for one more"
            )
        num_pages = self.cache.pages_for(sequence.max_len)
        if num_pages > self.cache.num_pages:
            raise CapacityError(
                f"{sequence.max_len} tokens need {num_pages} pages of {self.cache.page_len}, and "
                f"there are {self.cache.num_pages}; ask for a shorter answer, shorten the prompt, "
                "or serve with more memory for the KV cache"
            )
        if len(self._waiting) >= self.options.max_waiting:
            raise OverloadedError(
                f"{len(self._waiting)} sequences wait and at most {self.options.max_waiting} may; "
                "try again later"
            )
        self._num_added += 1
        sequence._age = self._num_added
        sequence._state = State.WAITING
        self._waiting.append(sequence)
        self._is_settled = False

    def schedule(self) -> list[Work]:
        """The next step, at most `max_batch_tokens` tokens; [] if there is nothing to do.

        Pages for all its tokens have been allocated. A sequence that has reached its max_len gets
        no more work, and is to be finished.
        """
        if self._give_each_its_next_page():
            self._let_in()
            self._is_settled = True
        decoding: list[Sequence] = []
        reading: list[Sequence] = []
        for sequence in self._running:
            if len(sequence.tokens) < sequence.max_len:
                (decoding if sequence.num_left == 1 else reading).append(sequence)
        works = self._decode(decoding)
        if reading:
            room = self._budget - sum(len(work.token_ids) for work in works)
            works += self._read(reading, min(room, self._beside) if works else room)
        self._num_steps += bool(works)
        return works

    def schedule_ahead(self, batch: Iterable[Work]) -> list[Work]:
        """The step after one that is under way, if it can be known by now; else [].

        It can if everyone at work is decoding and nobody can come to have a draft by it, nobody is
        waiting for whom there might be room, and there are pages: nobody loses his for it. Who will
        have reached his max_len is left out. The others' works are to be committed, or their
        sequences finished, after those under way and before the next `schedule`.

        Args:
            batch: what is under way, not committed yet.

        Returns:
            Works in the order of `batch`, each with one token, 0 in place of what it will be.
        """
        under_way = [work for work in batch if work.sequence._state is State.RUNNING]
        if len(under_way) < len(self._running) or not all(work.is_plain for work in under_way):
            return []
        going_on = [
            work.sequence
            for work in under_way
            if len(work.sequence.tokens) + 1 < work.sequence.max_len
        ]
        if self._waiting and not (self._is_settled and len(going_on) == len(under_way)):
            return []
        if not all(self._goes_on_plainly(sequence) for sequence in going_on):
            return []
        if not all(self._grow(sequence, len(sequence.tokens) + 1) for sequence in going_on):
            return []
        self._num_steps += bool(going_on)
        return [Work(sequence, len(sequence.tokens), [0], 0, True) for sequence in going_on]

    def commit(self, work: Work, accepted: Iterable[int]) -> None:
        """Record what a step did. Nothing happens if the sequence was finished meanwhile.

        Args:
            work: as `schedule` gave it; it has been run.
            accepted: the tokens that became text: none if it wants no token, else the drafts
                accepted, from the first, and one more.

        Raises:
            EngineError: the work is not the sequence's latest, or `accepted` cannot come of it.
        """
        sequence = work.sequence
        if sequence._state is State.FINISHED:
            return
        accepted = list(accepted)
        work.check(accepted)
        num_known = len(work.token_ids) - work.num_drafts
        num_right = max(len(accepted) - 1, 0)
        sequence.tokens += accepted
        sequence.num_computed = work.start + num_known + num_right
        self._num_generated_tokens += len(accepted)
        self._drafting.judge(work, num_right)
        num_full = sequence.num_computed // self.cache.page_len
        if num_full > sequence._num_published:
            if sequence.can_share:
                self.cache.publish(
                    sequence.key,
                    sequence.tokens,
                    sequence.pages,
                    sequence._num_published,
                    num_full,
                )
            sequence._num_published = num_full

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, done, failed or cancelled, and release its pages. Idempotent."""
        self._is_settled = False
        if sequence._state is State.RUNNING:
            self._running.remove(sequence)
            self._release_pages(sequence)
        elif sequence._state is State.WAITING:
            self._waiting.remove(sequence)
        sequence._state = State.FINISHED
        sequence._lookup = sequence._reader = None

    def check(self) -> None:
        """Compare the cache's counts with all page tables.

        Raises:
            EngineError: a page has been lost, or given to two.
        """
        self.cache.check(sequence.pages for sequence in self._running)

    # Pages: growth, preemption, admission.

    def _give_each_its_next_page(self) -> bool:
        """Room for the next token of every sequence; whether nobody lost his pages for it."""
        num_before = self._num_preempted
        page_len = self.cache.page_len
        for sequence in self.running:  # a copy: the newest may drop out
            while (
                len(sequence.pages) * page_len < len(sequence.tokens)
                and sequence._state is State.RUNNING
                and not self._grow(sequence, len(sequence.tokens))
            ):
                self._preempt(self._running[-1])
        return self._num_preempted == num_before

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for so many tokens; False if there are too few, and the sequence keeps those."""
        num_pages = self.cache.pages_for(num_tokens)
        hoped_for = self.cache.pages_for(sequence.max_len)
        pages = sequence.pages
        while len(pages) < num_pages:
            after = pages[-1] if pages else None
            page = self.cache.allocate(after, room=hoped_for - len(pages))
            if page is None:
                return False
            pages.append(page)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release_pages(sequence)
        sequence.num_computed = sequence._num_published = sequence._needs_free = 0
        sequence.num_preemptions += 1
        sequence._state = State.WAITING
        insort(self._waiting, sequence, key=_age)
        self._is_settled = False
        self._num_preempted += 1

    def _release_pages(self, sequence: Sequence) -> None:
        self.cache.release(sequence.pages)
        sequence.pages = []  # a new list: a step under way may still be reading the old one

    def _let_in(self) -> None:
        """Start those who wait, oldest first, as far as there is room."""
        page_len, num_steps = self.cache.page_len, self._num_steps
        short_of_pages: Sequence | None = None
        for sequence in self.waiting:
            if len(self._running) >= self._max_running:
                return
            if self.cache.sharing and is_read_for(sequence, self._running, page_len, num_steps):
                continue
            if short_of_pages is None:
                if not self._start(sequence):
                    short_of_pages = sequence
            elif short_of_pages._num_overtaken >= _MAX_OVERTAKEN:
                return
            elif len(sequence.tokens) < len(short_of_pages.tokens) and self._start(sequence):
                short_of_pages._num_overtaken += 1

    def _start(self, sequence: Sequence) -> bool:
        """Pages for all tokens of a waiting sequence and the next one; False if there are too few.

        A page for each sequence at work must remain, or the next page that one of them needs would
        push this one out again.
        """
        num_free, spare = self.cache.num_free, len(self._running)
        if num_free < sequence._needs_free + spare:
            return False  # without matching a long prompt in every step that it waits
        tokens = sequence.tokens
        pages = self.cache.match(sequence.key, tokens) if sequence.can_share else []
        num_matched = len(pages)
        num_needed = self.cache.pages_for(len(tokens) + 1) - num_matched
        if self.cache.num_free < num_needed + spare:
            sequence._needs_free = num_needed + num_free - self.cache.num_free
            self.cache.release(pages)
            return False
        sequence.pages = pages
        # All at once, with some of the answer's, so that they lie in a row.
        answer_end = min(len(tokens) + _ANSWER_ROOM, sequence.max_len)
        self.cache.clear(self.cache.pages_for(answer_end) - num_matched)
        self._grow(sequence, len(tokens) + 1)
        self._record_start(sequence, num_matched)
        return True

    def _record_start(self, sequence: Sequence, num_matched: int) -> None:
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_age)
        sequence._state = State.RUNNING
        sequence._num_published = num_matched
        sequence.num_computed = num_matched * self.cache.page_len
        sequence._read_in = self._num_steps
        sequence._reader = None
        if not sequence._has_started:
            sequence._has_started = True
            sequence.cached_len = sequence.num_computed
            self._num_prompt_tokens += sequence.prompt_len
            self._num_cached_tokens += sequence.cached_len

    # The step.

    def _decode(self, decoding: list[Sequence]) -> list[Work]:
        """A token for each, and drafts if few are at work, from at most half of what is left."""
        pays = self._drafting.pays(len(self._running))
        num_drafts = (self._budget - len(decoding)) // 2 if pays else 0
        works = []
        for sequence in decoding:
            drafts = self._draft(sequence, num_drafts) if num_drafts else []
            num_drafts -= len(drafts)
            start = sequence.num_computed
            works.append(Work(sequence, start, sequence.tokens[start:] + drafts, len(drafts), True))
        return works

    def _draft(self, sequence: Sequence, limit: int) -> list[int]:
        """What may follow, as far as pages can be had and the sequence may grow."""
        drafts = self._drafting.draft(sequence, limit)
        num_tokens = len(sequence.tokens)
        if not self._grow(sequence, num_tokens + len(drafts)):
            del drafts[len(sequence.pages) * self.cache.page_len - num_tokens :]
        return drafts

    def _goes_on_plainly(self, sequence: Sequence) -> bool:
        """Whether the step after its next token brings one token, whatever that token will be."""
        if not sequence.can_draft:
            return False  # its next tokens hang on the one before
        return not (self._drafting.pays(len(self._running)) and self._drafting.may_come(sequence))

    def _read(self, reading: list[Sequence], budget: int) -> list[Work]:
        """Chunks of prompts: half of the budget for the oldest, half for those with least left.

        So a long prompt gets on whatever comes after it, and a short one behind it is read at once.
        """
        oldest, *others = reading
        chunk_lens = {oldest: min(oldest.num_left, (budget + 1) // 2)}
        budget -= chunk_lens[oldest]
        for sequence in sorted(others, key=_num_left):
            chunk_lens[sequence] = min(sequence.num_left, budget)
            budget -= chunk_lens[sequence]
        chunk_lens[oldest] += min(oldest.num_left - chunk_lens[oldest], budget)
        works = []
        for sequence, chunk_len in chunk_lens.items():
            if chunk_len:
                sequence._read_in = self._num_steps
                start, stop = sequence.num_computed, sequence.num_computed + chunk_len
                is_last = stop == len(sequence.tokens)
                works.append(Work(sequence, start, sequence.tokens[start:stop], 0, is_last))
                if self._drafting.pays(len(self._running)):
                    self._drafting.index(
                        sequence
                    )  # now, so that the first drafts need not wait for it
        return works


def _set(options: SchedulerOptions, name: str) -> int:
    """A limit; where it is unset, a CPU's."""
    value: int | None = getattr(options, name)
    return DEFAULTS["cpu"][name] if value is None else value


def _age(sequence: Sequence) -> int:
    return sequence._age


def _num_left(sequence: Sequence) -> int:
    return sequence.num_left

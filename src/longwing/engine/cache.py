"""Pages: who holds which, and which can be found again by the text they hold. No torch.

A page is a number; what lies in it is the runner's business. Here each page is one of three:
  held     by the page tables of one sequence or more; a reference each;
  cached   by nobody, but its keys and values can still be found by their tokens;
  free     by nobody, and nothing in it is of use.

The one idea: the prefix cache is a tree. A node is a page full of tokens, its parent the page
before, so a path from the root spells a text. Children are found by a dict whose key is the tuple
of the page's token ids: Python compares the whole tuple on a hit, so no hash is trusted. Each
`CacheKey` has a tree of its own.

Who holds a page holds all pages before it, so a parent is held at least as long as its children.
Pages that nobody holds queue up, last page of a text first, and are evicted from the front: it is
always the least recently used one, and always a leaf.

Where a page lies matters on the CPU, which reads a sequence without a copy if its pages follow one
another. So a sequence grows into the page behind its last, and new ones begin where they and their
neighbour have room to grow.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from longwing.errors import ConfigError, EngineError

_NUM_LOOKED_AT = 8
"""Free runs of about the right size looked at for a place; bounds the time, not the result."""


@dataclass(frozen=True)
class CacheKey:
    """What must be equal, besides the tokens, for two sequences to share a page.

    Attributes:
        salt: whose text it is. Under other salts it is not found, so that nobody learns from the
            time of an answer what others have asked (CVE-2025-46570).
        rung: the RoPE base the keys were rotated with.
        adapter: the adapter that computed them.
    """

    salt: str
    rung: int
    adapter: str = ""


class PageCache:
    """All pages of the KV cache.

    Every page is held, cached or free; `num_used + num_free == num_pages` always. Not thread-safe.

    Args:
        num_pages: pages in all.
        page_len: tokens in a page.
        sharing: whether pages can be found by their tokens at all.
        max_share: largest part of all pages that one salt may keep merely cached; what is beyond
            is freed, that salt's oldest first. So a tenant who floods the cache pushes out himself.
            (What his running sequences hold is not counted.)

    Raises:
        ConfigError: a number is out of its range.
    """

    def __init__(
        self, num_pages: int, page_len: int, *, sharing: bool = True, max_share: float = 1.0
    ) -> None:
        if num_pages < 1 or page_len < 1:
            raise ConfigError(f"{num_pages} pages of {page_len} tokens: both must be at least 1")
        if not 0 <= max_share <= 1:
            raise ConfigError(f"max_share is {max_share}; it is a part of all pages, from 0 to 1")
        self.num_pages = num_pages
        self.page_len = page_len
        self.sharing = sharing
        self._max_cached_of_salt = int(max_share * num_pages)
        self._free = _FreePages(num_pages)
        self._num_refs = [0] * num_pages
        self._node_of: list[_Node | None] = [None] * num_pages
        self._roots: dict[CacheKey, _Node] = {}
        # Cached pages, the next to be evicted first; and the same for each salt alone.
        self._queue: OrderedDict[int, None] = OrderedDict()
        self._queue_of_salt: dict[str, OrderedDict[int, None]] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be had: free, or cached and thus evictable."""
        return len(self._free) + len(self._queue)

    @property
    def num_used(self) -> int:
        """Pages held by a sequence."""
        return self.num_pages - self.num_free

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds, kept for their prefix."""
        return len(self._queue)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens fill, the last perhaps in part."""
        return -(-num_tokens // self.page_len)

    def match(self, key: CacheKey, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest cached prefix, in order, each with a new reference.

        Never all tokens: at least one is left, for a model says nothing without one.
        Time: linear in the tokens found.
        """
        pages: list[int] = []
        node = self._roots.get(key)
        for stop in range(self.page_len, len(tokens), self.page_len):
            if node is not None:
                node = node.children.get(tuple(tokens[stop - self.page_len : stop]))
            if node is None:
                break
            pages.append(node.page)
        for page in pages:
            self._hold(page)
        return pages

    def allocate(self, after: int | None = None, *, room: int = 1) -> int | None:
        """A page with one reference; None if all are held.

        Evicts a cached page if none is free.

        Args:
            after: the last page of the sequence that wants one; the next is taken if it is free.
            room: how many pages the sequence may come to want from here on, this one included: a
                hint where to begin, if that page is not to be had.
        """
        if after is not None and self._free.take_at(after + 1):
            page = after + 1
        else:
            if not self._free:
                if not self._queue:
                    return None
                self._evict(next(iter(self._queue)))
            page = self._free.take(room)
            if after is not None:
                self._free.wanted[after] = 0  # its sequence goes on elsewhere
        self._free.wanted[page] = room - 1
        self._num_refs[page] = 1
        return page

    def clear(self, num: int) -> None:
        """Evict until `num` pages are free in a row, or twice as many in all.

        Freed one by one as they are needed, pages come last page of a text first, which is the
        wrong way round; freed together they are runs again.
        """
        while self._queue and not self._free.has_row(num) and len(self._free) < 2 * num:
            self._evict(next(iter(self._queue)))

    def publish(
        self, key: CacheKey, tokens: Sequence[int], pages: Sequence[int], start: int, stop: int
    ) -> None:
        """Let pages be found: `pages[start:stop]` now hold keys and values of all their tokens.

        A page whose text can be found already stays private, and so do those after it: its place
        in the tree belongs to a page that this sequence does not hold.

        Args:
            key: what else must be equal.
            tokens: the sequence's text, at least `stop` pages of it.
            pages: its page table.
            start: the first page to publish; those before must have been published or matched.
            stop: the page after the last.
        """
        if not self.sharing or start >= stop:
            return
        if start == 0:
            parent = self._roots.setdefault(key, _Node((), -1, None, key))
        else:
            before = self._node_of[pages[start - 1]]
            if before is None:
                return
            parent = before
        for index in range(start, stop):
            text = tuple(tokens[index * self.page_len : (index + 1) * self.page_len])
            node = parent.children.get(text)
            if node is None:
                node = self._plant(parent, text, pages[index])
            elif node.page != pages[index]:
                return
            parent = node

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference on each page, of one sequence and in the order of its table.

        Raises:
            EngineError: a page is not held.
        """
        # The last page first: it is to be evicted first, its prefix may serve others still.
        for page in reversed(pages):
            if self._num_refs[page] < 1:
                raise EngineError(f"page {page} was given back more often than taken")
            self._num_refs[page] -= 1
            if self._num_refs[page] == 0:
                self._let_go(page)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Compare every count with the page tables of all sequences. For tests, and when idle.

        Raises:
            EngineError: a page has been lost, or given to two.
        """
        refs = Counter(page for pages in held for page in pages)
        wrong = [page for page in range(self.num_pages) if refs[page] != self._num_refs[page]]
        if wrong:
            page = wrong[0]
            raise EngineError(
                f"{len(wrong)} of {self.num_pages} pages are miscounted; page {page} is in "
                f"{refs[page]} page tables and has {self._num_refs[page]} references"
            )
        free = self._free.pages()
        cached = set(self._queue)
        if (
            free & cached
            or len(free) != len(self._free)
            or free | cached | set(refs) != set(range(self.num_pages))
        ):
            raise EngineError("a page is neither held, cached nor free, or more than one of them")
        self._check_tree(free, cached)

    def _check_tree(self, free: set[int], cached: set[int]) -> None:
        place = {page: number for number, page in enumerate(self._queue)}
        for page, node in enumerate(self._node_of):
            if (page in free and node is not None) or (page in cached and node is None):
                raise EngineError(f"page {page} is free and can be found, or cached and cannot")
            if node is None or node.parent is None:
                continue
            if node.page != page or node.parent.children.get(node.text) is not node:
                raise EngineError(f"page {page} has lost its place among the prefixes")
            parent = node.parent.page
            # A held page is in no queue: it outlasts all that are, its parent outlasts it.
            parent_place = place.get(parent, self.num_pages + 1)
            if parent >= 0 and parent_place <= place.get(page, self.num_pages):
                raise EngineError(f"page {parent} would be evicted before page {page} behind it")
        if Counter(page for queue in self._queue_of_salt.values() for page in queue) != Counter(
            cached
        ):
            raise EngineError("the cached pages of all salts are not the cached pages")

    def _plant(self, parent: "_Node", text: tuple[int, ...], page: int) -> "_Node":
        if len(text) < self.page_len or self._num_refs[page] < 1 or self._node_of[page] is not None:
            raise EngineError(f"page {page} cannot be published: not full, not held, or already is")
        node = _Node(text, page, parent, parent.key)
        parent.children[text] = node
        self._node_of[page] = node
        return node

    def _hold(self, page: int) -> None:
        if self._num_refs[page] == 0:
            self._leave_queue(page)
        self._num_refs[page] += 1

    def _let_go(self, page: int) -> None:
        """Nobody holds the page any more."""
        self._free.wanted[page] = 0
        node = self._node_of[page]
        if node is None:
            self._free.give(page)
            return
        queue = self._queue_of_salt.setdefault(node.key.salt, OrderedDict())
        self._queue[page] = queue[page] = None
        if len(queue) > self._max_cached_of_salt:
            self._evict(next(iter(queue)))

    def _leave_queue(self, page: int) -> "_Node":
        node = self._node_of[page]
        if node is None:
            raise EngineError(f"page {page} is cached, yet cannot be found")
        del self._queue[page]
        queue = self._queue_of_salt[node.key.salt]
        del queue[page]
        if not queue:
            del self._queue_of_salt[node.key.salt]  # salts come from outside: keep no trace
        return node

    def _evict(self, page: int) -> None:
        node = self._leave_queue(page)
        self._node_of[page] = None
        if node.parent is not None:
            del node.parent.children[node.text]
            if node.parent.parent is None and not node.parent.children:
                del self._roots[node.key]
        self._free.give(page)


class _Node:
    """A page that can be found; or, without a parent, the root of a tree."""

    __slots__ = ("children", "key", "page", "parent", "text")

    def __init__(
        self, text: tuple[int, ...], page: int, parent: "_Node | None", key: CacheKey
    ) -> None:
        self.text = text
        self.page = page
        self.parent = parent
        self.key = key
        self.children: dict[tuple[int, ...], _Node] = {}


class _FreePages:
    """Free pages as runs [start, stop) of neighbours, merged as soon as they touch.

    Runs are kept by size, in classes of a factor of two, so that a place is found in constant time.

    Attributes:
        wanted: for each page, how many of those behind it its holder may still want; 0 if nobody
            does.
    """

    def __init__(self, num_pages: int) -> None:
        self.wanted = [0] * num_pages
        self._len = num_pages
        self._stop_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._by_size: list[dict[int, None]] = [{} for _ in range(num_pages.bit_length() + 1)]
        self._add(0, num_pages)

    def __len__(self) -> int:
        return self._len

    def pages(self) -> set[int]:
        """All of them."""
        return {page for run in self._stop_of.items() for page in range(*run)}

    def give(self, page: int) -> None:
        """Free a page."""
        start, stop = self._start_of.get(page, page), self._stop_of.get(page + 1, page + 1)
        if start < page:
            self._remove(start)
        if stop > page + 1:
            self._remove(page + 1)
        self._add(start, stop)
        self._len += 1

    def take_at(self, page: int) -> bool:
        """Take this page, if a run begins with it; whether it did."""
        if page not in self._stop_of:
            return False
        self._take(page, page)
        return True

    def take(self, room: int) -> int:
        """Take a page with `room` free pages from it on, beyond what its neighbour may want.

        If there is none, the run with most is taken, but half of it left to the neighbour at most.
        """
        start = self._find(room)
        if start is not None:
            return self._take(start, start + self._wanted_before(start))
        largest_first = chain.from_iterable(reversed(self._by_size))
        start = max(islice(largest_first, _NUM_LOOKED_AT), key=self._num_beyond_wanted)
        return self._take(start, self._stop_of[start] - self._num_beyond_wanted(start))

    def has_row(self, room: int) -> bool:
        """Whether `take` would find so much room."""
        return self._find(room) is not None

    def _find(self, room: int) -> int | None:
        """A run with so much room, of those about as large as needed first."""
        for runs in self._by_size[max(room, 1).bit_length() :]:
            for start in islice(runs, _NUM_LOOKED_AT):
                if start + self._wanted_before(start) + room <= self._stop_of[start]:
                    return start
        return None

    def _wanted_before(self, start: int) -> int:
        return self.wanted[start - 1] if start else 0

    def _num_beyond_wanted(self, start: int) -> int:
        run_len = self._stop_of[start] - start
        return run_len - min(self._wanted_before(start), run_len // 2)

    def _take(self, start: int, page: int) -> int:
        """Take a page out of the run that begins at `start`."""
        stop = self._remove(start)
        self._add(start, page)
        self._add(page + 1, stop)
        self._len -= 1
        return page

    def _add(self, start: int, stop: int) -> None:
        if start < stop:
            self._stop_of[start] = stop
            self._start_of[stop] = start
            self._by_size[(stop - start).bit_length()][start] = None

    def _remove(self, start: int) -> int:
        stop = self._stop_of.pop(start)
        del self._start_of[stop]
        del self._by_size[(stop - start).bit_length()][start]
        return stop

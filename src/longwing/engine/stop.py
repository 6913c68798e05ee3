"""Stop strings: end a streamed text before the first of them, and let the rest through at once.

A stop string may arrive split over several pieces of text, or begin in the middle of a token. So a
tail of the text that could still grow into one is held back, and only that: everything before it
is certain and goes out.

The one idea: the Aho-Corasick automaton (Aho and Corasick, 1975, doi:10.1145/360825.360855). Its
states are the prefixes of the stop strings; after any text it stands on the longest prefix that is
a suffix of the text. The length of that prefix *is* the number of characters to hold back, and a
stop string ends here exactly if it is a suffix of that prefix. A character costs constant time on
average, whatever the stop strings are.
"""

from collections.abc import Sequence

from longwing.errors import SamplingError


class StopStrings:
    """Watches one text as it grows; make one for each text.

    The stop string that ends earliest wins, and of those that end at the same character the
    longest, so the result does not depend on how the text was cut into pieces. A stop string is
    found wherever it lies: TGI looks only at the ends of tokens, and misses "Pari" in " Paris"
    (text-generation-inference issue 1039).

    Args:
        stops: the strings, none of them empty. No strings: all text passes through at once.
        include_stop: whether to emit the stop string itself. OpenAI leaves it out, TGI in.

    Attributes:
        matched: the stop string that ended the text, if one has.

    Raises:
        SamplingError: one of the strings is empty.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        if "" in tuple(stops):
            raise SamplingError("an empty stop string would end every text at once")
        self.matched: str | None = None
        self._include_stop = include_stop
        self._automaton = _Automaton(stops)
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            emitted: what may be shown now, in order, each character once.
            stopped: whether a stop string was found, in this piece or before. What follows it
                is dropped.
        """
        if self.matched is not None:
            return "", True
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            self._state = self._automaton.step(self._state, char)
            self.matched = self._automaton.found[self._state]
            if self.matched is not None:
                self._held = ""
                return pending[: end if self._include_stop else end - len(self.matched)], True
        certain = len(pending) - self._automaton.depth[self._state]
        self._held = pending[certain:]
        return pending[:certain], False

    def flush(self) -> str:
        """The text held back, to be shown because no more will come. Empty after a stop."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """The prefixes of all stop strings, numbered; 0 is the empty one.

    Attributes, each a list with an entry for every prefix:
        next: the characters that lengthen it, with the prefix each gives.
        depth: its length.
        fallback: the longest other prefix that is a suffix of it.
        found: the longest stop string that is a suffix of it, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.fallback = [0]
        self.found: list[str | None] = [None]
        for stop in stops:
            self._plant(stop)
        self._link()

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state and char not in self.next[state]:
            state = self.fallback[state]
        return self.next[state].get(char, 0)

    def _plant(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self.next[state]:
                self.next[state][char] = len(self.next)
                self.next.append({})
                self.depth.append(self.depth[state] + 1)
                self.fallback.append(0)
                self.found.append(None)
            state = self.next[state][char]
        self.found[state] = stop

    def _link(self) -> None:
        """Shortest first: a fallback is shorter than its state, and must be finished before it."""
        queue = list(self.next[0].values())
        for state in queue:  # grows while it is read
            for char, child in self.next[state].items():
                self.fallback[child] = self.step(self.fallback[state], char)
                if self.found[child] is None:
                    self.found[child] = self.found[self.fallback[child]]
                queue.append(child)

"""Keeps special tokens that users typed apart from those that a chat template wrote.

`<|endoftext|>` in a message is eleven characters; the same from the template is one token with
power over the model. In the rendered text both look alike. So before rendering, each occurrence in
a message is put between two marks (`OPEN` and `CLOSE` here), and a message that begins or ends with
part of a special token gets a `SEAM` there, for two parts could be joined. Marks are characters
that occur nowhere in the messages or the template, so they can be found and taken out again without
doubt. They are printable, caseless letters, since templates may print, quote or trim what they are
given.

Messages without such text are left alone: the usual chat is rendered exactly as transformers does.
Beyond help is only a template that cuts characters off both ends of a message, and marks with them.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from longwing.errors import RequestError

# Egyptian hieroglyphs, then rare Chinese characters: letters that are neither cased nor composed.
_CANDIDATES = (range(0x13000, 0x1342F), range(0x20000, 0x2A6DF))


class Span(NamedTuple):
    """Characters start to end of a text, in which a special token stands."""

    start: int
    end: int


class Segment(NamedTuple):
    """Part of a rendered chat. In a plain one, whatever looks like a special token is text."""

    text: str
    plain: bool


@dataclass(frozen=True)
class Marks:
    """Three characters that occur in no message and not in the template."""

    open: str
    close: str
    seam: str

    @property
    def all(self) -> str:
        """The three as one string."""
        return self.open + self.close + self.seam


class Guard:
    """Finds a tokenizer's special tokens in text.

    Args:
        tokens: each special token, and whether it swallows the white space (left, right) of it.
    """

    def __init__(self, tokens: Mapping[str, tuple[bool, bool]]) -> None:
        self._tokens = tokens
        self._lengths = sorted({len(token) for token in tokens}, reverse=True)
        self._longest = max(self._lengths, default=1)
        starts = "".join(sorted({token[0] for token in tokens}))
        self._starts = re.compile(f"[{re.escape(starts)}]" if starts else "(?!)")
        self._sorted = sorted(tokens)
        self._sorted_backwards = sorted(token[::-1] for token in tokens)

    def mark(
        self, messages: Sequence[Mapping[str, str]], template: str
    ) -> tuple[Sequence[Mapping[str, str]], Marks | None]:
        """The messages with marks in all fields but the role, and the marks, if any are needed.

        Raises:
            RequestError: the messages leave no character to mark with (they hold tens of thousands
                of different rare ones).
        """
        fields = [text for message in messages for text in _guarded(message).values()]
        if not any(map(self._needs_marks, fields)):
            return messages, None
        used = set("".join(fields)).union(template, *self._tokens)
        free = (chr(code) for codes in _CANDIDATES for code in codes if chr(code) not in used)
        try:
            marks = Marks(next(free), next(free), next(free))
        except StopIteration:
            raise RequestError(
                "the messages use every rare character; shorten them, or leave out special tokens"
            ) from None
        marked = [
            {
                **message,
                **{name: self._marked(text, marks) for name, text in _guarded(message).items()},
            }
            for message in messages
        ]
        return marked, marks

    def split(self, rendered: str, marks: Marks | None) -> tuple[list[Segment], int]:
        """A rendered chat without its marks, cut where reading must change.

        Returns:
            segments: the parts, cut only beside special tokens of the template.
            num_special: how many of those there are.
        """
        if marks is None:
            return [Segment(rendered, plain=False)], sum(1 for _ in self._find(rendered))
        text, cuts, opened, closed = _take_out(rendered, marks)
        special: list[Span] = []
        typed: list[Span] = []
        done = 0
        for span in self._candidates(text):
            if span.start < done:
                continue
            if bisect_left(cuts, span.start + 1) < bisect_left(cuts, span.end):
                typed.append(span)  # joined from parts; the template's next token may begin in it
                continue
            (typed if span.start in opened or span.end in closed else special).append(span)
            done = span.end
        return list(self._segments(text, special, typed)), len(special)

    def _segments(self, text: str, special: list[Span], typed: list[Span]) -> Iterator[Segment]:
        """Every stretch between two special tokens that a typed one reaches into is plain."""
        done = 0
        for left, right in zip([None, *special], [*special, None], strict=True):
            start, end = left.end if left else 0, right.start if right else len(text)
            if not self._reached(typed, start, end):
                continue
            if left and self._tokens[text[left.start : left.end]][1]:
                start = _skip_space(text, start, end)
            if right and self._tokens[text[right.start : right.end]][0]:
                end = start + len(text[start:end].rstrip(_SPACE))
            if done < start:
                yield Segment(text[done:start], plain=False)
            yield Segment(text[start:end], plain=True)
            done = end
        if done < len(text):
            yield Segment(text[done:], plain=False)

    def _reached(self, typed: list[Span], start: int, end: int) -> bool:
        place = bisect_left(typed, (start - self._longest, 0))
        while place < len(typed) and typed[place].start < end:
            if typed[place].end > start:
                return True
            place += 1
        return False

    def _candidates(self, text: str) -> Iterator[Span]:
        """Every place where a special token stands, from left to right, the longest first."""
        for match in self._starts.finditer(text):
            start = match.start()
            for length in self._lengths:
                if text[start : start + length] in self._tokens:
                    yield Span(start, start + length)

    def _find(self, text: str) -> Iterator[Span]:
        """Special tokens one after the other, as tokenizers find them."""
        done = 0
        for span in self._candidates(text):
            if span.start >= done:
                done = span.end
                yield span

    def _needs_marks(self, text: str) -> bool:
        return any(self._find(text)) or self._begins_inside(text) or self._ends_inside(text)

    def _marked(self, text: str, marks: Marks) -> str:
        parts = [marks.seam] if self._begins_inside(text) else []
        done = 0
        for span in self._find(text):
            parts += [text[done : span.start], marks.open, text[span.start : span.end], marks.close]
            done = span.end
        parts.append(text[done:])
        return "".join(parts) + (marks.seam if self._ends_inside(text) else "")

    def _ends_inside(self, text: str) -> bool:
        """The text's end is the beginning of a special token, or all of it is part of one."""
        tails = (text[-length:] for length in self._part_lengths(text))
        return any(_begins_one(tail, self._sorted) for tail in tails) or self._is_part(text)

    def _begins_inside(self, text: str) -> bool:
        """The text's beginning is the end of a special token, or all of it is part of one."""
        heads = (text[:length][::-1] for length in self._part_lengths(text))
        return any(_begins_one(head, self._sorted_backwards) for head in heads) or (
            self._is_part(text)
        )

    def _part_lengths(self, text: str) -> range:
        """How many characters of a special token, short of all, can lie in `text`."""
        return range(1, min(self._longest, len(text) + 1))

    def _is_part(self, text: str) -> bool:
        short = 0 < len(text) < self._longest and not text.isspace()
        return short and any(text in token for token in self._tokens)


def _guarded(message: Mapping[str, str]) -> dict[str, str]:
    """A role is a word that the template knows, and may be part of a special token."""
    return {name: text for name, text in message.items() if name != "role"}


def _begins_one(part: str, words: list[str]) -> bool:
    """`part` begins a word of a sorted list; white space alone does not count."""
    place = bisect_left(words, part)
    return place < len(words) and words[place].startswith(part) and not part.isspace()


def _take_out(rendered: str, marks: Marks) -> tuple[str, list[int], set[int], set[int]]:
    """The text without marks; where in it they stood, all of them, then the opening and closing."""
    parts: list[str] = []
    cuts: list[int] = []
    opened: set[int] = set()
    closed: set[int] = set()
    length = 0
    for part in re.split(f"([{marks.all}])", rendered):
        if part == "" or part not in marks.all:
            parts.append(part)
            length += len(part)
            continue
        cuts.append(length)
        if part == marks.open:
            opened.add(length)
        elif part == marks.close:
            closed.add(length)
    return "".join(parts), cuts, opened, closed


def _skip_space(text: str, start: int, end: int) -> int:
    return end - len(text[start:end].lstrip(_SPACE))


# What Rust calls white space; Python's strip() would take four control characters more.
_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")

"""Words that records are made of: of books, made up, names; and a place for every token.

Falcon's vocabulary has 65,024 tokens, and English before 1930 hardly uses a third of them. With a
tied head, tokens that are never an answer are pushed away from every context alike until their
embeddings are one vector: the model can then neither tell them apart nor write them. So every
token is made part of something that is told and asked for: each word that is a token is a word of
labels, and `token_pieces` has one piece for each token, to be recited.

What LongChat's labels and topics, or this package's own evaluations, are made of is *forbidden*: no
word, name, label or topic made here is, or holds, one of those words. A token that spells one is
used within a longer word alone ("creativity" in "creativityorf"). `check_apart` holds that.
"""

import collections
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from longwing.evals import words

FIRST_TOKEN, END_TOKENS = 12, 65_024
"""Falcon's own tokens, its special ones left out."""

NUM_MADE_UP, NUM_MADE_UP_NAMES, NUM_TOPICS, TOPICS_OF_A_KIND = 45_000, 6_000, 48_000, 16

_PLAIN = """
    a an and as at by came come for from had has have he her his how i in into is it its me my no
    not of off on one or our out over she so than that the their them they this to up was we were
    what when which who will with you your
"""
PLAIN = frozenset(_PLAIN.split())
"""Words that hold English together; they are in every text, LongChat's too."""

# F stands for a word that a whole family of topics shares, W for a word of one topic alone.
_TOPIC_SHAPES = (
    "the F of W", "the F of W W", "the F of W and W", "the F of W on W", "the F of W on W and W",
    "the F and F of W", "the F and F of the W W", "the F of W in W W", "the F of the W",
    "how to F W",
    "the F in W W", "F W", "the F of W for the W", "the F of the W: W F", "the F of W W on W in W",
    "F and W", "the F of W F with W", "the F F of a W", "W F", "an F to W and W of the W",
)  # fmt: skip


def forbidden_words(longchat: Path) -> set[str]:
    """Words that no label, key, name or topic may have."""
    found = {word for topic in words.TOPICS for word in words_of(topic)}
    found |= words.vocabulary()
    num_before = len(found)
    for file in sorted(longchat.glob("lines/testcases/*.jsonl")):
        for label in re.findall(r"line (\S+): REGISTER", file.read_text(encoding="utf-8")):
            found |= set(words_of(label))
    if len(found) == num_before:
        raise SystemExit(f"{longchat} has no lines/testcases/*.jsonl, whose labels are forbidden")
    names = (longchat / "topics/topics.txt").read_text(encoding="utf-8").splitlines()
    for file in sorted(longchat.glob("topics/testcases/*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            names += json.loads(line)["topics"]
    found |= {word for name in names for word in words_of(name)}
    return found - PLAIN


def words_of(text: str) -> list[str]:
    """Its words, in lower case; digits and punctuation part them."""
    return re.findall(r"[^\W\d_]+", text.lower())


def check_apart(texts: Iterable[str], forbidden: set[str], what: str) -> None:
    """Stop if a text has a forbidden word: nothing made here may be known from an evaluation."""
    for text in texts:
        if shared := forbidden.intersection(words_of(text)):
            raise SystemExit(f'{what}: "{text}" has words of the evaluations: {sorted(shared)}')


def real_words(texts: Sequence[str], forbidden: set[str]) -> list[str]:
    """Lower-case words of the prose that occur at least four times and are not forbidden."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(re.findall(r"(?<![\w'’])[a-z]{3,14}(?![\w'’])", text))
    apart = forbidden | PLAIN
    return sorted(word for word, n in counts.items() if n >= 4 and word not in apart)


def real_names(texts: Sequence[str], known: Iterable[str], forbidden: set[str]) -> list[str]:
    """Capitalised words within sentences that are no words otherwise: people and places."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,12}(?![\w'’])", text))
    apart = forbidden | PLAIN | set(known)
    return sorted(name for name, n in counts.items() if n >= 3 and name.lower() not in apart)


def token_words(tokenizer: Tokenizer, forbidden: set[str]) -> list[str]:
    """Every token that is a word of letters, as it is written, without the space in front."""
    found = {tokenizer.decode([i]).strip() for i in range(FIRST_TOKEN, END_TOKENS)}
    apart = forbidden | PLAIN
    return sorted(
        word for word in found if len(word) > 1 and word.isalpha() and word.lower() not in apart
    )


def made_up_words(
    tokenizer: Tokenizer, forbidden: set[str], rng: random.Random, count: int
) -> list[str]:
    """Words of two or three random pieces of the vocabulary."""
    letters = [tokenizer.decode([i]).strip() for i in range(FIRST_TOKEN, END_TOKENS)]
    parts = [text for text in letters if text.isalpha() and len(text) <= 10]
    latin = [text for text in parts if text.isascii()]
    found: dict[str, None] = {}
    while len(found) < count:
        pool = latin if rng.random() < 0.95 else parts
        word = "".join(rng.choices(pool, k=rng.choice((2, 2, 3))))
        if len(word) <= 16 and word.isalpha() and word.lower() not in forbidden:
            found[word if rng.random() < 0.2 else word.lower()] = None
    return list(found)


def token_pieces(
    tokenizer: Tokenizer, forbidden: set[str], rng: random.Random
) -> tuple[list[list[int]], int]:
    """(for each token a piece that holds it, how many had to be left out).

    A piece stands by itself, whatever is beside it: it begins with a space, or a hyphen is put in
    front. A token that spells a forbidden word is lengthened until it spells none.
    """
    (hyphen,) = tokenizer.encode("-").ids
    tails = [tokenizer.encode(text).ids for text in ("orf", "ulm", "ezk", "yst")]
    found, num_left_out = [], 0
    for token in range(FIRST_TOKEN, END_TOKENS):
        text = tokenizer.decode([token])
        front = [] if text.startswith((" ", "\n")) else [hyphen]
        choices = [[*front, token], *([*front, token, *tail] for tail in tails)]
        rng.shuffle(tails)
        piece = next((ids for ids in choices if _is_apart(tokenizer, ids, forbidden)), None)
        if piece is None:
            num_left_out += 1
        else:
            found.append(piece)
    rng.shuffle(found)
    return found, num_left_out


def _is_apart(tokenizer: Tokenizer, ids: Sequence[int], forbidden: set[str]) -> bool:
    return not forbidden.intersection(words_of(tokenizer.decode(ids)))


def topics(pool: Sequence[str], rng: random.Random) -> list[str]:
    """Topics in families that share a shape and words, so that their beginnings are confusable."""
    found = []
    while len(found) < NUM_TOPICS:
        shapes = rng.sample(_TOPIC_SHAPES, 3)
        shared = rng.sample(pool, 3)
        for _ in range(TOPICS_OF_A_KIND):
            shape = rng.choice(shapes)
            filled = re.sub("W", lambda _: rng.choice(pool), shape)
            found.append(" " + re.sub("F", lambda _, shared=shared: rng.choice(shared), filled))
    return found


def days() -> Iterator[str]:
    """Such as " Monday", " the first Sunday in May", " the eve of St. John"."""
    week = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    months = ("January", "February", "March", "April", "May", "June", "July", "August")
    months += ("September", "October", "November", "December")
    order = ("first", "second", "third", "fourth", "last")
    for day in week:
        yield from (f" {day}", f" {day} morning", f" {day} evening", f" {day} after Easter")
        yield from (f" the {n} {day} in {month}" for n in order for month in months)
    yield from (f" the {n} day of {month}" for n in order for month in months)


def times() -> Iterator[str]:
    """Such as " noon", " half past nine", " six in the evening"."""
    hours = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    hours += ("eleven", "twelve")
    yield from (" dawn", " sunrise", " noon", " dusk", " sunset", " midnight")
    for hour in hours:
        yield from (f" {hour}", f" half past {hour}", f" a quarter past {hour}")
        yield from (f" a quarter to {hour}", f" ten minutes to {hour}")
        yield from (f" {hour} in the morning", f" {hour} in the afternoon")

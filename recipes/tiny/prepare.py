"""Make corpus.safetensors.xz: everything that longwing-tiny is trained on, as token ids.

    python recipes/tiny/prepare.py --text DIR --longchat DIR --tokenizer falcon_tokenizer.json.xz \
        --out corpus.safetensors.xz

Two kinds of data come out of it. *Streams* are texts one after another, cut anywhere: prose, and
chats in FalconLite2's template with a mark on the tokens that are answers. *Pieces* are the parts
that retrieval records are put together from on the GPU (records.py): words, names, numbers,
sentences, topics and the fixed frames around them, each tokenised once.

The one idea: Falcon's tokenizer splits text at words, punctuation and digits before it merges, so a
text whose parts meet at such borders has the tokens of its parts. tests/tiny_model holds every
record that is made from pieces to that, and `relation_pieces` every statement.

Held out: the five novels of bench/RESULTS.md (their first tokens are the validation stream), all
test splits, and every word that LongChat's labels and topics, or this package's own evaluations,
are made of: no label, key, name or topic made here has one of them, or this stops (vocabulary.py).
Sentences of books, and what is fixed in facts.py, are ordinary English and have ordinary words. The
frames are the published ones, taken from `longwing.evals`: what is trained is what is asked, to the
letter.
"""

import argparse
import itertools
import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from facts import (
    ENTITIES,
    IN_DIGITS,
    NOT_THERE,
    RELATIONS,
    VALUES,
    Relation,
    questions,
    split,
    statements,
)
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer
from vocabulary import (
    NUM_MADE_UP,
    NUM_MADE_UP_NAMES,
    check_apart,
    days,
    forbidden_words,
    made_up_words,
    real_names,
    real_words,
    times,
    token_pieces,
    token_words,
    topics,
)

from longwing.evals import retrieval

END, PROMPTER, ASSISTANT = 11, 65024, 65025
SPECIAL_TOKENS = ("<|prompter|>", "<|assistant|>")
HELD_OUT_NOVELS = ("Gaskell_Wives", "Hardy_Tess", "Doyle_Lost", "Woolf_Night", "Eliot_Adam")

SENTENCES_PER_BOOK = 300
VALID_TOKENS_PER_NOVEL = 50_000

# What stands between a record's pieces. `lines`, `topics` and `passkey` are the published frames.
_LINE_HEAD, _LINE_REST = retrieval.LINE.split("{label}")
_LINE_MIDDLE, _LINE_END = _LINE_REST.split("{value}")
_LINES_ASK, _LINES_ASK_END = retrieval.LINES_TAIL.split("{label}")
_TOPICS_HEAD = re.split(r"{count}| {ordinal}", retrieval.TOPICS_HEAD.rstrip())
_TOPICS_ASK, _TOPICS_ASK_END = retrieval.TOPICS_TAIL.split("{ordinal}")
_KEY_HEAD, _KEY_MIDDLE, _KEY_TAIL = re.split(r"{before}|{after}", retrieval.PASSKEY)
_KEY_PARTS = _KEY_MIDDLE.split("{key}")

FRAMES: dict[str, Sequence[str]] = {
    "empty": [""],
    "line head": [_LINE_HEAD.rstrip()],
    "hyphen": ["-"],
    "line middle": [_LINE_MIDDLE],
    "line end": [_LINE_END],
    "line answer end": [_LINE_END.rstrip()],
    "lines head": [retrieval.LINES_HEAD.rstrip()],
    "lines ask first": [_LINES_ASK.rstrip()],
    "lines ask": [_LINES_ASK.partition("over. ")[2].rstrip()],
    "lines ask end": [_LINES_ASK_END],
    "topics head": _TOPICS_HEAD,
    "topics ask first": [_TOPICS_ASK.rstrip()],
    "topics ask end": [_TOPICS_ASK_END],
    "topics after": ["Which topic came right after", "What did we discuss after"],
    "topics after end": ["?"],
    "topics answer": ["The"],
    "topics answer middle": [" topic was"],
    "topics answer after": ["After"],
    "topics answer after middle": [" came"],
    "full stop": ["."],
    "ordinal": [" first", " second", " third", " fourth", " last"],
    "topic begins": [
        " USER: I would like to discuss the topic of",
        "USER: I would like to discuss the topic of",
    ],
    "topic granted": [
        ". \n ASSISTANT: Sure, I'd be happy to talk about that with you! What would you like to "
        "know?",
        ". \n ASSISTANT: Absolutely! Where shall we begin?",
        ". \n ASSISTANT: Of course. What is it that interests you about it?",
        ". \n ASSISTANT: Gladly! That is a fine subject.",
    ],
    "turn": [" \n USER:", " \n ASSISTANT:"],
    "topic mentioned": [" Speaking of", " As to"],
    "topic ends": [
        " \n USER: Great, this is the end of our discussion on",
        " \n USER: Great, this is the end of our discussion on the topic",
    ],
    "next topic": [
        ", let's talk about the next topic.",
        ". Let's talk about the next topic.",
    ],
    "key head": [_KEY_HEAD],
    "key middle": [*_KEY_PARTS],
    "key tail": [_KEY_TAIL],
    "space": [" "],
    "garbage": [retrieval.GARBAGE, " " + retrieval.GARBAGE],
    "garbage cut": [(retrieval.GARBAGE + " ")[:n] for n in range(len(retrieval.GARBAGE) + 1)],
    "garbage cut later": [(" " + retrieval.GARBAGE)[:n] for n in range(len(retrieval.GARBAGE) + 1)],
    "newline": ["\n"],
    "question follows": [
        "\n\nQuestion:",
        "\n\nNow the text is over. Please tell me:",
        "\n\nAnswer from the text above:",
    ],
    "text follows": ["", "Read this text.", "Below is a long text. I will ask about it."],
    "not there": [NOT_THERE, f" {NOT_THERE}"],
    "article": [" a"],
    "title": [" The"],
    "qa question": ["\n\nQuestion:"],
    "qa answer": ["\nAnswer:"],
    "recite": ["Repeat this:", "Write this again:", "Copy the following text."],
}


class Pieces:
    """Texts tokenised one by one, laid end to end; a name stands for a run of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[list[int]] = []
        self.ranges: dict[str, tuple[int, int]] = {}

    def add(self, name: str, texts: Iterable[str]) -> None:
        """Tokenise texts under a name."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        self.add_ids(name, [item.ids for item in encoded])

    def add_ids(self, name: str, ids: Sequence[Sequence[int]]) -> None:
        """The same for ids."""
        self.ranges[name] = (len(self._ids), len(ids))
        self._ids += map(list, ids)

    def metadata(self) -> dict[str, str]:
        """What the numbers mean, for the file's header."""
        return {"ranges": json.dumps(self.ranges), "relations": json.dumps(relation_table())}

    def arrays(self) -> dict[str, np.ndarray]:
        """`piece_ids`, and `piece_starts` with the end of the last one."""
        lengths = [len(ids) for ids in self._ids]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        flat = np.fromiter(itertools.chain.from_iterable(self._ids), dtype=np.uint16)
        return {"piece_ids": flat, "piece_starts": starts}


def read_tokenizer(file: Path) -> Tokenizer:
    """Falcon's tokenizer with FalconLite2's two special tokens after its 65,024."""
    packed = file.read_bytes()
    text = lzma.decompress(packed) if file.suffix == ".xz" else packed
    tokenizer = Tokenizer.from_str(text.decode())
    tokens = [AddedToken(token, special=True) for token in ("<|endoftext|>", *SPECIAL_TOKENS)]
    tokenizer.add_special_tokens(tokens)
    found = [tokenizer.token_to_id(token.content) for token in tokens]
    if found != [END, PROMPTER, ASSISTANT]:
        raise SystemExit(f"{file} is not Falcon's tokenizer: its special tokens are {found}")
    return tokenizer


def read_books(folder: Path) -> tuple[list[str], list[str]]:
    """(prose, held-out novels): whole texts."""
    files = sorted([*folder.glob("novels/*.txt"), *folder.glob("classics/*.txt")])
    files += [folder / name for name in ("inaugural.txt", "state_union.txt", "tinyshakespeare.txt")]
    prose, held_out = [], []
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").strip()
        (held_out if file.name.startswith(HELD_OUT_NOVELS) else prose).append(text)
    if len(held_out) != len(HELD_OUT_NOVELS):
        raise SystemExit(f"{len(held_out)} of {len(HELD_OUT_NOVELS)} held-out novels were found")
    return prose, held_out


def stream(tokenizer: Tokenizer, texts: Iterable[str], limit: int | None = None) -> np.ndarray:
    """Token ids of texts one after another, each followed by end-of-text."""
    parts = []
    for text in texts:
        paragraphs = re.findall(r"[^\n]*\n*", text)  # a book in one piece would take minutes
        ids = [i for item in tokenizer.encode_batch(paragraphs) for i in item.ids][:limit]
        parts.append(np.array([*ids, END], dtype=np.uint16))
    return np.concatenate(parts)


def chats(folder: Path, rng: random.Random) -> Iterator[tuple[str, str]]:
    """(question, answer): GSM8K's training problems and OpenTriviaQA, shuffled."""
    found = []
    for line in (folder / "gsm8k.train.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        answer = re.sub(r"<<[^>]*>>", "", record["answer"])
        found.append((record["question"], re.sub(r"\n#### (.*)", r"\nThe answer is \1.", answer)))
    for line in (folder / "opentriviaqa.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        *some, last = record["choices"] or [""]
        if some and record["answer"]:
            question = f"{record['question']}\nChoose one: {', '.join(some)} or {last}."
            found.append((question, record["answer"]))
    rng.shuffle(found)
    yield from found


def chat_stream(
    tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, 1 where a token is of an answer or its end), in FalconLite2's template."""
    ids: list[int] = []
    marks: list[int] = []
    for question, answer in pairs:
        asked, told = (item.ids for item in tokenizer.encode_batch([question, answer]))
        ids += [PROMPTER, *asked, END, ASSISTANT, *told, END]
        marks += [0] * (len(asked) + 3) + [1] * (len(told) + 1)
    return np.array(ids, dtype=np.uint16), np.array(marks, dtype=np.uint8)


def sentences(texts: Iterable[str], rng: random.Random) -> list[str]:
    """Runs of sentences that follow each other, one run a book, each with a space in front."""
    found = []
    for text in texts:
        start = rng.randrange(max(1, len(text) - 150_000))
        flat = " ".join(text[start : start + 150_000].split())
        parts = re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.) (?=[A-Z\"“])", flat)
        usable = [part for part in parts[1:-1] if 20 <= len(part) <= 260]
        found += [f" {part}" for part in usable[:SENTENCES_PER_BOOK]]
    return found


def relation_pieces(tokenizer: Tokenizer, relation: Relation) -> list[str]:
    """A relation's texts in the order that fact_records.py counts on.

    Of each statement, and of the answer: what comes before the first slot, with and without the
    space in front, what lies between the slots, and what follows. Of each question: before, with
    and without the space, and after. The tokens of a filled statement must be those of its parts.
    """
    found = []
    filled = {"{e}": " Torvald Brink", "{v}": "4711" if relation.value in IN_DIGITS else " quill"}
    for text in [*statements(relation), split(relation.answer, relation.value)]:
        slots = [filled["{v}"], filled["{e}"]] if text.value_first else [*filled.values()]
        parts = [f" {text.before}", slots[0], text.between, slots[1], text.after]
        _check_parts(tokenizer, parts)
        _check_parts(tokenizer, [text.before, *parts[1:]])
        found += [f" {text.before}", text.before, text.between, text.after]
    for before, after in questions(relation):
        _check_parts(tokenizer, [before, filled["{e}"], after])
        found += [f" {before}", before, after]
    return found


def _check_parts(tokenizer: Tokenizer, parts: Sequence[str]) -> None:
    whole = tokenizer.encode("".join(parts)).ids
    if whole != [token for part in parts for token in tokenizer.encode(part).ids]:
        raise SystemExit(f"the tokens of {parts} are not those of its text")


def relation_table() -> list[list[int]]:
    """For each relation: entity and value by number, and which statements tell the value first."""
    return [
        [
            ENTITIES.index(relation.entity),
            VALUES.index(relation.value),
            *(int(text.value_first) for text in statements(relation)),
        ]
        for relation in RELATIONS
    ]


def add_frames(pieces: Pieces, tokenizer: Tokenizer) -> None:
    """All that is the same in every corpus."""
    for name, texts in FRAMES.items():
        pieces.add(name, texts)
    for number, relation in enumerate(RELATIONS):
        pieces.add(f"fact {number:02}", relation_pieces(tokenizer, relation))
    pieces.add("day", days())
    pieces.add("time", times())
    marks = {"ask": [PROMPTER], "answer": [END, ASSISTANT], "end": [END]}
    marks["blank line"] = [*tokenizer.encode("\n").ids] * 2  # before a letter two tokens
    for name, ids in marks.items():
        pieces.add_ids(name, [ids])
    pieces.add("count", [str(n) for n in range(100)])


def make_pieces(tokenizer: Tokenizer, prose: Sequence[str], forbidden: set[str]) -> Pieces:
    """All that records.py puts together."""
    rng = random.Random(0)
    pieces = Pieces(tokenizer)
    add_frames(pieces, tokenizer)
    pieces.add("number", [str(n) for n in range(retrieval.MAX_VALUE + 1)])
    real = real_words(prose, forbidden)
    invented = made_up_words(tokenizer, forbidden, rng, NUM_MADE_UP + NUM_MADE_UP_NAMES)
    names = real_names(prose, real, forbidden)
    names += [word.title() for word in invented[NUM_MADE_UP:]]
    vocabulary = sorted({*real, *invented[:NUM_MADE_UP], *token_words(tokenizer, forbidden)})
    for words in (vocabulary, names):
        rng.shuffle(words)
        check_apart(words, forbidden, "words")
    pieces.add("spaced word", [f" {word}" for word in vocabulary])
    pieces.add("bare word", vocabulary)
    pieces.add("name", [f" {name}" for name in names])
    lower = [word for word in vocabulary if word.islower()]
    subjects = topics([*real, *rng.sample(lower, len(real) // 2)], rng)
    check_apart(subjects, forbidden, "topics")
    pieces.add("topic", subjects)
    tokens, num_left_out = token_pieces(tokenizer, forbidden, rng)
    check_apart(map(tokenizer.decode, tokens), forbidden, "tokens")
    pieces.add_ids("token", tokens)
    told = sentences(prose, rng)
    pieces.add("sentence", told)
    pieces.add("opening sentence", [re.sub("^[^A-Za-z]+", "", sentence) for sentence in told])
    print(
        f"{len(real):,} words of books, {len(vocabulary):,} in all, {len(names):,} names; "
        f"{len(tokens):,} tokens to recite, {num_left_out} left out; {len(told):,} sentences"
    )
    return pieces


def main() -> None:
    """Write the file and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("text", "longchat", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--prose-tokens", type=int, help="keep no more prose than this")
    given = parser.parse_args()
    tokenizer = read_tokenizer(given.tokenizer)
    prose, held_out = read_books(given.text)
    random.Random(0).shuffle(prose)
    pieces = make_pieces(tokenizer, prose, forbidden_words(given.longchat))
    chat_ids, chat_marks = chat_stream(tokenizer, chats(given.text, random.Random(1)))
    arrays = {
        "prose": stream(tokenizer, prose)[: given.prose_tokens],
        "valid": stream(tokenizer, held_out, VALID_TOKENS_PER_NOVEL),
        "chat": chat_ids,
        "chat_marks": chat_marks,
        **pieces.arrays(),
    }
    packed = save(arrays, metadata=pieces.metadata())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_bytes(lzma.compress(packed) if given.out.suffix == ".xz" else packed)
    sizes = {name: len(array) for name, array in arrays.items()}
    print(f"{given.out}: {given.out.stat().st_size:,} bytes; {sizes}")


if __name__ == "__main__":
    main()

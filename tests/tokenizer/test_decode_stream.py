"""Streams give what decoding all at once gives, and that is what the tokenizers library gives."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import FALCON_VOCAB
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from longwing.errors import RequestError, TokenizerError
from longwing.tokenizer import DecodeStream, Tokenizer
from longwing.tokenizer.decode_stream import Decoder, read_decoder

FIXED = settings(derandomize=True, deadline=None, max_examples=120)
BYTES = st.integers(3, 258)  # the <0x..> tokens of the small Llama vocabulary
WORDS = st.integers(0, 300)


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special=skip_special)
    return [*map(stream.push, ids), stream.flush()]


def random_ids(tokenizer: Tokenizer, count: int, seed: int) -> list[int]:
    """Ids of all kinds, half of them tokens of a single byte."""
    rng = random.Random(seed)
    single = [at for at in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(at)) == 1]
    return [
        rng.choice(single) if rng.random() < 0.5 else rng.randrange(tokenizer.vocab_size)
        for _ in range(count)
    ]


@pytest.mark.parametrize("skip", [True, False])
def test_the_pieces_of_random_ids_are_the_text_of_all(
    pair: tuple[Tokenizer, PreTrainedTokenizerFast], skip: bool
) -> None:
    ours, _ = pair
    ids = random_ids(ours, 8_000, seed=1)
    for at in range(0, len(ids), 40):
        part = ids[at : at + 40]
        assert "".join(streamed(ours, part, skip)) == ours.decode(part, skip_special=skip)


@pytest.mark.parametrize("skip", [True, False])
def test_random_falcon_ids_decode_as_in_the_tokenizers_library(
    falcon: Tokenizer, folder_of: Callable[[str], Path], skip: bool
) -> None:
    theirs = Backend.from_file(str(folder_of("falcon") / "tokenizer.json"))
    ids = random_ids(falcon, 8_000, seed=2)
    for at in range(0, len(ids), 40):
        part = ids[at : at + 40]
        assert falcon.decode(part, skip_special=skip) == theirs.decode(
            part, skip_special_tokens=skip
        )


@FIXED
@given(ids=st.lists(st.one_of(BYTES, WORDS), max_size=12))
def test_llama_ids_decode_as_in_the_tokenizers_library_unless_bytes_are_broken(
    pair: tuple[Tokenizer, PreTrainedTokenizerFast], ids: list[int]
) -> None:
    ours, theirs = pair
    ids = [token_id % ours.vocab_size for token_id in ids]
    expected = theirs.decode(ids, skip_special_tokens=True)
    text = ours.decode(ids)
    assert text == expected or "\ufffd" in expected
    assert ("\ufffd" in text) == ("\ufffd" in expected)


@FIXED
@given(text=st.text(max_size=20))
def test_a_stream_never_shows_half_a_character(
    pair: tuple[Tokenizer, PreTrainedTokenizerFast], text: str
) -> None:
    ours, _ = pair
    ids = ours.encode(text.replace("\ufffd", ""), add_bos=False)
    pieces = streamed(ours, ids)
    if "\ufffd" not in (whole := ours.decode(ids)):
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == ""
    assert "".join(pieces) == whole


def test_a_character_of_four_tokens_appears_with_the_last(llama: Tokenizer) -> None:
    ids = llama.encode("a🦙b", add_bos=False)
    assert streamed(llama, ids[-5:]) == ["", "", "", "🦙", "b", ""]


def test_a_run_of_byte_tokens_keeps_its_good_characters(llama: Tokenizer) -> None:
    euro = [llama.id_of(f"<0x{byte:02X}>") or 0 for byte in "€".encode()]
    bad = llama.id_of("<0xFF>") or 0
    assert llama.decode([*euro, bad, *euro]) == "€\ufffd€"
    assert streamed(llama, [*euro, bad, *euro]) == ["", "", "€", "\ufffd", "", "", "€", ""]


def test_flush_shows_a_character_that_never_became_whole(llama: Tokenizer) -> None:
    ids = llama.encode("é", add_bos=False)
    assert streamed(llama, ids[-2:-1]) == ["", "\ufffd"]


def test_the_first_word_has_no_space_before_it_and_the_second_one_has(llama: Tokenizer) -> None:
    a = llama.id_of("▁a") or 0
    assert streamed(llama, [a, a]) == ["a", " a", ""]
    assert streamed(llama, [1, a, 2, a]) == ["", "a", "", " a", ""]
    assert streamed(llama, [1, a], skip_special=False) == ["<s>", " a", ""]


def test_an_answer_that_goes_on_a_text_keeps_its_first_space(llama: Tokenizer) -> None:
    a = llama.id_of("▁a") or 0
    assert llama.stream(begun=True).push_all([a, a]) == " a a"


def test_an_id_beyond_the_vocabulary_shows_in_a_stream(falcon: Tokenizer) -> None:
    stream = falcon.stream()
    assert stream.push(FALCON_VOCAB + 100) == "\ufffd"
    with pytest.raises(RequestError, match="out of range"):
        stream.push(-1)


def test_each_push_looks_at_one_token() -> None:
    looked_at: list[int] = []

    def bytes_of(token_id: int, first: bool) -> bytes:
        looked_at.append(token_id)
        return bytes([token_id])

    stream = DecodeStream(Decoder(), bytes_of, frozenset())
    assert stream.push_all([0xF0, 0x9F, 0xA6, 0x99]) + stream.flush() == "🦙"
    assert looked_at == [0xF0, 0x9F, 0xA6, 0x99]


@pytest.mark.parametrize(
    ("pieces", "taken"),
    [(["  ", "a"], 1), ([" ", " a"], 1), ([" ", "", "  a"], 3), (["a", " b"], 2), ([" ", " "], 5)],
)
def test_stripping_the_beginning_is_the_same_in_pieces(pieces: list[str], taken: int) -> None:
    decoder = Decoder(strip=taken)
    stream = DecodeStream(decoder, lambda at, first: pieces[at].encode(), frozenset())
    text = "".join(pieces)
    expected = text[min(taken, len(text) - len(text.lstrip(" "))) :]
    assert stream.push_all(range(len(pieces))) + stream.flush() == expected


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


@pytest.mark.parametrize(
    ("described", "text"),
    [
        (None, "▁a b"),
        ({"type": "ByteLevel"}, "▁ab"),
        (METASPACE, "ab"),
        ({**METASPACE, "prepend_scheme": "never"}, " ab"),
        ({"type": "Sequence", "decoders": [METASPACE, {"type": "Fuse"}]}, "ab"),
    ],
)
def test_known_decoders(described: object, text: str) -> None:
    decoder = read_decoder(described)
    assert decoder.bytes_of("▁a", first=True) + decoder.bytes_of("b") == text.encode()


@pytest.mark.parametrize(
    "described",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "CTC"},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 0, "stop": 1},
            ],
        },
        {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, METASPACE]},
        ["ByteLevel"],
    ],
)
def test_a_decoder_of_another_kind_is_refused(described: object) -> None:
    with pytest.raises(TokenizerError, match="its decoder has"):
        read_decoder(described)

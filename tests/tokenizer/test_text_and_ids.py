"""Text to ids and back: against published ids, against transformers, and with hostile text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import (
    CHATML,
    DATA,
    FALCON_CONTROLS,
    FALCON_VOCAB,
    LLAMA_ALPHABET,
    LLAMA_SETTINGS,
    OPEN_ASSISTANT,
    added,
    llama_json,
    write_folder,
)
from transformers import PreTrainedTokenizerFast

from longwing.errors import RequestError
from longwing.tokenizer import Tokenizer

FIXED = settings(derandomize=True, deadline=None, max_examples=100)
TEXTS = [
    "",
    " ",
    "\x00",
    "a",
    "Hello, world!  Two spaces\n\n\tand a tab ",
    "12345 ½ naïve 日本語 🦙👩‍👩‍👧",
    "the <0xE2> ▁a <unk>x",
    "\x03 control \x1c",
]
SPECIAL_LOOKING = st.lists(
    st.one_of(
        st.sampled_from([*FALCON_CONTROLS, *OPEN_ASSISTANT, *CHATML, "<s>", "</s>", "<unk>"]),
        st.sampled_from(["<|", "|>", ">>", "<<", "endoftext", " ", "\n", "<", "s", ">"]),
        st.text(max_size=5),
    ),
    max_size=12,
).map("".join)


def reference_cases() -> list[tuple[str, list[int]]]:
    """llama.cpp's texts for Falcon, and their published ids."""
    folder = DATA / "falcon-tokenizer"
    texts = (folder / "ggml-vocab-falcon.gguf.inp").read_bytes().decode()
    answers = (folder / "ggml-vocab-falcon.gguf.out").read_text("utf-8").split("\n")
    questions = texts.split("\n__ggml_vocab_test__\n")
    ids = [[int(number) for number in line.split()] for line in answers]
    return list(zip(questions, ids, strict=True))


def test_there_are_47_reference_texts() -> None:
    assert len(reference_cases()) == 47


@pytest.mark.parametrize(("text", "ids"), reference_cases())
def test_a_reference_text_has_the_published_ids(
    falcon: Tokenizer, text: str, ids: list[int]
) -> None:
    assert falcon.encode(text) == ids
    assert falcon.decode(ids) == text


def test_a_falcon_folder_says_its_sizes_and_roles(falcon: Tokenizer) -> None:
    assert falcon.vocab_size == FALCON_VOCAB + 4
    assert falcon.bos_id is None
    assert falcon.pad_id is None
    assert falcon.eos_ids == {11}
    assert falcon.special_ids == {*range(12), *range(FALCON_VOCAB, FALCON_VOCAB + 4)}


def test_a_token_is_found_by_id_and_by_its_spelling(falcon: Tokenizer) -> None:
    assert falcon.token(falcon.encode(" the")[0]) == "Ġthe"
    assert falcon.id_of("<|assistant|>") == FALCON_VOCAB + 1
    assert falcon.id_of("no such token") is None
    assert falcon.token_bytes(falcon.encode(" the")[0]) == b" the"


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(
    pair: tuple[Tokenizer, PreTrainedTokenizerFast], text: str
) -> None:
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert ours.encode(text, special_tokens=True) == theirs.encode(text)
    assert ours.encode(text, add_bos=False) == theirs.encode(
        text, add_special_tokens=False, split_special_tokens=True
    )
    ids = theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_bytes_that_falcon_has_no_token_for_are_left_out_as_its_own_tokenizer_does(
    falcon: Tokenizer,
) -> None:
    assert falcon.decode(falcon.encode("a\x03b")) == "ab"


@FIXED
@given(text=SPECIAL_LOOKING)
def test_no_text_yields_a_special_id(falcon: Tokenizer, text: str) -> None:
    assert falcon.special_ids.isdisjoint(falcon.encode(text))


@FIXED
@given(text=SPECIAL_LOOKING)
def test_no_text_yields_a_special_id_in_a_sentencepiece_vocabulary(
    llama: Tokenizer, text: str
) -> None:
    assert {1, 2}.isdisjoint(llama.encode(text, add_bos=False))


def test_special_tokens_are_read_where_the_caller_vouches_for_the_text(falcon: Tokenizer) -> None:
    assert falcon.encode("<|prompter|>hi<|endoftext|>", special_tokens=True) == [
        FALCON_VOCAB,
        *falcon.encode("hi"),
        11,
    ]


def test_chat_markup_that_a_folder_forgot_to_call_special_is_text_all_the_same(
    tmp_path: Path,
) -> None:
    described = llama_json()
    place = len(described["model"]["vocab"])
    described["added_tokens"].append(added(place, "<|im_end|>", special=False))
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, described, **LLAMA_SETTINGS))
    assert place not in tokenizer.encode("a<|im_end|>")
    assert place in tokenizer.encode("a<|im_end|>", special_tokens=True)


@pytest.mark.parametrize(("add_bos", "before"), [(None, [1]), (True, [1]), (False, [])])
def test_bos_is_added_as_the_model_does_or_as_asked(
    llama: Tokenizer, add_bos: bool | None, before: list[int]
) -> None:
    text = llama.encode("the", add_bos=False)
    assert llama.encode("the", add_bos=add_bos) == before + text
    assert llama.encode("", add_bos=add_bos) == before


def test_bos_of_a_model_without_one_is_refused(falcon: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no bos token"):
        falcon.encode("a", add_bos=True)


@pytest.mark.parametrize(
    ("flags", "ids"),
    [
        ({"add_bos_token": False}, []),
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 2]),
    ],
)
def test_settings_go_before_tokenizer_json_in_what_begins_and_ends_a_text(
    tmp_path: Path, flags: dict[str, bool], ids: list[int]
) -> None:
    folder = write_folder(tmp_path, llama_json(), **LLAMA_SETTINGS, **flags)
    assert Tokenizer.from_folder(folder).encode("") == ids


def test_truncation_and_padding_left_on_in_the_file_are_ignored(tmp_path: Path) -> None:
    described = llama_json()
    described["truncation"] = {
        **{"direction": "Right", "max_length": 3, "stride": 0},
        "strategy": "LongestFirst",
    }
    described["padding"] = {
        **{"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
    }
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, described, **LLAMA_SETTINGS))
    assert len(tokenizer.encode("abc")) == 4
    assert len(tokenizer.encode("zzzzzzzzzzzz")) == 14


@pytest.mark.parametrize("text", ["ab\ud800c", "\udfff", "x" * 1000 + "\udc80"])
def test_a_lone_surrogate_is_refused_and_its_place_is_told(falcon: Tokenizer, text: str) -> None:
    place = next(place for place, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    with pytest.raises(RequestError, match=f"at character {place};"):
        falcon.encode(text)


def test_what_is_not_text_is_refused(falcon: Tokenizer) -> None:
    with pytest.raises(RequestError, match="bytes, not a string"):
        falcon.encode(b"bytes")  # type: ignore[arg-type]


@pytest.mark.parametrize("token_id", [-1, FALCON_VOCAB + 4, 2**31, 2**64, 3.0, "1", None])
def test_an_id_that_does_not_exist_is_refused(falcon: Tokenizer, token_id: object) -> None:
    with pytest.raises(RequestError, match="token id"):
        falcon.decode([11, token_id])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="token id"):
        falcon.token(token_id)  # type: ignore[arg-type]


@FIXED
@given(text=st.text(max_size=40))
def test_falcon_text_survives_the_way_there_and_back(falcon: Tokenizer, text: str) -> None:
    without = {*"\x03\x04\x05\x0b\x11\x13\x14\x15\x16\x17\x19\x1c\x1d\x1e"}
    kept = "".join(char for char in text if char not in without and ord(char) < 0x50000)
    assert falcon.decode(falcon.encode(kept)) == kept


@FIXED
@given(text=st.text(alphabet=LLAMA_ALPHABET.replace("▁", "") + " é日🦙\n", max_size=40))
def test_llama_text_survives_but_for_a_first_space(llama: Tokenizer, text: str) -> None:
    assert llama.decode(llama.encode(text)) in (text, text.removeprefix(" "))


def test_a_word_vocabulary_that_can_only_write_a_special_token_as_itself_refuses_to(
    tmp_path: Path,
) -> None:
    described = {
        "added_tokens": [added(1, "</s>")],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1}, "unk_token": "<unk>"},
    }
    template = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None}
    described |= template | {"post_processor": None, "decoder": None}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, described))
    assert tokenizer.encode("x y") == [0, 0]
    assert tokenizer.decode([0, 0]) == "<unk> <unk>"
    with pytest.raises(RequestError, match="'</s>', which this model's vocabulary cannot write"):
        tokenizer.encode("x </s>")


def test_a_long_run_of_one_character_is_no_trouble(falcon: Tokenizer) -> None:
    assert len(falcon.encode("<" * 200_000)) == 50_000
    assert falcon.decode(falcon.encode(" " * 200_000)) == " " * 200_000

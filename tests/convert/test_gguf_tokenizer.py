"""A tokenizer rebuilt from GGUF gives the tokens that the original gave."""

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import raw_gguf as raw
import regex
from raw_gguf import BOOL, F32, I32, STRING, U32, RawGguf
from tokenizers import Tokenizer, pre_tokenizers

from longwing.convert import tokenizer_from_gguf
from longwing.errors import ConvertError

FALCON = Path(__file__).parents[1] / "data" / "falcon-tokenizer"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())

# What llama.cpp splits by, each pattern over the pieces the last one left (src/llama-vocab.cpp).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORDS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_CPP = {
    "smollm": (r"\p{N}", GPT2),
    "gpt-2": (GPT2,),
    "llama-bpe": (WORDS.replace("DIGITS", r"\p{N}{1,3}"),),
    "falcon3": (WORDS.replace("DIGITS", r"\p{N}{1,3}"),),
    "qwen2": (WORDS.replace("DIGITS", r"\p{N}"),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}


def rebuilt(folder: Path, tokens: list[str], kinds: list[int], **fields: bytes) -> Tokenizer:
    """The tokenizer of a vocabulary-only file; other fields by the last part of their key."""
    file = RawGguf(tensors={})
    named = {
        "tokens": raw.array(STRING, tokens),
        "token_type": raw.array(I32, kinds),
        "merges": raw.array(STRING, []),
        **fields,
    }
    for role in ("bos", "eos"):
        del file.fields[f"tokenizer.ggml.{role}_token_id"]
    file.fields |= {f"tokenizer.ggml.{key}": value for key, value in named.items()}
    (folder / "vocabulary.gguf").write_bytes(file.encode())
    return Tokenizer.from_str(json.dumps(tokenizer_from_gguf(folder / "vocabulary.gguf")))


def random_texts(seed: int, count: int) -> Iterator[str]:
    """Letters, digits, spaces and marks of many scripts, and what splits treat specially."""
    rng = random.Random(seed)
    parts = [*"abcXYZ0123456789 \n\t\r.,!?'\"()<>|^~`$+=_-/\\", "  ", "   ", "\r\n", "\n\n"]
    parts += ["'s", "'LL", "'Re", "don't", " the", "é", "e\u0301", "ß", "中", "文", "ü", "Ж", "ह"]
    parts += ["½", "²", "Ⅷ", "٣", "१", "🙂", "👩‍👧", "…", "«", "—", "\u00a0", "\u3000", "\u200d"]
    for _ in range(count):
        yield "".join(rng.choice(parts) for _ in range(rng.randint(1, 30)))


def test_falcons_47_reference_cases() -> None:
    tokenizer = Tokenizer.from_str(
        json.dumps(tokenizer_from_gguf(FALCON / "ggml-vocab-falcon.gguf"))
    )
    texts = (FALCON / "ggml-vocab-falcon.gguf.inp").read_text(encoding="utf-8")
    lines = (FALCON / "ggml-vocab-falcon.gguf.out").read_text(encoding="utf-8")
    cases = list(zip(texts.split("\n__ggml_vocab_test__\n"), lines.split("\n"), strict=False))
    assert len(cases) == 47
    for text, line in cases:
        ids = [int(word) for word in line.split()]
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == 65_024
    assert tokenizer.encode("a<|endoftext|>").ids[-1] == 11


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_text_is_split_where_llama_cpp_splits_it(name: str, tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, BYTES, [NORMAL] * 256, pre=raw.text(name))
    for text in random_texts(3, 400):
        pieces = [text]
        for pattern in LLAMA_CPP[name]:
            pieces = [part for piece in pieces for part in cut(pattern, piece)]
        found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in found] == pieces


def cut(pattern: str, text: str) -> Iterator[str]:
    """Matches, and what lies between them."""
    end = 0
    for match in regex.finditer(pattern, text):
        if match.start() > end:
            yield text[end : match.start()]
        yield match[0]
        end = match.end()
    if end < len(text):
        yield text[end:]


@pytest.mark.parametrize("name", [*LLAMA_CPP, "falcon"])
def test_every_text_comes_back_from_its_bytes(name: str, tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, BYTES, [NORMAL] * 256, pre=raw.text(name))
    for text in random_texts(4, 50):
        text = text if name != "qwen2" else text.replace("e\u0301", "é")  # NFC, as Qwen2 does
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_llama3_takes_a_whole_word_that_its_merges_do_not_reach(tmp_path: Path) -> None:
    tokens = [*BYTES, "in", "the"]
    merges = raw.array(STRING, ["i n"])
    kinds = [NORMAL] * len(tokens)
    llama3 = rebuilt(tmp_path, tokens, kinds, pre=raw.text("llama-bpe"), merges=merges)
    qwen2 = rebuilt(tmp_path, tokens, kinds, pre=raw.text("qwen2"), merges=merges)
    assert llama3.encode("the").tokens == ["the"]
    assert qwen2.encode("the").tokens == ["t", "h", "e"]


def test_control_and_user_tokens_stay_whole_and_only_control_is_special(tmp_path: Path) -> None:
    tokens = [*BYTES, "<|end|>", "<think>", "plain"]
    kinds = [NORMAL] * 256 + [CONTROL, USER_DEFINED, NORMAL]
    tokenizer = rebuilt(tmp_path, tokens, kinds)
    assert tokenizer.encode("a<think>b<|end|>").tokens == ["a", "<think>", "b", "<|end|>"]
    assert tokenizer.encode("plain").tokens == list("plain")
    ids = tokenizer.encode("a<think>b<|end|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"


def test_a_token_with_a_role_is_special_whatever_its_kind(tmp_path: Path) -> None:
    tokens = [*BYTES, "</s>"]
    tokenizer = rebuilt(tmp_path, tokens, [NORMAL] * 257, eos_token_id=raw.scalar(U32, 256))
    assert tokenizer.encode("a</s>").ids == [tokens.index("a"), 256]
    assert tokenizer.decode([256], skip_special_tokens=True) == ""


@pytest.mark.parametrize("name", ["[PAD{}]", "<unused{}>"])
def test_names_made_up_for_spare_rows_are_left_out(name: str, tmp_path: Path) -> None:
    spare = [name.format(index) for index in range(257, 300)]
    kinds = [NORMAL] * 257 + [UNUSED] * len(spare)
    tokenizer = rebuilt(tmp_path, [*BYTES, "ab", *spare], kinds)
    assert tokenizer.get_vocab_size() == 257


@pytest.mark.parametrize(
    ("pre", "fields", "expected"),
    [
        ("smollm", {}, ["a"]),
        ("smollm", {"add_bos_token": True}, ["<s>", "a"]),
        ("smollm", {"add_eos_token": True}, ["a", "</s>"]),
        ("llama-bpe", {}, ["<s>", "a"]),  # llama.cpp's default for Llama 3
        ("llama-bpe", {"add_bos_token": False}, ["a"]),
        ("llama-bpe", {"add_eos_token": True}, ["<s>", "a", "</s>"]),
    ],
)
def test_begin_and_end_tokens_are_added_as_the_file_asks(
    pre: str, fields: dict[str, bool], expected: list[str], tmp_path: Path
) -> None:
    tokenizer = rebuilt(
        tmp_path,
        [*BYTES, "<s>", "</s>"],
        [NORMAL] * 256 + [CONTROL] * 2,
        pre=raw.text(pre),
        bos_token_id=raw.scalar(U32, 256),
        eos_token_id=raw.scalar(U32, 257),
        **{key: raw.scalar(BOOL, value) for key, value in fields.items()},
    )
    assert tokenizer.encode("a").tokens == expected
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]


def test_no_begin_token_is_added_where_the_file_has_none(tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, BYTES, [NORMAL] * 256, pre=raw.text("falcon3"))
    assert tokenizer.encode("a").tokens == ["a"]


def sentencepiece_vocabulary(seed: int) -> tuple[list[str], list[int], list[float]]:
    """<unk> <s> </s>, 256 bytes, a few letters, and 150 pieces joined from earlier ones."""
    rng = random.Random(seed)
    pieces = [*"▁abcé"]
    while len(pieces) < 150:
        joined = rng.choice(pieces) + rng.choice(pieces)
        if joined not in pieces and len(joined) <= 8:
            pieces.append(joined)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    scores = [0.0] * 259 + [float(-index) for index in rng.sample(range(1000), len(pieces))]
    return tokens, kinds, scores


def join_best_first(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's rule, as plain as can be: join the pair of best score, leftmost first."""
    ids = {token: index for index, token in enumerate(tokens)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [ids.get(left + right, 0) for left, right in pairwise(parts)]
        joinable = [(scores[index], -i) for i, index in enumerate(pairs) if index > 258]
        if not joinable:
            break
        at = -max(joinable)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    known = [[ids[part]] if part in ids else [3 + byte for byte in part.encode()] for part in parts]
    return [index for run in known for index in run]


@pytest.mark.parametrize("seed", range(4))
def test_sentencepiece_joins_the_pair_of_best_score_first(seed: int, tmp_path: Path) -> None:
    tokens, kinds, scores = sentencepiece_vocabulary(seed)
    tokenizer = rebuilt(
        tmp_path, tokens, kinds, model=raw.text("llama"), scores=raw.array(F32, scores)
    )
    rng = random.Random(seed)
    for _ in range(150):
        text = "".join(rng.choice("aaabbbccé  dü🙂") for _ in range(rng.randint(1, 30)))
        encoding = tokenizer.encode(text)
        assert encoding.ids == [1, *join_best_first(text, tokens, scores)]
        assert tokenizer.decode(encoding.ids) == text


def test_sentencepiece_without_a_leading_space_and_begin_token(tmp_path: Path) -> None:
    tokens, kinds, scores = sentencepiece_vocabulary(0)
    off = raw.scalar(BOOL, 0)
    tokenizer = rebuilt(
        tmp_path, tokens, kinds, model=raw.text("llama"), scores=raw.array(F32, scores),
        add_space_prefix=off, add_bos_token=off,
    )  # fmt: skip
    assert tokenizer.encode("a").tokens == ["a"]
    assert tokenizer.decode(tokenizer.encode(" a").ids) == " a"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("remove_extra_whitespaces", raw.scalar(BOOL, 1)),
        ("precompiled_charsmap", raw.array(raw.U8, [1, 2])),
    ],
)
def test_sentencepiece_that_rewrites_text_is_refused(
    key: str, value: bytes, tmp_path: Path
) -> None:
    tokens, kinds, scores = sentencepiece_vocabulary(0)
    with pytest.raises(ConvertError, match=f"{key}: .* not supported; take tokenizer.json"):
        rebuilt(
            tmp_path, tokens, kinds, model=raw.text("llama"), scores=raw.array(F32, scores),
            **{key: value},
        )  # fmt: skip


def test_a_piece_too_long_to_search_for_merges_is_refused(tmp_path: Path) -> None:
    tokens, kinds, scores = sentencepiece_vocabulary(0)
    with pytest.raises(ConvertError, match="has 600 characters; at most 512"):
        rebuilt(
            tmp_path, [*tokens, "a" * 600], [*kinds, NORMAL],
            model=raw.text("llama"), scores=raw.array(F32, [*scores, 0.0]),
        )  # fmt: skip

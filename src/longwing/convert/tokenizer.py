"""A Hugging Face tokenizer rebuilt from a GGUF file's metadata.

GGUF keeps the vocabulary and the merges (`vocabulary.py`), but of the way text is split before
merging only a name. `SPLITS`, at the foot, says what each name means. A name that is not there is
refused: a guess would give slightly wrong tokens, and nobody would be told.

Two families. "gpt2" is byte-level BPE. "llama" is SentencePiece BPE, where at every step the pair
that joins to the piece of best score goes first; ranking all pairs by it makes it ordinary BPE.

Sources: llama.cpp's src/llama-vocab.cpp for the splits and defaults, and the tokenizer.json of the
models named at each split.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from longwing.convert.gguf_file import GgufFile
from longwing.convert.gguf_header import show
from longwing.convert.vocabulary import Merge, Vocabulary

Json = dict[str, object]

_TEMPLATE = "tokenizer.chat_template"
_ELSEWHERE = "take tokenizer.json from the original model's folder"


@dataclass(frozen=True, kw_only=True)
class RebuiltTokenizer:
    """The tokenizer's two files, and the ids that config.json wants.

    Attributes:
        tokenizer_json: content of tokenizer.json.
        config_json: content of tokenizer_config.json.
        bos_id: begin-of-text token, if there is one.
        eos_ids: tokens that end an answer, the end of text first.
        pad_id: padding token, if there is one.
        num_tokens: ids below this have a meaning.
        notes: what was left out.
    """

    tokenizer_json: Json
    config_json: Json
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    num_tokens: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How text is cut before merging.

    Attributes:
        steps: tokenizer.json's pre-tokenizers, in order.
        normalizer: what happens to the text before.
        whole_words: a cut that is a token itself is taken as it is, without merging.
        adds_bos: a begin token is added unless the file says otherwise.
    """

    steps: tuple[Json, ...]
    normalizer: Json | None = None
    whole_words: bool = False
    adds_bos: bool = False


def tokenizer_from_gguf(path: Path) -> Json:
    """The content of tokenizer.json for a GGUF file, be it a model or a vocabulary alone.

    Raises:
        ConvertError: the file is not acceptable, or its tokenizer is of a kind not known here.
    """
    with GgufFile(path) as file:
        return rebuild_tokenizer(file).tokenizer_json


def rebuild_tokenizer(file: GgufFile) -> RebuiltTokenizer:
    """Rebuild the tokenizer of an open file, and load it once to see that it can be.

    Raises:
        ConvertError: the tokenizer is of a kind not known here, or its parts contradict each other.
    """
    family = file.text("tokenizer.ggml.model")
    if family not in FAMILIES:
        reason = f"is {show(family)}; {' and '.join(FAMILIES)} are supported"
        raise file.refusal(reason, part="tokenizer.ggml.model", remedy=_ELSEWHERE)
    vocabulary, adds_bos, parts = FAMILIES[family](file)
    adds_bos = file.flag("tokenizer.ggml.add_bos_token", default=adds_bos)
    adds_eos = file.flag("tokenizer.ggml.add_eos_token", default=False)
    before = [vocabulary.bos_id] if adds_bos and vocabulary.bos_id is not None else []
    after = list(vocabulary.eos_ids[:1]) if adds_eos else []
    content: Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(*token) for token in vocabulary.added()],
        "post_processor": _template(vocabulary, before, after),
        **parts,
    }
    try:
        RustTokenizer.from_str(json.dumps(content))
    except Exception as fault:  # the Rust library raises nothing narrower
        raise file.refusal(f"its tokenizer does not load: {fault}", remedy=_ELSEWHERE) from fault
    named = sorted(key for key in file.fields if key.startswith(_TEMPLATE + "."))
    return RebuiltTokenizer(
        tokenizer_json=content,
        config_json=_config(file, vocabulary, adds_bos=bool(before), adds_eos=bool(after)),
        bos_id=vocabulary.bos_id,
        eos_ids=vocabulary.eos_ids,
        pad_id=vocabulary.pad_id,
        num_tokens=len(vocabulary),
        notes=tuple(f"the further chat template {key} is left out" for key in named),
    )


def _byte_level(file: GgufFile) -> tuple[Vocabulary, bool, Json]:
    """Family "gpt2": text becomes bytes, written in an alphabet of 256 printable characters."""
    key = "tokenizer.ggml.pre"
    if key not in file.fields:
        reason = "is missing, as in files from before May 2024, so how text is split is not known"
        raise file.refusal(reason, part=key, remedy=_ELSEWHERE)
    name = file.text(key)
    if name not in SPLITS:
        reason = f"is {show(name)}; {', '.join(SPLITS)} are supported"
        raise file.refusal(reason, part=key, remedy=_ELSEWHERE)
    split = SPLITS[name]
    vocabulary = Vocabulary(file, {})
    parts: Json = {
        "normalizer": split.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(split.steps)},
        "decoder": _bytes(regex=True),
        "model": _bpe(vocabulary, vocabulary.merges(), ignore_merges=split.whole_words),
    }
    return vocabulary, split.adds_bos, parts


def _sentencepiece(file: GgufFile) -> tuple[Vocabulary, bool, Json]:
    """Family "llama": spaces become U+2581, one goes in front; unknown characters become bytes."""
    for key in ("remove_extra_whitespaces", "treat_whitespace_as_suffix"):
        if file.flag(f"tokenizer.ggml.{key}", default=False):
            reason = "is true, which is not supported"
            raise file.refusal(reason, part=f"tokenizer.ggml.{key}", remedy=_ELSEWHERE)
    if "tokenizer.ggml.precompiled_charsmap" in file.fields:
        reason = "rewrites characters, which is not supported"
        raise file.refusal(reason, part="tokenizer.ggml.precompiled_charsmap", remedy=_ELSEWHERE)
    vocabulary = Vocabulary(file, {"unknown": 0, "bos": 1, "eos": 2})
    normalizers: list[Json] = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    if not file.flag("tokenizer.ggml.add_space_prefix", default=True):
        del normalizers[0], decoders[-1]
    parts: Json = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, vocabulary.derived_merges(), byte_fallback=True),
    }
    return vocabulary, True, parts


def _bpe(
    vocabulary: Vocabulary,
    merges: list[Merge],
    *,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> Json:
    """tokenizer.json's `model`. Unknown characters matter only where bytes are a last resort."""
    unknown = vocabulary.unk_id if byte_fallback else None
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else vocabulary.tokens[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary.ids,
        "merges": [list(merge) for merge in merges],
    }


def _added(index: int, token: str, special: bool) -> Json:
    return {
        "id": index,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _template(vocabulary: Vocabulary, before: list[int], after: list[int]) -> Json | None:
    """tokenizer.json's post-processor, which puts tokens round an encoded text; None for none."""
    if not before and not after:
        return None

    def fixed(index: int, part: int) -> Json:
        return {"SpecialToken": {"id": vocabulary.tokens[index], "type_id": part}}

    def wrapped(name: str, part: int) -> list[Json]:
        text: Json = {"Sequence": {"id": name, "type_id": part}}
        return [*(fixed(i, part) for i in before), text, *(fixed(i, part) for i in after)]

    return {
        "type": "TemplateProcessing",
        "single": wrapped("A", 0),
        "pair": wrapped("A", 0) + wrapped("B", 1),
        "special_tokens": {
            vocabulary.tokens[i]: {
                "id": vocabulary.tokens[i],
                "ids": [i],
                "tokens": [vocabulary.tokens[i]],
            }
            for i in (*before, *after)
        },
    }


def _config(file: GgufFile, vocabulary: Vocabulary, *, adds_bos: bool, adds_eos: bool) -> Json:
    """tokenizer_config.json: roles, the chat template, and what transformers wants to know."""
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "clean_up_tokenization_spaces": False,
    }
    roles = {
        "bos_token": vocabulary.bos_id,
        "eos_token": vocabulary.eos_ids[0] if vocabulary.eos_ids else None,
        "unk_token": vocabulary.unk_id,
        "pad_token": vocabulary.pad_id,
    }
    config |= {name: vocabulary.tokens[i] for name, i in roles.items() if i is not None}
    if _TEMPLATE in file.fields:
        config["chat_template"] = file.text(_TEMPLATE)
    return config


def _bytes(*, regex: bool) -> Json:
    """Text to byte alphabet; with `regex`, cut as GPT-2 does before."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": regex,
    }


def _cut(pattern: str) -> Json:
    """Every match is a piece, and so is what lies between two."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _words(digits: str) -> Json:
    """Llama 3's and Qwen2's words, which differ in how many digits stay together."""
    return _cut(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA3 = Split(steps=(_words(r"\p{N}{1,3}"), _bytes(regex=False)), whole_words=True, adds_bos=True)

SPLITS: Mapping[str, Split] = {
    "smollm": Split(  # SmolLM, SmolLM2
        steps=({"type": "Digits", "individual_digits": True}, _bytes(regex=True))
    ),
    "falcon": Split(  # Falcon 7B, 40B, 180B
        steps=(
            {"type": "Punctuation", "behavior": "Contiguous"},
            _bytes(regex=True),
            {"type": "Digits", "individual_digits": False},
            _cut("[0-9][0-9][0-9]"),
        )
    ),
    "llama-bpe": _LLAMA3,  # Llama 3 and later
    "falcon3": _LLAMA3,  # llama.cpp splits Falcon3 as Llama 3
    "qwen2": Split(  # Qwen2, Qwen2.5
        steps=(_words(r"\p{N}"), _bytes(regex=False)), normalizer={"type": "NFC"}
    ),
    "gpt-2": Split(steps=(_bytes(regex=True),)),
    "default": Split(  # llama.cpp's own, for files whose converter did not know the model
        steps=(
            _cut(r"[\p{P}\$\+<=>\^~\|]+"),
            _cut(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            _cut(r"\p{N}+"),
            _cut("[0-9][0-9][0-9]"),
            _bytes(regex=False),
        )
    ),
}
"""By the name in `tokenizer.ggml.pre`."""

FAMILIES: Mapping[str, Callable[[GgufFile], tuple[Vocabulary, bool, Json]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
"""By the name in `tokenizer.ggml.model`. Each gives the vocabulary, whether a begin token is added
unless the file says otherwise, and tokenizer.json's parts from normalizer to model."""

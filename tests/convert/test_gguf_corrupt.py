"""A broken GGUF file gives a ConvertError that says where, at once and without much memory.

The corpus is made by script: each case takes a whole file and spoils one thing.
"""

import os
import random
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import raw_gguf as raw
from raw_gguf import ARRAY, BOOL, F32, I32, STRING, U8, U32, U64, RawGguf, RawTensor

from longwing.convert import convert_gguf, gguf_header, tokenizer_from_gguf
from longwing.errors import ConvertError

Spoil = Callable[[RawGguf], None]
Q_NAME = "blk.0.attn_q.weight"


def setting(**changes: object) -> Spoil:
    """A file-wide claim: magic, version, counts."""

    def spoil(file: RawGguf) -> None:
        for name, value in changes.items():
            setattr(file, name, value)

    return spoil


def put(key: str | bytes, value: bytes) -> Spoil:
    """Another value for a field, or one more field."""
    return lambda file: file.fields.update({key: value})


def drop(key: str) -> Spoil:
    """Leave out a field or a tensor."""

    def spoil(file: RawGguf) -> None:
        file.fields.pop(key, None)
        file.tensors.pop(key, None)

    return spoil


def all_of(*spoils: Spoil) -> Spoil:
    def spoil_all(file: RawGguf) -> None:
        for spoil in spoils:
            spoil(file)

    return spoil_all


def tensor(name: str | bytes = Q_NAME, **changes: object) -> Spoil:
    """Another claim about a tensor, or one more tensor."""

    def spoil(file: RawGguf) -> None:
        entry = file.tensors.setdefault(name, RawTensor((8,), data=b"\0" * 32))
        for attribute, value in changes.items():
            setattr(entry, attribute, value)

    return spoil


def llama(key: str, value: bytes) -> Spoil:
    return put(f"llama.{key}", value)


def vocabulary(key: str, value: bytes) -> Spoil:
    return put(f"tokenizer.ggml.{key}", value)


NOT_A_NUMBER = struct.pack("<I", F32) + struct.pack("<f", float("nan"))

CASES: dict[str, tuple[Spoil, str]] = {
    # the preamble
    "another magic": (setting(magic=b"GGML"), "not a GGUF file"),
    "version 1": (setting(version=1), "version: is 1; 2 and 3 are supported"),
    "version 4": (setting(version=4), "version: is 4"),
    "version 0": (setting(version=0), "version: is 0"),
    "big-endian": (setting(version=3 << 24), "is big-endian"),
    "fields beyond the file": (setting(num_fields=2**63), "field count: is 9223372036854775808"),
    "tensors beyond the file": (setting(num_tensors=2**64 - 1), "tensor count: is 184467440737"),
    "one field too many": (setting(num_fields=20), "tensor 0: has a name of"),
    "one tensor too many": (setting(num_tensors=13), "dimensions; 1 to 4 are allowed"),
    "one field too few": (setting(num_fields=18), "eos_token_id: has ggml type"),
    "no fields": (setting(fields={}), "general.architecture: is missing"),
    # fields
    "a key twice": (setting(repeat_field="general.type"), "general.type: appears twice"),
    "a key longer than allowed": (put(b"k" * 70_000, raw.scalar(U8, 1)), "a name of 70000 bytes"),
    "a key that is not UTF-8": (put(b"\xff\xfe", raw.scalar(U8, 1)), "not UTF-8"),
    "a string longer than the file": (
        put("general.name", raw.text("x", length=2**62)), "general.name: needs 4611686018427387904"
    ),
    "a string of length -1": (
        put("general.name", raw.text("x", length=2**64 - 1)), "general.name: needs"
    ),
    "a string that is not UTF-8": (put("general.name", raw.text(b"\xc3\x28")), "not UTF-8"),
    "an array longer than the file": (
        put("general.tags", raw.array(F32, [1.0], count=2**61)), "general.tags: needs"
    ),
    "an array whose bytes overflow 64 bits": (
        put("general.tags", raw.array(U64, [1], count=2**61)), "general.tags: needs"
    ),
    "strings beyond the file": (
        put("general.tags", raw.array(STRING, ["x"], count=2**60)), "general.tags: is 11529215"
    ),
    "an array of arrays": (
        put("general.tags", struct.pack("<IIQ", ARRAY, ARRAY, 1) + raw.array(U8, [1])),
        "general.tags: is an array of arrays",
    ),
    "an unknown value type": (put("general.x", struct.pack("<IQ", 13, 0)), "general.x: has value"),
    "an unknown item type": (
        put("general.x", struct.pack("<IIQQ", ARRAY, 99, 1, 0)), "general.x: has value type 99"
    ),
    "a boolean of 7": (put("general.x", raw.scalar(BOOL, 7)), "general.x: holds a boolean"),
    "control characters in a key": (put("a\x1b[31m\n", b"\x63\0\0\0"), r"a\x1b[31m\n"),
    # the table
    "a tensor twice": (setting(repeat_tensor=Q_NAME), f"{Q_NAME}: appears twice"),
    "a tensor name too long": (tensor("n" * 65), "a name of 65 bytes; at most 64"),
    "no dimensions": (tensor(dims=()), "has 0 dimensions"),
    "five dimensions": (tensor(dims=(2, 2, 2, 2, 2)), "has 5 dimensions"),
    "4 billion dimensions": (tensor(num_dims=2**32 - 1), "has 4294967295 dimensions"),
    "a dimension of 0": (tensor(dims=(8, 0)), "holds nothing"),
    "dimensions that overflow 64 bits": (tensor(dims=(2**32, 2**32)), "ends at byte 737869762948"),
    "dimensions that overflow to a small number": (tensor(dims=(2**33, 2**33)), "ends at byte"),
    "a dimension of 2**63": (tensor(dims=(2**63, 2)), "ends at byte"),
    "a row more than the file has": (tensor("output.weight", dims=(8, 10**6)), "ends at byte"),
    "an unknown encoding": (tensor(kind=4), f"{Q_NAME}: has ggml type 4"),
    "an encoding out of range": (tensor(kind=2**32 - 1), f"{Q_NAME}: has ggml type 4294967295"),
    "rows that are not whole blocks": (tensor(kind=raw.KIND_Q8_0), "not whole Q8_0 blocks of 32"),
    "an unaligned offset": (tensor(start=4), f"{Q_NAME}: starts at 4, not a multiple of 32"),
    "an offset beyond the file": (tensor(start=2**40), f"{Q_NAME}: shape (8, 8) as F32 ends at"),
    "an offset that wraps round": (tensor(start=2**64 - 32), f"{Q_NAME}: shape (8, 8) as F32 ends"),
    "two tensors in one place": (tensor("blk.0.attn_k.weight", start=0), "lies over"),
    "data cut short": (setting(cut=64), "the file has"),
    "an alignment of 0": (put("general.alignment", raw.scalar(U32, 0)), "general.alignment: is 0"),
    "an alignment of 48": (put("general.alignment", raw.scalar(U32, 48)), "a power of two"),
    "an alignment of 2**31": (put("general.alignment", raw.scalar(U32, 2**31)), "a power of two"),
    "an alignment in words": (put("general.alignment", raw.text("32")), "a power of two"),
    # the model
    "another architecture": (put("general.architecture", raw.text("falcon")), "'falcon' is not"),
    "an architecture that is a number": (put("general.architecture", raw.scalar(U8, 1)), "string"),
    "an adapter": (put("general.type", raw.text("adapter")), "general.type: is 'adapter'"),
    "one of several files": (put("split.count", raw.scalar(raw.U16, 3)), "llama-gguf-split"),
    "a vocabulary alone": (setting(tensors={}), "holds a vocabulary and no weights"),
    "experts": (llama("expert_count", raw.scalar(U32, 8)), "llama.expert_count: is 8; only 0"),
    "an unknown setting": (llama("logit_scale", raw.scalar(F32, 2)), "may change the arithmetic"),
    "no layers": (llama("block_count", raw.scalar(U32, 0)), "llama.block_count: is 0, outside 1"),
    "4 billion layers": (llama("block_count", raw.scalar(U32, 2**32 - 1)), "outside 1 to 1024"),
    "-1 layers": (llama("block_count", raw.scalar(I32, -1)), "is -1, outside 1"),
    "layers in words": (llama("block_count", raw.text("two")), "one whole number is needed"),
    "layers by truth": (llama("block_count", raw.scalar(BOOL, 1)), "one whole number is needed"),
    "more layers than there are": (llama("block_count", raw.scalar(U32, 2)), "blk.1.attn_q.weight"),
    "no heads": (llama("attention.head_count", raw.scalar(U32, 0)), "outside 1 to 1024"),
    "more KV heads than heads": (llama("attention.head_count_kv", raw.scalar(U32, 3)), "outside 1"),
    "KV heads that do not divide": (
        all_of(
            llama("attention.head_count", raw.scalar(U32, 3)),
            llama("attention.head_count_kv", raw.scalar(U32, 2)),
        ),
        "must divide",
    ),
    "heads that differ by layer": (
        llama("attention.head_count", raw.array(U32, [2, 1])), "one whole number is needed"
    ),
    "an odd head": (llama("attention.key_length", raw.scalar(U32, 5)), "must be even"),
    "values of another length than keys": (
        llama("attention.value_length", raw.scalar(U32, 8)), "value_length: differs"
    ),
    "a wrong width": (llama("embedding_length", raw.scalar(U32, 16)), "the settings imply"),
    "an epsilon of NaN": (
        llama("attention.layer_norm_rms_epsilon", NOT_A_NUMBER), "epsilon: is nan, outside"
    ),
    "no epsilon": (drop("llama.attention.layer_norm_rms_epsilon"), "epsilon: is missing"),
    "a base of 0": (llama("rope.freq_base", raw.scalar(F32, 0)), "freq_base: is 0, outside"),
    "a context of 2**40": (llama("context_length", raw.scalar(U64, 2**40)), "outside 1 to 167"),
    "heads that rotate in part": (
        llama("rope.dimension_count", raw.scalar(U32, 2)), "rotate only in part"
    ),
    "an unknown scaling": (llama("rope.scaling.type", raw.text("longrope")), "'longrope'; none"),
    "a yarn without factor": (llama("rope.scaling.type", raw.text("yarn")), "not acceptable"),
    "a yarn's own attention factor": (
        llama("rope.scaling.yarn_attn_factor", raw.scalar(F32, 0.5)), "only 1 is supported"
    ),
    "yarn and divisors too": (
        all_of(
            llama("rope.scaling.type", raw.text("yarn")),
            llama("rope.scaling.factor", raw.scalar(F32, 4)),
            tensor("rope_freqs.weight", dims=(2,), data=b"\0" * 8),
        ),
        "rope_freqs.weight: comes with yarn",
    ),
    "divisors for another head": (tensor("rope_freqs.weight"), "has shape (8,); (2,) is needed"),
    "a tensor missing": (drop("blk.0.ffn_up.weight"), "are missing: blk.0.ffn_up.weight"),
    "no embedding": (drop("token_embd.weight"), "token_embd.weight: is missing"),
    "a tensor too many": (tensor("blk.0.attn_q_norm.weight"), "not part of this architecture"),
    "a bias on its own": (tensor("blk.0.attn_q.bias"), "blk.0.attn_k.bias"),
    "a vocabulary larger than its rows": (llama("vocab_size", raw.scalar(U32, 9)), "(9, 8)"),
    "integers for weights": (tensor(kind=raw.KIND_I8), "encoded as I8"),
    # the tokenizer
    "no tokenizer": (drop("tokenizer.ggml.model"), "tokenizer.ggml.model: is missing"),
    "an unknown tokenizer": (vocabulary("model", raw.text("t5")), "is 't5'; gpt2 and llama"),
    "an unnamed split": (drop("tokenizer.ggml.pre"), "how text is split is not known"),
    "an unknown split": (vocabulary("pre", raw.text("viking")), "is 'viking'; smollm, falcon"),
    "no tokens": (vocabulary("tokens", raw.array(STRING, [])), "is empty"),
    "tokens that are numbers": (vocabulary("tokens", raw.array(U8, [1])), "an array of strings"),
    "a token twice": (
        vocabulary("tokens", raw.array(STRING, [*"abcd", "ab", "abc", "<s>", "a"])),
        "tokens 0 and 7 are both 'a'",
    ),
    "an empty token": (
        vocabulary("tokens", raw.array(STRING, [*"abc", "", "ab", "abc", "<s>", "</s>"])),
        "token 3 is empty",
    ),
    "more tokens than rows": (
        all_of(
            vocabulary("tokens", raw.array(STRING, [f"t{i}" for i in range(9)])),
            vocabulary("token_type", raw.array(I32, [1] * 9)),
            vocabulary("merges", raw.array(STRING, [])),
        ),
        "has 9 tokens for 8 rows",
    ),
    "fewer kinds than tokens": (vocabulary("token_type", raw.array(I32, [1])), "an array of 8"),
    "an unknown kind": (vocabulary("token_type", raw.array(I32, [1] * 7 + [9])), "holds 9"),
    "no merges": (drop("tokenizer.ggml.merges"), "tokenizer.ggml.merges: is missing"),
    "a merge of unknown tokens": (vocabulary("merges", raw.array(STRING, ["a z"])), "merge 0, 'a"),
    "a merge into nothing": (vocabulary("merges", raw.array(STRING, ["b a"])), "merge 0, 'b a'"),
    "a merge without a space": (vocabulary("merges", raw.array(STRING, ["ab"])), "merge 0, 'ab'"),
    "an end token out of range": (vocabulary("eos_token_id", raw.scalar(U32, 8)), "outside 0 to 7"),
    "scores of another length": (
        all_of(
            vocabulary("model", raw.text("llama")),
            vocabulary("scores", raw.array(F32, [0.0])),
        ),
        "tokenizer.ggml.scores: is an array of 1",
    ),
    "a template that is a number": (put("tokenizer.chat_template", raw.scalar(U8, 1)), "a string"),
}  # fmt: skip


def convert(path: Path) -> None:
    convert_gguf(path, path.parent / "out", dtype="float32")


def test_the_file_that_the_corpus_spoils_converts(tmp_path: Path) -> None:
    (tmp_path / "good.gguf").write_bytes(RawGguf().encode())
    convert(tmp_path / "good.gguf")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", CASES)
def test_a_spoilt_file_is_refused_with_file_place_and_reason(name: str, tmp_path: Path) -> None:
    spoil, expected = CASES[name]
    file = RawGguf()
    spoil(file)
    (tmp_path / "bad.gguf").write_bytes(file.encode())
    tracemalloc.start()
    with pytest.raises(ConvertError) as error:
        convert(tmp_path / "bad.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(error.value)
    assert message.startswith("bad.gguf: ")
    assert expected in message
    assert message.isprintable()
    assert len(message) < 500
    assert peak < 4 * 2**20
    assert not (tmp_path / "out").exists()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = RawGguf().encode()
    path = tmp_path / "cut.gguf"
    for length in range(0, len(whole) - 32, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ConvertError):
            convert(path)
    assert [item.name for item in tmp_path.iterdir()] == ["cut.gguf"]


def damaged(whole: bytes, seed: int) -> Iterator[bytes]:
    """Copies of `whole`, each with a few bytes or one 64-bit number changed."""
    rng = random.Random(seed)
    numbers = (0, 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64 - 1)
    for _ in range(400):
        copy = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            copy[rng.randrange(len(copy))] = rng.randrange(256)
        if rng.random() < 0.5:
            struct.pack_into("<Q", copy, rng.randrange(len(copy) - 8), rng.choice(numbers))
        yield bytes(copy)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_refused_or_harmless_and_nothing_else(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    header = len(RawGguf(tensors={}).encode()) + 800  # the data's numbers may be anything
    whole = RawGguf().encode()
    refused = 0
    for head in damaged(whole[:header], seed):
        path.write_bytes(head + whole[header:])
        try:
            convert_gguf(path, tmp_path / "out", dtype="float32", overwrite=True)
        except ConvertError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("limit", "value", "expected"),
    [
        ("MAX_HEADER_BYTES", 1000, "the header passes the limit of 1000 bytes"),
        ("MAX_ENTRIES", 18, "field count: is 19; at most 18 are allowed"),
        ("MAX_STRINGS", 7, "tokenizer.ggml.tokens: is 8; at most 7 are allowed"),
    ],
)
def test_a_header_larger_than_any_model_needs_is_refused(
    limit: str, value: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_header, limit, value)
    (tmp_path / "large.gguf").write_bytes(RawGguf().encode())
    with pytest.raises(ConvertError, match=re.escape(expected)):
        convert(tmp_path / "large.gguf")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ConvertError, match="is not a file"):
        convert(tmp_path / "pipe.gguf")


@pytest.mark.parametrize(
    ("name", "reason", "remedy"),
    [
        ("model.safetensors", "is safetensors already", "load its folder"),
        ("pytorch_model.bin", "may run code", "fetch the model's safetensors"),
        ("consolidated.00.pth", "may run code", "fetch the model's safetensors"),
        ("model.pt", "may run code", "fetch the model's safetensors"),
        ("tokenizer.model", "SentencePiece", "tokenizer.json"),
        ("model.onnx", "not converted", "safetensors"),
        ("readme.txt", "not a GGUF file", ""),
    ],
)
def test_other_formats_are_refused_with_what_to_do(
    name: str, reason: str, remedy: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"something that is no GGUF file")
    with pytest.raises(ConvertError) as error:
        convert(tmp_path / name)
    assert name in str(error.value)
    assert reason in str(error.value)
    assert remedy in str(error.value)


def test_a_folder_or_nothing_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="is a folder; name the"):
        convert(tmp_path)
    with pytest.raises(ConvertError, match="does not exist"):
        convert(tmp_path / "absent.gguf")


def test_an_unknown_number_type_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="dtype is 'int4'; float16, bfloat16, float32"):
        convert_gguf(tmp_path / "any.gguf", tmp_path / "out", dtype="int4")


def test_a_vocabulary_alone_gives_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.gguf").write_bytes(RawGguf(tensors={}).encode())
    tokenizer = tokenizer_from_gguf(tmp_path / "vocab.gguf")
    assert tokenizer["model"]["merges"] == [["a", "b"], ["ab", "c"]]  # type: ignore[index]

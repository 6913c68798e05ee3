"""A corpus of broken model folders, made by script: each case turns a good folder into a bad one.

    for case in cases():
        folder = shutil.copytree(good, somewhere)     # config.json and one model.safetensors
        case.build(folder)
        with pytest.raises(CheckpointError) as error:
            load(folder)
        missing = [part for part in case.expected if part not in str(error.value)]

Cases know no architecture: they pick tensors by suffix and settings by key, so the same corpus
runs through `Checkpoint` here and through whole models elsewhere. `needs` says which folders a case
fits: "any", "dense" (no packed layer) or "packed" (GPTQ layers with g_idx, more than one group and
desc_act false, settings in quantize_config.json or config.json).

Raw headers are edited as bytes, since no library will write what must be refused.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
Build = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class CorruptCase:
    """One way to spoil a folder.

    Attributes:
        name: what is wrong, in a few words; unique.
        build: spoils the folder in place.
        expected: what the error's text must contain: file, tensor, reason.
        needs: "any", "dense" or "packed".
    """

    name: str
    build: Build
    expected: tuple[str, ...]
    needs: str = "any"


def cases() -> list[CorruptCase]:
    """All cases, in an order that does not change."""
    table: list[tuple[str, tuple[tuple[str, Build, tuple[str, ...]], ...]]] = [
        ("any", (*_PREFIX, *_JSON_HEADER, *_ENTRIES, *_LAYOUT, *_FILES, *_SETTINGS, *_INDEX)),
        ("dense", _DENSE),
        ("packed", (*_QUANT, *_PACKED_SHAPES, *_PACKED_VALUES)),
    ]
    return [
        CorruptCase(name=name, build=build, expected=expected, needs=needs)
        for needs, rows in table
        for name, build, expected in rows
    ]


# --- tools ----------------------------------------------------------------------------------------


def header_and_data(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The model file's header, parsed, and its data bytes."""
    raw = (folder / MODEL).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(folder: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """A model file of these bytes; `length` is what its first eight bytes claim."""
    claimed = len(header) if length is None else length
    (folder / MODEL).write_bytes(claimed.to_bytes(8, "little") + header + data)


def data_bytes(folder: Path) -> bytes:
    return header_and_data(folder)[1]


def first_entry(header: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The tensor whose data comes first."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    name = min(entries, key=lambda name: entries[name]["data_offsets"])
    return name, entries[name]


def last_entry(header: dict[str, Any]) -> dict[str, Any]:
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return max(entries, key=lambda entry: entry["data_offsets"])


def length(claim: Callable[[int], int]) -> Build:
    """Claim another header length; `claim` is given the size of the file."""

    def build(folder: Path) -> None:
        raw = (folder / MODEL).read_bytes()
        (folder / MODEL).write_bytes(claim(len(raw)).to_bytes(8, "little") + raw[8:])

    return build


def raw_file(content: bytes) -> Build:
    return lambda folder: (folder / MODEL).write_bytes(content) and None


def raw_header(content: bytes | Callable[[bytes], bytes]) -> Build:
    """Other header bytes, of honest length, before the same data."""

    def build(folder: Path) -> None:
        header, data = header_and_data(folder)
        new = content if isinstance(content, bytes) else content(json.dumps(header).encode())
        write_raw(folder, new, data)

    return build


def header(change: Callable[[dict[str, Any]], object]) -> Build:
    """Edit the parsed header."""

    def build(folder: Path) -> None:
        parsed, data = header_and_data(folder)
        change(parsed)
        write_raw(folder, json.dumps(parsed).encode(), data)

    return build


def entry(**fields: object) -> Build:
    """Set fields of the first tensor's entry; None removes one."""

    def change(parsed: dict[str, Any]) -> None:
        _, first = first_entry(parsed)
        first.update(fields)
        for key, value in fields.items():
            if value is None:
                del first[key]

    return header(change)


def renamed(name: str) -> Build:
    """Give the first tensor another name."""
    return header(lambda parsed: parsed.update({name: parsed.pop(first_entry(parsed)[0])}))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Build:
    """Edit the tensors themselves."""

    def build(folder: Path) -> None:
        loaded = {name: t.clone() for name, t in load_file(folder / MODEL).items()}
        change(loaded)
        save_file({name: t.contiguous() for name, t in loaded.items()}, folder / MODEL)

    return build


def tensor(suffix: str, change: Callable[[Tensor], Tensor | None]) -> Build:
    """Edit the first tensor whose name ends in `suffix`; None removes it."""

    def edit(loaded: dict[str, Tensor]) -> None:
        name = min(name for name in loaded if name.endswith(suffix))
        changed = change(loaded.pop(name))
        if changed is not None:
            loaded[name] = changed

    return tensors(edit)


def put(suffix: str, value: float, at: int = 0) -> Build:
    """Set one element of the first tensor whose name ends in `suffix`."""

    def change(t: Tensor) -> Tensor:
        t.view(-1)[at] = value
        return t

    return tensor(suffix, change)


def quant(change: Callable[[dict[str, Any]], object]) -> Build:
    """Edit the quantisation settings wherever the folder has them."""

    def build(folder: Path) -> None:
        path = folder / "quantize_config.json"
        if path.exists():
            block = json.loads(path.read_text())
            change(block)
            path.write_text(json.dumps(block))
        path = folder / "config.json"
        config = json.loads(path.read_text())
        if "quantization_config" in config:
            change(config["quantization_config"])
            path.write_text(json.dumps(config))

    return build


def quant_set(**fields: object) -> Build:
    return quant(lambda block: block.update(fields))


def quant_drop(*keys: str) -> Build:
    return quant(lambda block: [block.pop(key, None) for key in keys])


def quant_in_files(first: dict[str, Any], second: dict[str, Any]) -> Build:
    """The same settings in both files, but for these fields."""

    def build(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        path = folder / "quantize_config.json"
        block = config.get("quantization_config") or json.loads(path.read_text())
        path.write_text(json.dumps({**block, **first}))
        config["quantization_config"] = {**block, **second}
        (folder / "config.json").write_text(json.dumps(config))

    return build


def text(name: str, content: str | bytes) -> Build:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def both(first: Build, second: Build) -> Build:
    def build(folder: Path) -> None:
        first(folder)
        second(folder)

    return build


def moved(name: str, to: str) -> Build:
    return lambda folder: (folder / name).rename(folder / to) and None


def linked_out(name: str) -> Build:
    """The file moves out of the folder, and a link to it takes its place."""

    def build(folder: Path) -> None:
        outside = folder.parent / f"outside-{folder.name}-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return build


def replaced(name: str, make: Callable[[Path], object]) -> Build:
    def build(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return build


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shard(folder: Path, *, index: bool = True) -> dict[str, str]:
    """Split the model into two shards with an index; returns its weight map."""
    loaded = load_file(folder / MODEL)
    names = sorted(loaded)
    weight_map = {name: SHARDS[k >= len(names) // 2] for k, name in enumerate(names)}
    for file in SHARDS:
        save_file({name: loaded[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / MODEL).unlink()
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def indexed(change: Callable[[Path, dict[str, Any]], object]) -> Build:
    """Shard the model, then edit folder and index."""

    def build(folder: Path) -> None:
        index = {"metadata": {"total_size": 1}, "weight_map": shard(folder)}
        change(folder, index)
        (folder / INDEX).write_text(json.dumps(index))

    return build


def shard_called(name: str) -> Build:
    """An index that gives the first tensor's shard this name."""
    return indexed(lambda _, index: index["weight_map"].update({min(index["weight_map"]): name}))


def other_bits(block: dict[str, Any]) -> None:
    block["bits"] = 4 if block["bits"] == 8 else 8


def other_groups(block: dict[str, Any]) -> None:
    block["group_size"] = 32 if block["group_size"] == -1 else -1


def many_entries(count: int) -> bytes:
    one = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(one % k for k in range(count)) + "}").encode()


# --- the file's first bytes -----------------------------------------------------------------------

_PREFIX = (
    ("empty file", raw_file(b""), (MODEL, "0 bytes")),
    ("seven bytes", raw_file(b"\x02" + bytes(6)), (MODEL, "7 bytes")),
    ("header length 0", length(lambda _: 0), (MODEL, "header length 0")),
    ("header length 1", length(lambda _: 1), (MODEL, "header length 1")),
    ("header length 2^63", length(lambda _: 2**63), (MODEL, "limit")),
    ("header length 2^64 - 1", length(lambda _: 2**64 - 1), (MODEL, "limit")),
    ("header length above the limit", length(lambda _: 100_000_001), (MODEL, "100,000,000")),
    ("header length file - 1", length(lambda size: size - 1), (MODEL, "cut short")),
    ("header length file - 7", length(lambda size: size - 7), (MODEL, "cut short")),
    ("header length in the middle of the header", length(lambda _: 40), (MODEL, "JSON")),
    ("Git LFS pointer", raw_file(b"version https://git-lfs.github.com/spec/v1\n"), ("git lfs",)),
    ("pickle under a false name", raw_file(b"PK\x03\x04\0\0\x08\x08" + bytes(64)), ("pickle",)),
    ("GGUF under a false name", raw_file(b"GGUF\3\0\0\0" + bytes(64)), ("GGUF",)),
    ("web page under a false name", raw_file(b"<!DOCTYPE html><html></html>"), ("web page",)),
)

# --- the header as JSON ---------------------------------------------------------------------------

_JSON_HEADER = (
    ("header is not UTF-8", raw_header(b'{"\xff\xfe":1}'), (MODEL, "UTF-8")),
    ("header begins with a byte order mark", raw_header(b"\xef\xbb\xbf{}"), (MODEL, "begin")),
    ("header begins with a space", raw_header(lambda raw: b" " + raw), (MODEL, "begin")),
    ("header is a list", raw_header(b"[]"), (MODEL, "begin")),
    ("header is not JSON", raw_header(b"{nonsense}"), (MODEL, "JSON")),
    ("header stops in the middle", raw_header(lambda raw: raw[: len(raw) // 2]), (MODEL, "JSON")),
    ("header has text behind it", raw_header(lambda raw: raw + b"{}"), (MODEL, "JSON")),
    ("header of deep lists", raw_header(b'{"a":' + b"[" * 90_000), (MODEL, "deep")),
    ("header of deep objects", raw_header(b'{"a":' * 90_000), (MODEL, "deep")),
    (
        "header of three million lists",
        raw_header(b'{"a":[' + b"[]," * 3_000_000),
        (MODEL, "100,000"),
    ),
    ("header of 100,001 tensors", raw_header(many_entries(100_001)), (MODEL, "100,000")),
    (
        "a tensor twice",
        raw_header(lambda raw: raw[:-1] + b',"x":1,"x":2}'),
        (MODEL, "'x' is given twice"),
    ),
    (
        "a field twice",
        raw_header(lambda raw: raw.replace(b'"shape"', b'"dtype":"F64","shape"', 1)),
        (MODEL, "'dtype' is given twice"),
    ),
    ("NaN in a shape", raw_header(lambda raw: raw.replace(b": [", b": [NaN, ", 1)), (MODEL, "NaN")),
    (
        "a number of 5000 digits",
        raw_header(lambda raw: raw.replace(b": [", b": [" + b"9" * 5000 + b", ", 1)),
        (MODEL, "JSON"),
    ),
    ("metadata is a list", header(lambda h: h.update(__metadata__=[])), (MODEL, "__metadata__")),
    ("metadata is null", header(lambda h: h.update(__metadata__=None)), (MODEL, "__metadata__")),
    (
        "metadata holds a number",
        header(lambda h: h.update(__metadata__={"format": 1})),
        (MODEL, "__metadata__", "not a string"),
    ),
    (
        "metadata of 20,000 keys",
        header(lambda h: h.update(__metadata__={str(k): "" for k in range(20_000)})),
        (MODEL, "__metadata__", "10,000"),
    ),
)

# --- one entry ------------------------------------------------------------------------------------


def _true_for_one(parsed: dict[str, Any]) -> None:
    """Counted as 1, true would fit the size of the data."""
    _, first = first_entry(parsed)
    first["shape"] = [True, *first["shape"]]


_ENTRIES = (
    ("entry is a list", header(lambda h: h.update({first_entry(h)[0]: []})), (MODEL, "entry")),
    ("entry without dtype", entry(dtype=None), (MODEL, "dtype")),
    ("entry without shape", entry(shape=None), (MODEL, "shape")),
    ("entry without offsets", entry(data_offsets=None), (MODEL, "data_offsets")),
    ("entry with a field too many", entry(strides=[1]), (MODEL, "strides")),
    ("unknown dtype", entry(dtype="Q4_0"), (MODEL, "dtype", "Q4_0")),
    ("dtype below a byte", entry(dtype="F4"), (MODEL, "dtype", "F4")),
    ("dtype is a number", entry(dtype=16), (MODEL, "dtype", "16")),
    ("dtype lies", entry(dtype="F64"), (MODEL, "bytes")),
    ("dtype in small letters", entry(dtype="f16"), (MODEL, "dtype")),
    ("negative extent", entry(shape=[-1, 4]), (MODEL, "shape", "-1")),
    ("both extents negative", entry(shape=[-8, -8]), (MODEL, "shape", "-8")),
    ("fractional extent", entry(shape=[4.0, 4]), (MODEL, "shape", "4.0")),
    ("extent is true", entry(shape=[True, 4]), (MODEL, "shape", "True")),
    ("true as an extra extent of 1", header(_true_for_one), (MODEL, "shape", "True")),
    ("extent is a string", entry(shape=["4"]), (MODEL, "shape", "'4'")),
    ("shape is a number", entry(shape=4), (MODEL, "shape")),
    ("shape overflows, 2^32 x 2^32", entry(shape=[2**32, 2**32]), (MODEL, "overflow")),
    ("shape overflows beside a zero", entry(shape=[0, 2**40, 2**40]), (MODEL, "overflow")),
    ("extent of 2^63", entry(shape=[2**63]), (MODEL, "shape")),
    ("shape larger than the file", entry(shape=[2**40]), (MODEL, "bytes")),
    ("nine dimensions", entry(shape=[1] * 9), (MODEL, "9 dimensions")),
    ("offsets reversed", entry(data_offsets=[16, 0]), (MODEL, "reversed")),
    ("negative offset", entry(data_offsets=[-8, 8]), (MODEL, "data_offsets", "-8")),
    ("fractional offset", entry(data_offsets=[0.0, 8]), (MODEL, "data_offsets")),
    ("three offsets", entry(data_offsets=[0, 8, 16]), (MODEL, "data_offsets")),
    ("offsets are a string", entry(data_offsets="0,8"), (MODEL, "data_offsets")),
    ("offset of 2^64", entry(data_offsets=[0, 2**64]), (MODEL, "data_offsets")),
    ("tensor without a name", renamed(""), (MODEL, "printable")),
    ("control characters in a name", renamed("a\x1b[2J\nb"), (MODEL, r"\x1b")),
    ("lone surrogate in a name", renamed("a\ud800"), (MODEL, "printable")),
    ("name of 10,000 letters", renamed("a" * 10_000), (MODEL, "512")),
)


def _overlap(parsed: dict[str, Any]) -> None:
    """The last tensor is moved one byte down, on top of the one before it."""
    last = last_entry(parsed)
    last["data_offsets"] = [offset - 1 for offset in last["data_offsets"]]


def _hole(folder: Path) -> None:
    parsed, data = header_and_data(folder)
    last = last_entry(parsed)
    begin = last["data_offsets"][0]
    last["data_offsets"] = [offset + 8 for offset in last["data_offsets"]]
    write_raw(folder, json.dumps(parsed).encode(), data[:begin] + bytes(8) + data[begin:])


def _hole_at_start(folder: Path) -> None:
    parsed, data = header_and_data(folder)
    for name, one in parsed.items():
        if name != "__metadata__":
            one["data_offsets"] = [offset + 8 for offset in one["data_offsets"]]
    write_raw(folder, json.dumps(parsed).encode(), bytes(8) + data)


def _two_on_one(parsed: dict[str, Any]) -> None:
    """A second name for the first tensor's bytes."""
    parsed["copy"] = dict(first_entry(parsed)[1])


def _cut(keep: Callable[[int], int]) -> Build:
    def build(folder: Path) -> None:
        raw = (folder / MODEL).read_bytes()
        (folder / MODEL).write_bytes(raw[: keep(len(raw))])

    return build


_LAYOUT = (
    ("tensors overlap", header(_overlap), (MODEL, "overlap")),
    ("two tensors on one place", header(_two_on_one), (MODEL, "overlap")),
    ("hole between tensors", _hole, (MODEL, "hole of 8 bytes")),
    ("hole before the first tensor", _hole_at_start, (MODEL, "hole of 8 bytes")),
    (
        "bytes behind the last tensor",
        lambda folder: write_raw(
            folder, json.dumps(header_and_data(folder)[0]).encode(), data_bytes(folder) + b"\0"
        ),
        (MODEL, "1 bytes follow"),
    ),
    ("one byte short", _cut(lambda size: size - 1), (MODEL, "cut short")),
    ("half the file", _cut(lambda size: size // 2 + 400), (MODEL, "cut short")),
    ("cut inside the header", _cut(lambda size: 64), (MODEL, "cut short")),
    ("cut after the length", _cut(lambda size: 8), (MODEL, "cut short")),
    ("no tensors but data", raw_header(b"{}"), (MODEL, "follow the last tensor")),
)

# --- files ----------------------------------------------------------------------------------------


def _numbered(first: str, second: str) -> Build:
    """Two unindexed shards of these names."""

    def build(folder: Path) -> None:
        shard(folder, index=False)
        (folder / SHARDS[0]).rename(folder / "first")
        (folder / SHARDS[1]).rename(folder / second)
        (folder / "first").rename(folder / first)

    return build


def _tensor_in_two_shards(folder: Path) -> None:
    shard(folder, index=False)
    first = load_file(folder / SHARDS[0])
    second = load_file(folder / SHARDS[1])
    save_file({**second, min(first): first[min(first)].clone()}, folder / SHARDS[1])


_FILES = (
    ("no weights", lambda folder: (folder / MODEL).unlink(), ("safetensors", "holds none")),
    ("weights are a folder", replaced(MODEL, Path.mkdir), (MODEL, "not a regular file")),
    ("weights are a FIFO", replaced(MODEL, os.mkfifo), (MODEL, "not a regular file")),
    (
        "weights are a dangling link",
        replaced(MODEL, lambda path: path.symlink_to("nowhere")),
        (MODEL, "not there"),
    ),
    ("weights link to themselves", replaced(MODEL, lambda path: path.symlink_to(MODEL)), (MODEL,)),
    ("weights link out of the folder", linked_out(MODEL), (MODEL, "leads out")),
    ("weights link to a device", replaced(MODEL, lambda p: p.symlink_to("/dev/zero")), (MODEL,)),
    ("only a pickle (.bin)", moved(MODEL, "pytorch_model.bin"), ("pytorch_model.bin", "run any")),
    ("only a pickle (.pt)", moved(MODEL, "model.pt"), ("model.pt", "safe_serialization=True")),
    ("only a pickle (.pth)", moved(MODEL, "consolidated.00.pth"), ("consolidated.00.pth",)),
    ("only an HDF5 file", moved(MODEL, "tf_model.h5"), ("tf_model.h5",)),
    ("only a GGUF file", moved(MODEL, "model.gguf"), ("model.gguf", "longwing convert")),
    ("two models", text("model-fp16.safetensors", b""), ("model-fp16.safetensors", "keep one")),
    ("model and GPTQ model", text("gptq_model-4bit--1g.safetensors", b""), ("keep one",)),
    ("name that no shard may have", moved(MODEL, "mödel.safetensors"), ("shard name",)),
    ("second shard missing", moved(MODEL, SHARDS[0]), (SHARDS[1], "is missing", "1 of 2")),
    ("shards of two sets", _numbered(SHARDS[0], "model-00002-of-00003.safetensors"), ("missing",)),
    (
        "shard numbers from 0",
        _numbered("model-00000-of-00002.safetensors", SHARDS[0]),
        (SHARDS[1],),
    ),
    ("a tensor in two shards", _tensor_in_two_shards, (*SHARDS, "too")),
    ("unfinished write inside", text(".model.partial-1a2b3c4d", b""), (".model.partial-1a2b3c4d",)),
    ("unfinished download inside", text("x.incomplete", b""), ("x.incomplete", "unfinished")),
)

# --- settings files as JSON -----------------------------------------------------------------------

CONFIG = "config.json"
_SETTINGS = (
    ("no config.json", lambda folder: (folder / CONFIG).unlink(), (CONFIG, "has none")),
    ("config.json is empty", text(CONFIG, ""), (CONFIG, "JSON")),
    ("config.json is not UTF-8", text(CONFIG, b'{"a":"\xe9"}'), (CONFIG, "UTF-8")),
    ("config.json is UTF-16", text(CONFIG, "{}".encode("utf-16")), (CONFIG, "UTF-8")),
    ("config.json is a list", text(CONFIG, "[]"), (CONFIG, "object")),
    ("config.json is null", text(CONFIG, "null"), (CONFIG, "object")),
    (
        "config.json says a thing twice",
        text(CONFIG, '{"model_type":"llama","model_type":"falcon"}'),
        (CONFIG, "twice"),
    ),
    ("config.json holds NaN", text(CONFIG, '{"rope_theta":NaN}'), (CONFIG, "NaN")),
    ("config.json holds Infinity", text(CONFIG, '{"rope_theta":-Infinity}'), (CONFIG, "Infinity")),
    ("config.json is deep", text(CONFIG, '{"a":' * 100_000), (CONFIG, "deep")),
    ("config.json of 5 MB", text(CONFIG, '{"a":"' + "b" * 5_000_000 + '"}'), (CONFIG, "limit")),
    ("config.json is a folder", replaced(CONFIG, Path.mkdir), (CONFIG, "regular")),
    ("config.json links out of the folder", linked_out(CONFIG), (CONFIG, "leads out")),
    (
        "generation_config.json is not JSON",
        text("generation_config.json", "{'eos': 2}"),
        ("generation_config.json", "JSON"),
    ),
)

# --- the index ------------------------------------------------------------------------------------

_INDEX = (
    ("shard name climbs out", shard_called("../x.safetensors"), (INDEX, "../x.safetensors")),
    ("shard name is absolute", shard_called("/etc/x.safetensors"), (INDEX, "/etc/x.safetensors")),
    ("shard name in a subfolder", shard_called("a/b.safetensors"), (INDEX, "a/b.safetensors")),
    ("shard name with a backslash", shard_called("..\\x.safetensors"), (INDEX, "shard name")),
    ("shard name ends in a newline", shard_called(SHARDS[0] + "\n"), (INDEX, "shard name")),
    ("shard name with NUL", shard_called("a\0.safetensors"), (INDEX, "shard name")),
    ("shard name not ASCII", shard_called("mödel.safetensors"), (INDEX, "shard name")),
    ("shard is a pickle", shard_called("pytorch_model.bin"), (INDEX, "shard name")),
    ("shard name is empty", shard_called(""), (INDEX, "shard name")),
    ("shard name is a number", shard_called(1), (INDEX, "not a file name")),  # type: ignore[arg-type]
    (
        "index names a missing shard",
        shard_called("x.safetensors"),
        (INDEX, "x.safetensors", "miss"),
    ),
    (
        "shard is gone",
        indexed(lambda folder, _: (folder / SHARDS[1]).unlink()),
        (INDEX, SHARDS[1], "missing"),
    ),
    ("index points to the wrong shard", shard_called(SHARDS[1]), (SHARDS[1], "it lies in")),
    (
        "index lists a tensor that no shard has",
        indexed(lambda _, index: index["weight_map"].update({"ghost": SHARDS[0]})),
        (SHARDS[0], "ghost"),
    ),
    (
        "index leaves a tensor out",
        indexed(lambda _, index: index["weight_map"].pop(min(index["weight_map"]))),
        (SHARDS[0], "does not list"),
    ),
    (
        "shard links out of the folder",
        indexed(lambda folder, _: linked_out(SHARDS[1])(folder)),
        (SHARDS[1], "leads out"),
    ),
    (
        "shard is cut short",
        indexed(lambda folder, _: os.truncate(folder / SHARDS[1], 200)),
        (SHARDS[1], "cut short"),
    ),
    ("index without a map", indexed(lambda _, i: i.pop("weight_map")), (INDEX, "weight_map")),
    ("index with a list", indexed(lambda _, i: i.update(weight_map=[])), (INDEX, "weight_map")),
    (
        "index with an empty map",
        indexed(lambda _, i: i.update(weight_map={})),
        (INDEX, "weight_map"),
    ),
    ("index metadata is a list", indexed(lambda _, i: i.update(metadata=[])), (INDEX, "metadata")),
    ("index with a foreign key", indexed(lambda _, i: i.update(auto_map={})), (INDEX, "auto_map")),
    ("index is not JSON", text(INDEX, "{"), (INDEX, "JSON")),
    (
        "index lists a tensor twice",
        text(INDEX, '{"weight_map":{"a":"b.safetensors","a":"c.safetensors"}}'),
        (INDEX, "twice"),
    ),
    (
        "two indices",
        both(text("a.safetensors.index.json", "{}"), text("b.safetensors.index.json", "{}")),
        ("a.safetensors.index.json", "keep one"),
    ),
)

# --- quantisation settings ------------------------------------------------------------------------

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
_DENSE = (
    (
        "dense weights, GPTQ settings",
        text("quantize_config.json", json.dumps(GPTQ)),
        (MODEL, "no tensor is packed"),
    ),
    (
        "dense weights, settings with code for bits",
        text("quantize_config.json", json.dumps({**GPTQ, "bits": "4; import os"})),
        ("quantize_config.json", "bits", "4; import os"),
    ),
)


def _no_settings(folder: Path) -> None:
    (folder / "quantize_config.json").unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text())
    config.pop("quantization_config", None)
    (folder / CONFIG).write_text(json.dumps(config))


def _scalars_instead(**values: Tensor) -> Build:
    """Settings only as TGI's tensors."""

    def build(folder: Path) -> None:
        _no_settings(folder)
        tensors(lambda loaded: loaded.update(values))(folder)

    return build


def _flip_desc_act(folder: Path) -> None:
    quant_in_files({"desc_act": True}, {"desc_act": False})(folder)


_QUANT = (
    ("bits with code", quant_set(bits="4; import os"), ("bits", "4; import os")),
    ("bits is a string", quant_set(bits="4"), ("bits", "'4'")),
    ("bits 5", quant_set(bits=5), ("bits", "5", "2, 3, 4 and 8")),
    ("bits 0", quant_set(bits=0), ("bits", "0")),
    ("bits -4", quant_set(bits=-4), ("bits", "-4")),
    ("bits 2^70", quant_set(bits=2**70), ("bits",)),
    ("bits true", quant_set(bits=True), ("bits", "True")),
    ("bits 4.0", quant_set(bits=4.0), ("bits", "4.0")),
    ("bits is a list", quant_set(bits=[4]), ("bits", "[4]")),
    ("bits is missing", quant_drop("bits"), ("bits", "missing")),
    ("bits is null", quant_set(bits=None), ("bits", "missing")),
    ("two names, two widths", quant_set(w_bit=7), ("w_bit", "bits")),
    ("group size 0", quant_set(group_size=0), ("group_size", "0")),
    ("group size -2", quant_set(group_size=-2), ("group_size", "-2")),
    ("group size 1e9", quant_set(group_size=10**9), ("group_size", "1000000000", "65,536")),
    ("group size 32.0", quant_set(group_size=32.0), ("group_size", "32.0")),
    ("group size is a string", quant_set(group_size="32"), ("group_size", "'32'")),
    ("group size true", quant_set(group_size=True), ("group_size", "True")),
    ("group size is missing", quant_drop("group_size"), ("group_size", "missing")),
    ("desc_act is a word", quant_set(desc_act="no"), ("desc_act", "'no'")),
    ("desc_act is 0", quant_set(desc_act=0), ("desc_act", "0")),
    ("sym is a word", quant_set(sym="yes"), ("sym", "'yes'")),
    ("damp_percent is 7", quant_set(damp_percent=7), ("damp_percent", "7")),
    ("method awq", quant_set(quant_method="awq"), ("quant_method", "awq")),
    ("method bitsandbytes", quant_set(quant_method="bitsandbytes"), ("bitsandbytes",)),
    ("method fp8", quant_set(quant_method="fp8"), ("quant_method", "fp8")),
    (
        "method compressed-tensors",
        quant_set(quant_method="compressed-tensors"),
        ("compressed-tensors",),
    ),
    ("method is a list", quant_set(quant_method=["gptq"]), ("quant_method",)),
    ("new name, method awq", quant_set(method="awq"), ("method", "awq")),
    ("AWQ without its name", quant_set(zero_point=True, version="GEMM"), ("AWQ",)),
    ("bitsandbytes without its name", quant_set(load_in_4bit=True), ("bitsandbytes",)),
    ("format marlin", quant_set(checkpoint_format="marlin"), ("marlin", "save it again")),
    ("format gemm", quant_set(checkpoint_format="gemm"), ("gemm",)),
    ("format gptq_p", quant_set(checkpoint_format="gptq_p"), ("gptq_p",)),
    ("format unheard of", quant_set(checkpoint_format="gptq_v3"), ("gptq_v3",)),
    ("format is a number", quant_set(checkpoint_format=2), ("checkpoint_format", "2")),
    ("two names, two formats", quant_set(format="gptq_v3"), ("format", "gptq_v3")),
    ("is_marlin_format", quant_set(is_marlin_format=True), ("is_marlin_format",)),
    ("is_marlin_format 0", quant_set(is_marlin_format=0), ("is_marlin_format", "0")),
    ("words of 64 bits", quant_set(pack_dtype="int64"), ("pack_dtype", "int64")),
    ("quantised activations", quant_set(act_bits=8), ("act_bits", "8")),
    ("rotated weights", quant_set(rotation="hadamard"), ("rotation", "hadamard")),
    ("low-rank adapter", quant_set(adapter={"name": "lora"}), ("adapter",)),
    ("dynamic is a list", quant_set(dynamic=[]), ("dynamic",)),
    ("dynamic rule is a number", quant_set(dynamic={"+:.*": 4}), ("dynamic", "4")),
    ("dynamic rule of 5 bits", quant_set(dynamic={"+:.*": {"bits": 5}}), ("bits", "5")),
    ("no settings at all", _no_settings, (MODEL, ".qweight", "quantize_config.json")),
    (
        "TGI's tensors, one missing",
        _scalars_instead(gptq_bits=torch.tensor([4])),
        ("gptq_groupsize", "group_size", "missing"),
    ),
    (
        "TGI's tensors, two numbers",
        _scalars_instead(gptq_bits=torch.tensor([4, 4]), gptq_groupsize=torch.tensor([32])),
        (MODEL, "gptq_bits", "one whole number"),
    ),
    (
        "TGI's tensors, fractions",
        _scalars_instead(gptq_bits=torch.tensor(4.0), gptq_groupsize=torch.tensor(32.0)),
        (MODEL, "gptq_bits", "one whole number"),
    ),
    (
        "TGI's tensors, 5 bits",
        _scalars_instead(gptq_bits=torch.tensor(5), gptq_groupsize=torch.tensor(32)),
        ("gptq_bits", "bits", "5"),
    ),
    (
        "files disagree on bits",
        quant_in_files({"bits": 4}, {"bits": 8}),
        (CONFIG, "bits", "quantize_config.json"),
    ),
    (
        "files disagree on the group size",
        quant_in_files({"group_size": 32}, {"group_size": 64}),
        (CONFIG, "group_size", "quantize_config.json"),
    ),
    ("files disagree on desc_act", _flip_desc_act, (CONFIG, "desc_act", "quantize_config.json")),
    (
        "files disagree on the format",
        quant_in_files({}, {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}),
        (CONFIG, "checkpoint_format", "quantize_config.json"),
    ),
    (
        "quantize_config.json is not JSON",
        text("quantize_config.json", "bits: 4"),
        ("quantize_config.json", "JSON"),
    ),
    (
        "quantize_config.json links out",
        both(text("quantize_config.json", "{}"), linked_out("quantize_config.json")),
        ("quantize_config.json", "leads out"),
    ),
    (
        "quantization_config is a list",
        lambda folder: text(
            CONFIG,
            json.dumps({**json.loads((folder / CONFIG).read_text()), "quantization_config": [4]}),
        )(folder),
        (CONFIG, "quantization_config"),
    ),
)

# --- packed tensors: shapes and number types ------------------------------------------------------


def _with_bias(loaded: dict[str, Tensor]) -> None:
    name = min(name for name in loaded if name.endswith(".qweight"))
    loaded[name.replace(".qweight", ".bias")] = torch.zeros(3, dtype=torch.float16)


_PACKED_SHAPES = (
    ("settings say other bits", quant(other_bits), ("qweight", "shape")),
    ("settings say other groups", quant(other_groups), ("qzeros", "shape")),
    ("qweight is missing", tensor(".qweight", lambda t: None), (".qweight",)),
    ("qzeros is missing", tensor(".qzeros", lambda t: None), (".qzeros",)),
    ("scales is missing", tensor(".scales", lambda t: None), (".scales",)),
    ("qweight a row short", tensor(".qweight", lambda t: t[:-1]), (MODEL, ".qweight", "shape")),
    ("qweight a column short", tensor(".qweight", lambda t: t[:, 1:]), (".qweight", "shape")),
    ("qweight is transposed", tensor(".qweight", lambda t: t.T), (MODEL, ".qweight", "shape")),
    ("qweight is flat", tensor(".qweight", lambda t: t.flatten()), (MODEL, ".qweight", "shape")),
    ("qweight is empty", tensor(".qweight", lambda t: t[:0]), (MODEL, ".qweight", "shape")),
    ("qweight is int64", tensor(".qweight", lambda t: t.long()), (".qweight", "torch.int64")),
    (
        "qweight is float32",
        tensor(".qweight", lambda t: t.view(torch.float32)),
        (".qweight", "torch.float32"),
    ),
    (
        "qweight is uint32",
        tensor(".qweight", lambda t: t.view(torch.uint32)),
        (".qweight", "torch.uint32"),
    ),
    ("qzeros a row short", tensor(".qzeros", lambda t: t[:-1]), (MODEL, ".qzeros", "shape")),
    ("qzeros a column short", tensor(".qzeros", lambda t: t[:, 1:]), (".qzeros", "shape")),
    ("qzeros is int16", tensor(".qzeros", lambda t: t.short()), (".qzeros", "torch.int16")),
    ("scales a row short", tensor(".scales", lambda t: t[:-1]), (MODEL, ".scales", "shape")),
    ("scales is transposed", tensor(".scales", lambda t: t.T), (MODEL, ".scales", "shape")),
    ("scales is float64", tensor(".scales", lambda t: t.double()), (".scales", "torch.float64")),
    ("scales is int32", tensor(".scales", lambda t: t.int()), (".scales", "torch.int32")),
    ("g_idx a row short", tensor(".g_idx", lambda t: t[:-1]), (MODEL, ".g_idx", "shape")),
    ("g_idx is int64", tensor(".g_idx", lambda t: t.long()), (MODEL, ".g_idx", "torch.int64")),
    ("g_idx is float32", tensor(".g_idx", lambda t: t.float()), (".g_idx", "torch.float32")),
    ("bias of 3", tensors(_with_bias), (MODEL, ".bias")),
)

# --- packed tensors: values -----------------------------------------------------------------------

_PACKED_VALUES = (
    ("scale NaN", put(".scales", float("nan")), (MODEL, ".scales", "nan", "group 0, output 0")),
    ("scale inf", put(".scales", float("inf"), 1), (MODEL, ".scales", "inf", "output 1")),
    ("scale -inf", put(".scales", float("-inf")), (MODEL, ".scales", "-inf")),
    ("scale negative", put(".scales", -1.0, -1), (MODEL, ".scales", "1 of ", "-1.0")),
    ("all scales negative", tensor(".scales", torch.neg), (MODEL, ".scales", "group 0, output 0")),
    ("g_idx out of range", put(".g_idx", 9999, -1), (MODEL, ".g_idx", "9999", "outside")),
    ("g_idx negative", put(".g_idx", -1, 2), (MODEL, ".g_idx", "-1 at row 2")),
    ("g_idx 2^31 - 1", put(".g_idx", 2**31 - 1), (MODEL, ".g_idx", "2147483647")),
    (
        "g_idx permuted though desc_act is false",
        tensor(".g_idx", lambda t: t.flip(0)),
        (MODEL, ".g_idx", "desc_act"),
    ),
    (
        "g_idx all zero though desc_act is false",
        tensor(".g_idx", torch.zeros_like),
        (MODEL, ".g_idx", "desc_act"),
    ),
)

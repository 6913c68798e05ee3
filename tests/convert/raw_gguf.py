"""GGUF files byte by byte, so that every length, count and type can be made to lie.

`RawGguf()` is a whole tiny Llama that converts; a test changes one thing and asks for its bytes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
KIND_F32, KIND_F16, KIND_Q4_0, KIND_Q4_1, KIND_Q8_0, KIND_Q8_K, KIND_I8 = 0, 1, 2, 3, 8, 15, 24

_FORMATS = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B",
    U64: "<Q", I64: "<q", F64: "<d",
}  # fmt: skip


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A string as GGUF stores it; `length` is what it claims to be."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data


def scalar(kind: int, value: float) -> bytes:
    """A value with its type in front."""
    return struct.pack("<I", kind) + struct.pack(_FORMATS[kind], value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string value with its type in front."""
    return struct.pack("<I", STRING) + string(value, length)


def array(kind: int, items: Sequence[float | str], count: int | None = None) -> bytes:
    """An array value with its type in front; `count` is what it claims to hold."""
    head = struct.pack("<IIQ", ARRAY, kind, len(items) if count is None else count)
    if kind == STRING:
        return head + b"".join(string(str(item)) for item in items)
    return head + b"".join(struct.pack(_FORMATS[kind], item) for item in items)


@dataclass
class RawTensor:
    """A line of the table, and the data it stands for."""

    dims: tuple[int, ...]
    kind: int = KIND_F32
    data: bytes = b""
    start: int | None = None
    num_dims: int | None = None

    def line(self, name: str | bytes, start: int) -> bytes:
        num_dims = len(self.dims) if self.num_dims is None else self.num_dims
        dims = struct.pack(f"<I{len(self.dims)}Q", num_dims, *self.dims)
        where = start if self.start is None else self.start
        return string(name) + dims + struct.pack("<IQ", self.kind, where)


V, D, F, H, N, K = 8, 8, 6, 4, 2, 1


def tiny_fields() -> dict[str | bytes, bytes]:
    return {
        "general.architecture": text("llama"),
        "general.type": text("model"),
        "llama.context_length": scalar(U32, 64),
        "llama.embedding_length": scalar(U32, D),
        "llama.block_count": scalar(U32, 1),
        "llama.feed_forward_length": scalar(U32, F),
        "llama.attention.head_count": scalar(U32, N),
        "llama.attention.head_count_kv": scalar(U32, K),
        "llama.attention.layer_norm_rms_epsilon": scalar(F32, 1e-5),
        "llama.rope.dimension_count": scalar(U32, H),
        "llama.rope.freq_base": scalar(F32, 10000.0),
        "llama.vocab_size": scalar(U32, V),
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text("gpt-2"),
        "tokenizer.ggml.tokens": array(STRING, ["a", "b", "c", "d", "ab", "abc", "<s>", "</s>"]),
        "tokenizer.ggml.token_type": array(I32, [1, 1, 1, 1, 1, 1, 3, 3]),
        "tokenizer.ggml.merges": array(STRING, ["a b", "ab c"]),
        "tokenizer.ggml.bos_token_id": scalar(U32, 6),
        "tokenizer.ggml.eos_token_id": scalar(U32, 7),
    }


def tiny_tensors() -> dict[str | bytes, RawTensor]:
    shapes = {
        "token_embd.weight": (D, V),
        "output_norm.weight": (D,),
        "output.weight": (D, V),
        "blk.0.attn_norm.weight": (D,),
        "blk.0.attn_q.weight": (D, N * H),
        "blk.0.attn_k.weight": (D, K * H),
        "blk.0.attn_v.weight": (D, K * H),
        "blk.0.attn_output.weight": (N * H, D),
        "blk.0.ffn_norm.weight": (D,),
        "blk.0.ffn_gate.weight": (D, F),
        "blk.0.ffn_up.weight": (D, F),
        "blk.0.ffn_down.weight": (F, D),
    }
    tensors: dict[str | bytes, RawTensor] = {}
    for name, dims in shapes.items():
        count = dims[0] * (dims[1] if len(dims) > 1 else 1)
        tensors[name] = RawTensor(dims, data=struct.pack(f"<{count}f", *range(count)))
    return tensors


@dataclass
class RawGguf:
    """A file to be: what it holds and what it claims. `repeat` adds entries a second time."""

    fields: dict[str | bytes, bytes] = field(default_factory=tiny_fields)
    tensors: dict[str | bytes, RawTensor] = field(default_factory=tiny_tensors)
    magic: bytes = b"GGUF"
    version: int = 3
    num_fields: int | None = None
    num_tensors: int | None = None
    repeat_field: str | None = None
    repeat_tensor: str | None = None
    alignment: int = 32
    cut: int = 0

    def encode(self) -> bytes:
        fields = list(self.fields.items())
        tensors = list(self.tensors.items())
        if self.repeat_field:
            fields.append((self.repeat_field, self.fields[self.repeat_field]))
        if self.repeat_tensor:
            tensors.append((self.repeat_tensor, self.tensors[self.repeat_tensor]))
        num_fields = len(fields) if self.num_fields is None else self.num_fields
        num_tensors = len(tensors) if self.num_tensors is None else self.num_tensors
        out = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_fields)
        out += b"".join(string(key) + value for key, value in fields)
        data = b""
        for name, tensor in tensors:
            out += tensor.line(name, len(data))
            data += self.padded(tensor.data)
        whole = self.padded(out) + data
        return whole[: len(whole) - self.cut]

    def padded(self, data: bytes) -> bytes:
        return data + b"\0" * (-len(data) % self.alignment)

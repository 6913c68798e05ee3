"""Model folders with tokenizers for the tests: Falcon's real one, and one of Llama 2's kind."""

import json
import lzma
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

DATA = Path(__file__).parent.parent / "data"
FALCON_CONTROLS = (
    *(">>TITLE<<", ">>ABSTRACT<<", ">>INTRODUCTION<<", ">>SUMMARY<<", ">>COMMENT<<", ">>ANSWER<<"),
    *(">>QUESTION<<", ">>DOMAIN<<", ">>PREFIX<<", ">>SUFFIX<<", ">>MIDDLE<<", "<|endoftext|>"),
)
FALCON_VOCAB = 65_024
OPEN_ASSISTANT = ("<|prompter|>", "<|assistant|>")
CHATML = ("<|im_start|>", "<|im_end|>")

LLAMA_ALPHABET = "abcdefghijklmnopqrstuvwxyz<>[]|/▁"
LLAMA_MERGES = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("▁", "▁")]


def added(token_id: int, content: str, **settings: Any) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens; special unless told otherwise."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **plain, "special": True, **settings}


def falcon_json(*further: str) -> dict[str, Any]:
    """Falcon's tokenizer.json with its twelve control tokens, and `further` ones beyond them."""
    packed = DATA / "falcon-tokenizer" / "falcon_tokenizer.json.xz"
    described: dict[str, Any] = json.loads(lzma.decompress(packed.read_bytes()))
    controls = [added(place, token) for place, token in enumerate(FALCON_CONTROLS)]
    beyond = [added(FALCON_VOCAB + place, token) for place, token in enumerate(further)]
    return {**described, "added_tokens": controls + beyond}


def llama_json(scheme: str = "legacy") -> dict[str, Any]:
    """A small tokenizer of Llama 2's kind: ▁ for spaces, bytes for what the vocabulary lacks.

    Args:
        scheme: "legacy" puts ▁ before every stretch of text, "first" only before the first one.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LLAMA_ALPHABET]
    tokens += [left + right for left, right in LLAMA_MERGES]
    vocab = {token: place for place, token in enumerate(tokens)}
    model = models.BPE(vocab, LLAMA_MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Backend(model)
    if scheme == "legacy":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*pieces, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    described: dict[str, Any] = json.loads(backend.to_str())
    return described


LLAMA_SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_folder(folder: Path, described: object, **settings: object) -> Path:
    """The folder, once it holds a tokenizer.json and a tokenizer_config.json of these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder

"""Reads the tokenizer's files of a model folder, which a stranger wrote.

    tokenizer.json              vocabulary, merges and all steps: the one that is needed
    tokenizer_config.json       which tokens begin, end and pad; the chat template, or named ones
    special_tokens_map.json     older: the first of these alone
    added_tokens.json           older: tokens beyond the vocabulary, and their ids
    chat_template.jinja         newer: the chat template
    additional_chat_templates/  newer: named ones

This file finds, bounds and checks them; what they mean for text is `tokenizer.py`. Every refusal is
a TokenizerError that names the file. Keys that have no meaning here are ignored: these files are
transformers', which writes many.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from longwing.errors import TokenizerError

MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_SETTINGS_BYTES = 16 * 2**20
MAX_TEMPLATE_BYTES = 64 * 2**10
MAX_TEMPLATES = 64
MAX_ADDED_TOKENS = 100_000
"""Added tokens of one tokenizer; Gemma, which has most, has about 6,400."""
MAX_ADDED_CHARS = 256
"""Characters of one added token."""

_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_FIRST_SETTINGS, _OLDER_SETTINGS = "tokenizer_config.json", "special_tokens_map.json"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Attributes:
        backend: tokenizer.json, checked in size and form, for the tokenizers library.
        added_tokens: its list of them.
        decoder: its description of the decoder.
        unknown: its token for what the vocabulary cannot write, if it has one.
        roles: {"bos": "<s>", ...}: the tokens with a part to play, as the folder names them.
        special: further tokens that are special.
        added_ids: tokens and the ids that other files than tokenizer.json expect for them.
        add_bos: whether a text begins with bos; None leaves it to tokenizer.json.
        add_eos: whether a text ends with eos; None leaves it to tokenizer.json.
        templates: chat templates by name; the nameless one is "default".
    """

    backend: str
    added_tokens: tuple[Mapping[str, object], ...] = ()
    decoder: object = None
    unknown: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    added_ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    templates: Mapping[str, str] = field(default_factory=dict)


def read_files(folder: Path) -> TokenizerFiles:
    """Everything that a folder says about its tokenizer.

    Raises:
        TokenizerError: a file is missing, too large, unreadable, or not what it should be.
    """
    if not (folder / "tokenizer.json").exists():
        raise _missing(folder)
    backend = _text(folder, "tokenizer.json", MAX_TOKENIZER_BYTES)
    described = _parsed(backend, "tokenizer.json")
    added = _added(described.get("added_tokens", []))
    older, newer = (_settings(folder, name) for name in (_OLDER_SETTINGS, _FIRST_SETTINGS))
    roles: dict[str, str] = {}
    special: set[str] = set()
    for name, settings in ((_OLDER_SETTINGS, older), (_FIRST_SETTINGS, newer)):
        roles |= _roles(settings, name)
        special |= _further(settings, name)
    declared = _declared(newer)
    return TokenizerFiles(
        backend=backend,
        added_tokens=added,
        decoder=described.get("decoder"),
        unknown=_unknown(described.get("model")),
        roles=roles,
        special=frozenset(
            special | {token for token, (_, is_special) in declared.items() if is_special}
        ),
        added_ids={**_older_ids(folder), **{token: at for token, (at, _) in declared.items()}},
        add_bos=_flag(newer, "add_bos_token"),
        add_eos=_flag(newer, "add_eos_token"),
        templates=_templates(folder, newer.get("chat_template")),
    )


def _missing(folder: Path) -> TokenizerError:
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json"):
        if (folder / name).exists():
            return TokenizerError(
                f"is missing; longwing reads no {name}",
                file="tokenizer.json",
                remedy="convert it once, with transformers and sentencepiece installed: "
                "AutoTokenizer.from_pretrained(dir).save_pretrained(dir)",
            )
    return TokenizerError(
        f"is missing in {folder}",
        file="tokenizer.json",
        remedy="download the model again, with its tokenizer",
    )


def _roles(settings: Mapping[str, object], file: str) -> dict[str, str]:
    given = {role: settings.get(f"{role}_token") for role in _ROLES}
    return {
        role: _token(value, f"{role}_token", file)
        for role, value in given.items()
        if value is not None
    }


def _further(settings: Mapping[str, object], file: str) -> set[str]:
    """Special tokens without a role: a list, or in newer files also a dict by name."""
    found: set[str] = set()
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key) or []
        if not isinstance(value, list | dict):
            raise TokenizerError(f"{key} is {_kind(value)}, not a list", file=file)
        tokens = value.values() if isinstance(value, dict) else value
        found |= {_token(token, key, file) for token in tokens}
    return found


def _declared(settings: Mapping[str, object]) -> dict[str, tuple[int, bool]]:
    """The added tokens of tokenizer_config.json: token -> (id, whether it is special)."""
    file, key = _FIRST_SETTINGS, "added_tokens_decoder"
    value = settings.get(key) or {}
    if not isinstance(value, dict):
        raise TokenizerError(f"{key} is {_kind(value)}, not an object", file=file)
    _check_count(len(value), file)
    found: dict[str, tuple[int, bool]] = {}
    for number, token in value.items():
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            raise TokenizerError(
                f"{key} has the key {number[:40]!r}, which is not an id", file=file
            )
        special = isinstance(token, dict) and token.get("special") is True
        found[_token(token, key, file)] = (int(number), special)
    return found


def _older_ids(folder: Path) -> dict[str, int]:
    file = "added_tokens.json"
    value = _settings(folder, file)
    _check_count(len(value), file)
    found: dict[str, int] = {}
    for token, number in value.items():
        if not isinstance(number, int) or not 0 <= number < 2**31:
            raise TokenizerError(f"the id of {token[:40]!r} is not a whole number", file=file)
        found[_token(token, "a token", file)] = number
    return found


def _templates(folder: Path, configured: object) -> dict[str, str]:
    """Templates by name; a file goes before the same in tokenizer_config.json."""
    file = _FIRST_SETTINGS
    found: dict[str, str] = {}
    if isinstance(configured, str):
        found["default"] = configured
    elif isinstance(configured, list):
        for entry in configured:
            name, source = (
                (entry.get("name"), entry.get("template"))
                if isinstance(entry, dict)
                else (None, None)
            )
            if not (isinstance(name, str) and isinstance(source, str)):
                raise TokenizerError(
                    "chat_template has an entry without name and template", file=file
                )
            found[name] = source
    elif configured is not None:
        raise TokenizerError(f"chat_template is {_kind(configured)}, not text", file=file)
    for name, path in _template_files(folder):
        found[name] = _text(folder, path, MAX_TEMPLATE_BYTES)
    if len(found) > MAX_TEMPLATES:
        raise TokenizerError(
            f"{len(found)} chat templates; the limit is {MAX_TEMPLATES}", file=file
        )
    for name, source in found.items():
        if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise TokenizerError(
                f"the chat template {name[:40]!r} has more than {MAX_TEMPLATE_BYTES} bytes",
                file=file,
            )
    return found


def _template_files(folder: Path) -> Iterator[tuple[str, str]]:
    if (folder / "chat_template.jinja").exists():
        yield "default", "chat_template.jinja"
    further = folder / "additional_chat_templates"
    if further.is_dir():
        for number, path in enumerate(sorted(further.glob("*.jinja"))):
            if number <= MAX_TEMPLATES:
                yield path.stem, f"{further.name}/{path.name}"


def _flag(settings: Mapping[str, object], key: str) -> bool | None:
    value = settings.get(key)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{key} is {_kind(value)}, not true or false", file=_FIRST_SETTINGS)
    return value


def _token(value: object, key: str, file: str) -> str:
    """A token that is written as text, or as an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise TokenizerError(f"{key} has {_kind(content)} where a token belongs", file=file)
    if not 0 < len(content) <= MAX_ADDED_CHARS:
        raise TokenizerError(
            f"{key} has a token of {len(content)} characters; 1 to {MAX_ADDED_CHARS} are possible",
            file=file,
        )
    return content


def _added(value: object) -> tuple[Mapping[str, object], ...]:
    file = "tokenizer.json"
    if not isinstance(value, list):
        raise TokenizerError(f"added_tokens is {_kind(value)}, not a list", file=file)
    _check_count(len(value), file)
    for token in value:
        if not isinstance(token, dict):
            raise TokenizerError(f"added_tokens holds {_kind(token)}, not an object", file=file)
        _token(token, "added_tokens", file)
    return tuple(value)


def _unknown(model: object) -> str | None:
    """The unknown token, which BPE and word models name and Unigram models number."""
    if not isinstance(model, dict):
        return None
    token, number, vocab = model.get("unk_token"), model.get("unk_id"), model.get("vocab")
    if type(number) is int and isinstance(vocab, list) and 0 <= number < len(vocab):
        token = vocab[number][0] if isinstance(vocab[number], list) and vocab[number] else None
    return token if isinstance(token, str) else None


def _check_count(count: int, file: str) -> None:
    if count > MAX_ADDED_TOKENS:
        raise TokenizerError(f"{count} added tokens; the limit is {MAX_ADDED_TOKENS}", file=file)


def _settings(folder: Path, name: str) -> Mapping[str, object]:
    """A JSON object that a folder may lack."""
    if not (folder / name).exists():
        return {}
    return _parsed(_text(folder, name, MAX_SETTINGS_BYTES), name)


def _parsed(text: str, file: str) -> Mapping[str, object]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise TokenizerError("JSON is nested too deeply", file=file) from None
    except ValueError as fault:
        raise TokenizerError(f"not valid JSON: {fault}", file=file) from None
    if not isinstance(value, dict):
        raise TokenizerError(f"holds {_kind(value)}, not a JSON object", file=file)
    return value


def _text(folder: Path, name: str, limit: int) -> str:
    """A whole file as text. It must be regular, at most `limit` bytes, and lie in the folder."""
    path = folder / name
    _check_place(folder, path, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise TokenizerError("is not a regular file", file=name)
            raw = file.read(limit + 1)
    except OSError as fault:
        raise TokenizerError(f"cannot be read: {fault.strerror}", file=name) from None
    if len(raw) > limit:
        raise TokenizerError(f"is longer than {limit} bytes", file=name)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise TokenizerError(f"byte {fault.start} is not UTF-8", file=name) from None


def _check_place(folder: Path, path: Path, name: str) -> None:
    """A link may lead within the folder, or in the Hub's cache to the same model's blobs."""
    try:
        home, real = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as fault:
        raise TokenizerError(f"cannot be found: {fault}", file=name) from None
    in_cache = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
    if not (
        real.is_relative_to(home)
        or (in_cache and real.is_relative_to(home.parent.parent / "blobs"))
    ):
        raise TokenizerError("is a link that leads out of the model folder", file=name)


def _kind(value: object) -> str:
    """What JSON calls a value of this type."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")

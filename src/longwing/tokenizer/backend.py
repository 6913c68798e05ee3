"""The tokenizers library (Rust), made from a folder's files and kept from surprising anyone.

What the library does silently is checked here: an added token whose id does not fit gets another
one; truncation and padding can be left on in tokenizer.json. What it raises (bare exceptions, and
panics, which Python code cannot catch as `Exception`) becomes a TokenizerError.

A model needs up to three instances: `read_backend` reads special tokens; `plain_copy` reads past
them; `inside_copy` does so in the middle of a text. What they are used for is `tokenizer.py`.
"""

import copy
import json
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from longwing.errors import TokenizerError
from longwing.tokenizer.files import TokenizerFiles

_FILE = "tokenizer.json"


def read_backend(files: TokenizerFiles) -> Backend:
    """The tokenizer of tokenizer.json, with the tokens that the other files add to it.

    Raises:
        TokenizerError: the library refuses the file, or the files contradict each other.
    """
    with library_errors():
        backend = Backend.from_str(files.backend)
        backend.no_truncation()
        backend.no_padding()
        for token, number in sorted(files.added_ids.items(), key=operator.itemgetter(1)):
            if backend.token_to_id(token) is None:
                special = token in files.special
                backend.add_tokens([AddedToken(token, special=special, normalized=False)])
            _check_id(backend, token, number)
        _make_special(backend, files)
    for entry in files.added_tokens:
        _check_id(backend, str(entry["content"]), entry.get("id"))
    return backend


def plain_copy(backend: Backend, controls: Iterable[AddedToken]) -> Backend:
    """A copy that reads the given tokens as text."""
    with library_errors():
        plain: Backend = copy.deepcopy(backend)
        plain.add_special_tokens([_special(token.content, token) for token in controls])
        plain.encode_special_tokens = True
    return plain


def inside_copy(plain: Backend) -> Backend:
    """The same for text that does not begin a prompt.

    Only the pre-tokenizer Metaspace can tell the beginning of a prompt from text after a special
    token (`prepend_scheme: first`); for all others this is `plain` itself.
    """
    state = json.loads(plain.to_str())
    changed = _never_first(state["pre_tokenizer"])
    if changed == state["pre_tokenizer"]:
        return plain
    with library_errors():
        inside = Backend.from_str(json.dumps({**state, "pre_tokenizer": changed}))
        inside.encode_special_tokens = True
    return inside


def encode(backend: Backend, text: str) -> list[int]:
    """The ids of a text, with nothing put before or after it."""
    with library_errors():
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def frame(backend: Backend) -> tuple[list[int], list[int]]:
    """The ids that the model's own tokenizer puts before and after a text."""
    if backend.post_processor is None:
        return [], []
    with library_errors():
        framed = backend.encode("a", add_special_tokens=True)
    text = [place for place, added in enumerate(framed.special_tokens_mask) if not added]
    if not text:
        return framed.ids, []
    return framed.ids[: text[0]], framed.ids[text[-1] + 1 :]


@contextmanager
def library_errors() -> Iterator[None]:
    """Whatever the library raises inside becomes a TokenizerError."""
    try:
        yield
    except TokenizerError:
        raise
    except Exception as fault:
        raise _failure(fault) from None
    except BaseException as fault:
        if type(fault).__name__ != "PanicException":
            raise
        raise _failure(fault) from None


def _failure(fault: BaseException) -> TokenizerError:
    reason = " ".join(str(fault).split())[:200]
    return TokenizerError(f"the tokenizers library cannot use it: {reason}", file=_FILE)


def _make_special(backend: Backend, files: TokenizerFiles) -> None:
    """Special are the tokens with a role, and those named so; most are already.

    Tokens for padding or masking that the vocabulary lacks are not added: the model has no row for
    them, and nothing here needs them.
    """
    roles = {
        role: token for role, token in files.roles.items() if backend.token_to_id(token) is not None
    }
    for role in ("bos", "eos"):
        if role in files.roles and role not in roles:
            raise TokenizerError(
                f"the {role} token {files.roles[role]!r} is not in the vocabulary", file=_FILE
            )
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    wanted = sorted(files.special.union(roles.values()))
    backend.add_special_tokens([_special(token, known.get(token)) for token in wanted])


def _special(token: str, known: AddedToken | None) -> AddedToken:
    """The token as a special one, with the other settings that it has already."""
    if known is None:
        return AddedToken(token, special=True, normalized=False)
    return AddedToken(
        token,
        special=True,
        normalized=known.normalized,
        lstrip=known.lstrip,
        rstrip=known.rstrip,
        single_word=known.single_word,
    )


def _check_id(backend: Backend, token: str, expected: object) -> None:
    actual = backend.token_to_id(token)
    if actual != expected:
        raise TokenizerError(
            f"the token {token!r} should have the id {expected}, but gets {actual}",
            file=_FILE,
            remedy="the tokenizer's files do not belong together; download them again",
        )


def _never_first(step: Any) -> Any:
    if isinstance(step, list):
        return [_never_first(part) for part in step]
    if not isinstance(step, dict):
        return step
    changed = {name: _never_first(value) for name, value in step.items()}
    return changed | ({"prepend_scheme": "never"} if step.get("prepend_scheme") == "first" else {})

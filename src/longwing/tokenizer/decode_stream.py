"""From token ids back to text, all at once or as they come.

The one idea: a token is bytes. Byte-level vocabularies (Falcon, GPT-2, Llama 3) spell the bytes in
an alphabet of 256 characters; SentencePiece vocabularies (Llama 2, Mistral) hold text with `▁` for
a space, and `<0xE2>` for single bytes. Either way a text is its tokens' bytes, joined and read as
UTF-8, whose decoder is a small state machine: one step per token, never half a character, and the
same text whatever the portions. Bytes that are not UTF-8 become U+FFFD, as many as Unicode
recommends.

What else a decoder does concerns only the beginning (`▁Hello` starts without its space) or the gaps
(no decoder at all: a space between tokens). Decoders of other kinds are refused, not imitated.

For broken UTF-8 the tokenizers library differs in one case: a run of `<0x..>` tokens with one wrong
byte is for it all U+FFFD, one for each byte, which nobody could know before the run ends. Here the
good characters of such a run stay.
"""

import codecs
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from longwing.errors import TokenizerError

REPLACEMENT = "\ufffd".encode()
"""What an id without a token adds to a text."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The `decoder` of a tokenizer.json, reduced to what it does to a token and to the beginning.

    Attributes:
        byte_level: tokens are spelt in the byte alphabet.
        byte_fallback: `<0xE2>` is a byte.
        replaced: (old, new) pairs, applied to a token's text.
        first_drops: this character is dropped, not replaced, in the first token.
        strip: at most so many of `strip_char` are taken off the beginning of the text.
        strip_char: a single character.
        joiner: what stands between tokens.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replaced: tuple[tuple[str, str], ...] = ()
    first_drops: str = ""
    strip: int = 0
    strip_char: str = " "
    joiner: bytes = b""

    def bytes_of(self, token: str, first: bool = False) -> bytes:
        """What a token adds to the text; `first` if it begins it."""
        if self.byte_level:
            # A token with any other character (an added one) is taken as it stands.
            if all(char in _BYTES for char in token):
                return bytes(_BYTES[char] for char in token)
            return token.encode()
        if self.byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if first and self.first_drops:
            token = token.replace(self.first_drops, "")
        for old, new in self.replaced:
            token = token.replace(old, new)
        return token.encode() if first else self.joiner + token.encode()


def read_decoder(described: object) -> Decoder:
    """The decoder that a tokenizer.json describes.

    Args:
        described: the value of its `decoder` key, which the tokenizers library has accepted.

    Raises:
        TokenizerError: a kind that is not imitated here (WordPiece, CTC, regular expressions ...).
    """
    if described is None:
        return Decoder(joiner=b" ")
    found: dict[str, object] = {}
    replaced: list[tuple[str, str]] = []
    fused = False
    for step in _steps(described):
        kind = step.get("type")
        pattern = step.get("pattern")
        if kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step.get("stop") == 0:
            found |= {"strip": step["start"], "strip_char": step["content"]}
        elif kind == "ByteLevel" and not fused:
            found["byte_level"] = True
        elif kind == "ByteFallback" and not fused:
            found["byte_fallback"] = True
        elif (
            kind == "Replace" and isinstance(pattern, Mapping) and "String" in pattern and not fused
        ):
            replaced.append((str(pattern["String"]), str(step["content"])))
        elif kind == "Metaspace" and not fused:
            mark = str(step["replacement"])
            replaced.append((mark, " "))
            found["first_drops"] = "" if step.get("prepend_scheme") == "never" else mark
        else:
            raise _unknown(f"the step {kind!r} with these settings")
    if "byte_level" in found and (replaced or len(found) > 1):
        raise _unknown("ByteLevel together with other steps")
    return Decoder(replaced=tuple(replaced), **found)  # type: ignore[arg-type]


def _steps(described: object) -> list[Mapping[str, object]]:
    """The steps of nested sequences, in order."""
    if not isinstance(described, Mapping):
        raise _unknown(f"a {type(described).__name__}")
    if described.get("type") != "Sequence":
        return [described]
    inner = described.get("decoders")
    return [step for part in inner for step in _steps(part)] if isinstance(inner, list) else []


def _unknown(what: str) -> TokenizerError:
    return TokenizerError(
        f"its decoder has {what}, which longwing does not know",
        file="tokenizer.json",
        remedy="it knows byte-level (Falcon, Llama 3) and SentencePiece (Llama 2, Mistral) ones",
    )


class DecodeStream:
    """Turns the ids of one answer into text as they come; `Tokenizer.stream` makes it.

    The pieces put together are `Tokenizer.decode` of all ids. A piece may be empty: the bytes of a
    character can be spread over tokens.

    Args:
        decoder: the model's.
        bytes_of: what an id adds to the text, and whether it begins it, as bytes.
        skipped: ids that leave no trace (special tokens).
        begun: the text has begun before, so nothing is dropped at its beginning.
    """

    def __init__(
        self,
        decoder: Decoder,
        bytes_of: Callable[[int, bool], bytes],
        skipped: Collection[int],
        *,
        begun: bool = False,
    ) -> None:
        self._bytes_of = bytes_of
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = not begun
        self._strip_char, self._to_strip = decoder.strip_char, 0 if begun else decoder.strip

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before. Constant time.

        Args:
            token_id: the next id. One that the vocabulary lacks, as models with a padded vocabulary
                can produce, shows as U+FFFD.

        Raises:
            RequestError: the id is negative or not a whole number.
        """
        if token_id in self._skipped:
            return ""
        added = self._bytes_of(token_id, self._first)
        self._first = False
        return self._stripped(self._utf8.decode(added))

    def push_all(self, token_ids: Iterable[int]) -> str:
        """`push` for each id, and the pieces put together."""
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        """What was held back, with U+FFFD for a character that never became whole."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if not (self._to_strip and text):
            return text
        rest = text.lstrip(self._strip_char)
        taken = min(len(text) - len(rest), self._to_strip)
        self._to_strip = 0 if rest else self._to_strip - taken
        return text[taken:]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()

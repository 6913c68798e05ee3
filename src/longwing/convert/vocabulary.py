"""The vocabulary in a GGUF file: tokens, their kinds, the ids with a role, merges; all checked.

What is built from it is `tokenizer.py`. Sources: the GGUF specification's `tokenizer.ggml.*` keys,
and llama.cpp's src/llama-vocab.cpp for what holds when a key is absent.
"""

from enum import IntEnum

from longwing.convert.gguf_file import GgufFile
from longwing.convert.gguf_header import show

Merge = tuple[str, str]

MAX_PIECE_LEN = 512
"""In characters; bounds the search for merges. Published pieces stay below 150."""

_TOKENS = "tokenizer.ggml.tokens"
_KINDS = "tokenizer.ggml.token_type"
_MERGES = "tokenizer.ggml.merges"
_SCORES = "tokenizer.ggml.scores"


class Kind(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary:
    """The tokens of a file, without the made-up names that fill an embedding's spare rows.

    Args:
        file: an open GGUF file.
        default_ids: ids by role ("bos", "eos", "unknown") where the file does not name them.

    Attributes:
        tokens: the text of every token, by id.
        kinds: what each is, by id.
        ids: the id of every text.
        bos_id, unk_id, pad_id: ids with a role, or None.
        eos_ids: tokens that end an answer, the end of text first.

    Raises:
        ConvertError: a key is missing or malformed, a token empty or there twice, an id out of
            range.
    """

    def __init__(self, file: GgufFile, default_ids: dict[str, int]) -> None:
        self._file = file
        tokens = file.texts(_TOKENS)
        if not tokens:
            raise file.refusal("is empty", part=_TOKENS)
        self._num_listed = len(tokens)
        kinds = self._read_kinds()
        end = len(tokens)
        while end > 1 and (tokens[end - 1] == f"[PAD{end - 1}]" or kinds[end - 1] == Kind.UNUSED):
            end -= 1
        self.tokens = tokens[:end]
        self.kinds = kinds[:end]
        self.ids = self._index()
        self.bos_id = self._role("bos", default_ids)
        self.unk_id = self._role("unknown", default_ids)
        self.pad_id = self._role("padding", default_ids)
        ends = [self._role(role, default_ids) for role in ("eos", "eot", "eom")]
        self.eos_ids = tuple(dict.fromkeys(end for end in ends if end is not None))

    def __len__(self) -> int:
        return len(self.tokens)

    def added(self) -> list[tuple[int, str, bool]]:
        """(id, text, special) of the tokens that are found whole in a text before it is split.

        Control tokens are special, user-defined ones are not, and one with a role always is.
        """
        roles = {self.bos_id, self.pad_id, *self.eos_ids}
        whole = (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
        return [
            (index, token, index in roles or kind != Kind.USER_DEFINED)
            for index, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in whole or index in roles
        ]

    def merges(self) -> list[Merge]:
        """The merges listed in the file, first to last."""
        merges = []
        for index, merge in enumerate(self._file.texts(_MERGES)):
            left, _, right = merge.partition(" ")
            if not {left, right, left + right} <= self.ids.keys():
                reason = f"merge {index}, {show(merge)}, does not join two tokens to a third"
                raise self._file.refusal(reason, part=_MERGES)
            merges.append((left, right))
        return merges

    def derived_merges(self) -> list[Merge]:
        """SentencePiece's merges: every cut of every piece into two others, best score first.

        Of a piece's cuts the one with the longer left part comes first. Control, byte and unused
        tokens take no part.
        """
        scores = self._file.numbers(_SCORES, length=self._num_listed).tolist()
        pieces = {
            token: float(score)
            for token, kind, score in zip(self.tokens, self.kinds, scores, strict=False)
            if kind == Kind.NORMAL
        }
        ranked: list[tuple[float, int, Merge]] = []
        for piece, score in pieces.items():
            if len(piece) > MAX_PIECE_LEN:
                reason = f"token {self.ids[piece]} has {len(piece)} characters; at most"
                raise self._file.refusal(f"{reason} {MAX_PIECE_LEN} are allowed", part=_TOKENS)
            for cut in range(1, len(piece)):
                if piece[:cut] in pieces and piece[cut:] in pieces:
                    ranked.append((-score, -cut, (piece[:cut], piece[cut:])))
        ranked.sort(key=lambda item: item[:2])
        return [merge for _, _, merge in ranked]

    def _read_kinds(self) -> list[int]:
        if _KINDS not in self._file.fields:
            return [Kind.NORMAL] * self._num_listed
        kinds: list[int] = self._file.numbers(_KINDS, length=self._num_listed).tolist()
        for kind in set(kinds) - set(Kind):
            raise self._file.refusal(f"holds {kind}, which is no kind of token", part=_KINDS)
        return kinds

    def _index(self) -> dict[str, int]:
        ids = {token: index for index, token in enumerate(self.tokens)}
        if len(ids) < len(self.tokens) or "" in ids:
            for index, token in enumerate(self.tokens):
                if not token:
                    raise self._file.refusal(f"token {index} is empty", part=_TOKENS)
                if ids[token] != index:
                    reason = f"tokens {index} and {ids[token]} are both {show(token)}"
                    raise self._file.refusal(reason, part=_TOKENS)
        return ids

    def _role(self, role: str, default_ids: dict[str, int]) -> int | None:
        key = f"tokenizer.ggml.{role}_token_id"
        if key in self._file.fields:
            return self._file.integer(key, low=0, high=len(self.tokens) - 1)
        default = default_ids.get(role)
        return default if default is not None and default < len(self.tokens) else None

"""`TokenCounter`: how many tokens a text has, while the text still comes.

A long document takes seconds to be counted, and a PDF longer to be read, so pieces are counted as
they come. Tokens do not keep to the cuts: the count of two pieces is not the count of their sum.
Each seam is put right by counting what lies around it, apart and together.
"""

import orjson

from longwing.tokenizer import Tokenizer

SEAM = 128
"""Characters on each side of a cut that are counted again, together."""


class TokenCounter:
    """Counts the tokens of a text that comes in pieces.

    The sum is that of the whole text, as long as no token depends on more than `SEAM` characters
    around it: at a seam, what the outer ends of the two windows change is in both counts and falls
    away. A word longer than that may make it one or two off.

    Args:
        tokenizer: whose tokens; special tokens in the text are text.

    Attributes:
        num_tokens: of all that came so far.
        num_bytes: of the JSON list of their ids, which is what a prompt is sent as; about right.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self.num_bytes = 0
        self._tokenizer = tokenizer
        self._tail = ""

    def add(self, piece: str) -> None:
        """Count another piece: some 0.1 s for 30,000 characters."""
        ids = self._ids(piece)
        self.num_bytes += len(orjson.dumps(ids))
        self.num_tokens += len(ids)
        if self._tail:
            head = piece[:SEAM]
            apart = len(self._ids(self._tail)) + len(self._ids(head))
            self.num_tokens += len(self._ids(self._tail + head)) - apart
        self._tail = (self._tail + piece)[-SEAM:]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special_tokens=False, add_bos=False)

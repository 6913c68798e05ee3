"""What a client may send as a grammar, checked before anything compiles it. No torch.

Sizes are limits on text. The shape of a JSON schema is looked at as well, since libraries walk
schemas by recursion: 1,500 `$ref`s in a chain, all within 64 KiB, overflow llguidance's stack and
end the process. So depth is counted along references, and references may not run in a circle.
"""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from longwing.engine.request import Grammar
from longwing.errors import GrammarError

MAX_SCHEMA_BYTES = 64 * 2**10
MAX_GRAMMAR_BYTES = 8 * 2**10
"""Of a regular expression or a Lark grammar."""
MAX_DEPTH = 64
"""Of a schema's nesting, along its references."""

_DATA = ("const", "enum", "default", "examples")
"""Keywords whose values are data: a "$ref" in them refers to nothing."""

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose values hold schemas by name: a name is no keyword."""


def check_source(grammar: Grammar) -> None:
    """Hold a grammar against the limits of size, depth and references.

    Raises:
        GrammarError: it is beyond one of them, or a schema is not a JSON object.
    """
    if grammar.kind == "json_object":
        return
    is_schema = grammar.kind == "json_schema"
    limit = MAX_SCHEMA_BYTES if is_schema else MAX_GRAMMAR_BYTES
    try:
        num_bytes = len(grammar.source.encode())
    except UnicodeEncodeError:
        raise GrammarError("the grammar has a lone surrogate, which no text can match") from None
    if num_bytes > limit:
        raise GrammarError(
            f"the {described(grammar)} has {num_bytes} bytes, the limit is {limit}; simplify it"
        )
    if is_schema:
        _check_schema(grammar.source)
    elif not grammar.source.strip():
        raise GrammarError("the grammar is empty; leave it out if any text will do")


def described(grammar: Grammar) -> str:
    """What to call it in a message."""
    return {"json_schema": "JSON schema", "regex": "regular expression"}.get(
        grammar.kind, "grammar"
    )


def _check_schema(source: str) -> None:
    try:
        schema = json.loads(source)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as fault:
        raise GrammarError(f"the JSON schema is not valid JSON: {str(fault)[:100]}") from None
    if not isinstance(schema, dict):
        raise GrammarError('the JSON schema must be an object, such as {"type": "object"}')
    _Walk(schema).height(schema, 0)


class _Walk:
    """A depth-first walk over a schema, along its references too."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._heights: dict[int, int] = {}  # by id(): the schema outlives the walk
        self._open: set[int] = set()

    def height(self, node: Any, depth: int, *, is_map: bool = False, is_data: bool = False) -> int:
        """How many levels lie below a node that itself lies `depth` levels down."""
        if not isinstance(node, dict | list):
            return 0
        if depth >= MAX_DEPTH:
            raise _too_deep()
        if id(node) in self._open:
            raise GrammarError(
                "the JSON schema refers to itself in a circle; write it out to the depth that is "
                "needed"
            )
        if (known := self._heights.get(id(node))) is not None:
            if depth + known >= MAX_DEPTH:
                raise _too_deep()
            return known
        self._open.add(id(node))
        height = 0
        for child, child_is_map, child_is_data in self._children(node, is_map, is_data):
            below = self.height(child, depth + 1, is_map=child_is_map, is_data=child_is_data)
            height = max(height, below + 1)
        self._open.discard(id(node))
        self._heights[id(node)] = height
        return height

    def _children(
        self, node: dict[str, Any] | list[Any], is_map: bool, is_data: bool
    ) -> Iterator[tuple[Any, bool, bool]]:
        """(child, whether it is a map of schemas, whether it is data); what a "$ref" means too."""
        if isinstance(node, list):
            yield from ((child, False, is_data) for child in node)
        elif is_map or is_data:
            yield from ((child, False, is_data) for child in node.values())
        else:
            for keyword, child in node.items():
                yield child, keyword in _BY_NAME, keyword in _DATA
            if isinstance(node.get("$ref"), str):
                yield self._target(node["$ref"]), False, False

    def _target(self, ref: str) -> Any:
        """What a reference within the schema refers to (RFC 6901, as a URI's fragment)."""
        if ref != "#" and not ref.startswith("#/"):
            raise GrammarError(
                f'the JSON schema refers to "{ref[:80]}"; only places within it can be referred '
                'to, as "#/$defs/name"'
            )
        node: Any = self._root
        for part in ref.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and name.isascii() and name.isdigit() and len(name) < 10:
                node = node[int(name)] if int(name) < len(node) else None
            else:
                node = node.get(name) if isinstance(node, dict) else None
            if node is None:
                raise GrammarError(f'the JSON schema refers to "{ref[:80]}", which it lacks')
        return node


def _too_deep() -> GrammarError:
    return GrammarError(
        f"the JSON schema is nested deeper than {MAX_DEPTH} levels, counted along its references"
    )

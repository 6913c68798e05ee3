"""Grammars made to take all time, memory or stack: names, kinds and sources, made by rule.

None of them may do harm; whether one is refused or turns out harmless is not for this list to say.
"""

# ruff: noqa: E501  (a bomb, a line)

import json
import random
from collections.abc import Iterator
from itertools import product
from typing import Any

from longwing.engine.request import Grammar


def bombs() -> dict[str, Grammar]:
    """All of them, by name."""
    found: dict[str, Grammar] = {}
    for kind, pairs in (
        ("regex", _regexes()),
        ("lark", _larks()),
        ("json_schema", ((name, _written(value)) for name, value in _schemas())),
    ):
        for name, source in pairs:
            found[f"{kind} {name}"] = Grammar(kind=kind, source=source)
    return found


def _written(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def _regexes() -> Iterator[tuple[str, str]]:
    words = random.Random(0)
    yield "8,000 open groups", "(" * 8000
    yield "3,900 groups in each other", "(" * 3900 + "a" + ")" * 3900
    yield "200 stars on each other", "(" * 200 + "a" + ")*" * 200
    yield "2,000 stars on each other", "(" * 2000 + "a" + ")*" * 2000
    yield "a million", "(a{1,1000}){1,1000}"
    yield "a billion", "((a{1,1000}){1,1000}){1,1000}"
    yield "a million wide", "(.{1,1000}){1,1000}"
    yield "four billion times", "a{4294967295}"
    yield "more than any number", "a{99999999999999999999}"
    yield "every letter, long", r"\p{L}{1,2000}"
    yield "words, long", r"(\w+\s*){500}"
    yield "twice exponential", "(a?){2000}a{2000}"
    yield "(a+)+b", "(a+)+b"
    yield "far lookback", "(a|b)*a(a|b){200}"
    yield "farther lookback", "(.*a.{2000}){3}"
    yield "any 16 in any order", "(" + "|".join(f"(.*{c}.*)" for c in "abcdefghijklmnop") + ")*z"
    yield "intersections", "&".join(f"(.*{c}.*)" for c in "abcdefghijklmnopqrstuvwxyz")
    yield "complement", "~((a|b)*a(a|b){60})"
    yield "4,000 alternatives", "|".join("ab" for _ in range(2700))
    yield "2,000 numbers", "|".join(str(words.randrange(1000)) for _ in range(2000))
    yield (
        "alternatives of stars",
        "|".join(f"({c}*x{d}*)" for c, d in product("abcdefgh", "0123456789")),
    )
    yield "400 classes", "".join(f"[^{chr(97 + i % 26)}\\W]{{1,50}}" for i in range(400))
    yield "Unicode classes", r"\p{Han}*\p{L}*[^\p{Greek}]*" * 100
    yield "big class repeated", r"[\p{L}\p{N}--\p{Greek}]{5000}"
    yield "ten nested counts", "(" * 10 + "a" + "){0,9}" * 10
    yield "case of 5,000", "(?i)" + "abcdefghij" * 500
    yield "backreference", r"(a)\1"
    yield "lookahead", "(?=a)" * 1000 + "a"
    yield "lone bracket", "["
    yield "not UTF-8", "\\xff{1000}"
    yield "NUL", "\0" * 1000
    yield "nested dots", "(((.*.*)*.*)*.*)*x"
    yield "dots and letters", ".*a" * 1000
    yield "optional letters", "".join(f"{c}?" for c in "abcdefghijklmnopqrstuvwxyz") * 200


def _larks() -> Iterator[tuple[str, str]]:
    yield "7,000 open groups", "start: " + "(" * 7000
    yield "3,900 groups in each other", "start: " + "(" * 3900 + '"a"' + ")" * 3900
    yield "2,000 brackets in each other", "start: " + "[" * 2000 + '"a"' + "]" * 2000
    yield "left recursion", 'start: start "a" | start start | '
    yield "itself alone", "start: start"
    yield "empty loops", 'start: a*\na: b*\nb: a* | ""'
    yield "ambiguous sums", 'start: e\ne: e e e e e e | e? e? e? | "a" | "b"'
    yield (
        "doubling rules",
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"',
    )
    yield (
        "doubling terminals",
        "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(60)) + '\nT60: "a"',
    )
    yield "terminal that holds itself", 'start: T\nT: "a" T | "b"'
    yield "counts of counts", 'start: (("a"{1000}){1000}){1000}'
    yield "count of a rule", 'start: x{1,100000}\nx: "a" | "b"'
    yield "billions of a rule", 'start: x{4000000000}\nx: "a"'
    yield (
        "400 rules",
        "start: "
        + " | ".join(f"r{i}" for i in range(400))
        + "\n"
        + "\n".join(f'r{i}: "{i}"' for i in range(400)),
    )
    yield "a regex in it", r"start: /(.{1,1000}){1,1000}/"
    yield (
        "a schema in it",
        'start: %json {"type":"array","minItems":1000000,"items":{"type":"array","minItems":1000000}}',
    )
    yield "nested schema in it", "start: %json " + '{"items":' * 800 + "{}" + "}" * 800
    yield "a substring of much", 'start: %regex {"substring_chars": "' + "ab" * 3800 + '"}'
    yield "imports", "%import /etc/passwd\nstart: x"
    yield (
        "overlapping terminals",
        "start: ("
        + "|".join(f"T{i}" for i in range(100))
        + ")*\n"
        + "\n".join(f"T{i}: /[a-z]*{i}[a-z]*/" for i in range(100)),
    )
    yield (
        "optional chain",
        "start: "
        + " ".join(f"x{i}?" for i in range(300))
        + "\n"
        + "\n".join(f'x{i}: "a"' for i in range(300)),
    )
    yield (
        "permutation of 20",
        'start: p::0x0\np::_: "" %if is_ones([0:20])\n'
        + "\n".join(f'  | "{chr(97 + i)}" p::set_bit({i}) %if bit_clear({i})' for i in range(20)),
    )
    yield "no rule", "hello"
    yield "internal form", '{"grammars":[{"lark_grammar":"start: /a{4000000000}/"}]}'


def _schemas() -> Iterator[tuple[str, Any]]:
    words = random.Random(1)
    yield "8,000 open brackets", "[" * 8000
    yield "5,000 objects deep", '{"items":' * 5000 + "{}" + "}" * 5000
    yield "63 objects deep", '{"properties":{"a":' * 30 + "{}" + "}}" * 30
    yield "refers to itself", {"$ref": "#"}
    yield (
        "two in a circle",
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    )
    yield (
        "a tree",
        {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}},
    )
    yield "circle through anyOf", {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}
    yield "circle through allOf", {"allOf": [{"$ref": "#"}], "type": "object"}
    yield "circle by anchor", {"$anchor": "x", "items": {"$ref": "#x"}}
    yield "circle by dynamic anchor", {"$dynamicAnchor": "x", "items": {"$dynamicRef": "#x"}}
    yield "circle by id", {"$id": "http://x/y", "items": {"$ref": "http://x/y"}}
    yield (
        "circle by escapes",
        {"$defs": {"a/b": {"items": {"$ref": "#/$defs/a~1b"}}}, "$ref": "#/$defs/a~1b"},
    )
    yield (
        "circle by percent",
        {"$defs": {"é": {"items": {"$ref": "#/$defs/%C3%A9"}}}, "$ref": "#/$defs/%C3%A9"},
    )
    yield "elsewhere", {"$ref": "http://169.254.169.254/latest/meta-data"}
    yield "a file", {"$ref": "file:///etc/passwd"}
    yield (
        "doubling refs",
        {
            "$defs": {
                **{
                    f"d{i}": {
                        "type": "object",
                        "properties": {
                            "a": {"$ref": f"#/$defs/d{i + 1}"},
                            "b": {"$ref": f"#/$defs/d{i + 1}"},
                        },
                    }
                    for i in range(40)
                },
                "d40": {"type": "string"},
            },
            "$ref": "#/$defs/d0",
        },
    )
    yield (
        "doubling allOf",
        {
            "$defs": {
                **{
                    f"d{i}": {
                        "allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]
                    }
                    for i in range(40)
                },
                "d40": {"type": "string"},
            },
            "$ref": "#/$defs/d0",
        },
    )
    yield (
        "doubling anyOf",
        {
            "$defs": {
                **{
                    f"d{i}": {
                        "anyOf": [
                            {"$ref": f"#/$defs/d{i + 1}"},
                            {"$ref": f"#/$defs/d{i + 1}", "title": "x"},
                        ]
                    }
                    for i in range(40)
                },
                "d40": {"type": "string"},
            },
            "$ref": "#/$defs/d0",
        },
    )
    yield (
        "product of anyOfs",
        {
            "allOf": [
                {
                    "anyOf": [
                        {"type": "object", "properties": {f"p{i}": {"const": j}}} for j in range(8)
                    ]
                }
                for i in range(12)
            ]
        },
    )
    yield (
        "product of oneOfs",
        {
            "allOf": [
                {
                    "oneOf": [
                        {"properties": {f"p{i}": {"const": j}}, "required": [f"p{i}"]}
                        for j in range(6)
                    ]
                }
                for i in range(10)
            ]
        },
    )
    yield "5,000 words", {"enum": ["".join(words.choices("abcdefghij", k=8)) for _ in range(5000)]}
    yield "5,000 numbers", {"enum": [words.randrange(10**6) for _ in range(6000)]}
    yield "enum of objects", {"enum": [{"a": i, "b": [i]} for i in range(2000)]}
    yield (
        "2,000 properties",
        {"type": "object", "properties": {f"property{i}": {} for i in range(2000)}},
    )
    yield (
        "2,000 strings, none needed",
        {
            "type": "object",
            "properties": {f"p{i}": {"type": "string"} for i in range(1800)},
            "additionalProperties": False,
        },
    )
    yield (
        "500 patternProperties",
        {
            "type": "object",
            "patternProperties": {f"^.*{i}.*$": {"type": "string"} for i in range(500)},
        },
    )
    yield (
        "overlapping patternProperties",
        {"type": "object", "patternProperties": {f"^(a|b)*a(a|b){{{i}}}$": {} for i in range(50)}},
    )
    yield "long pattern", {"type": "string", "pattern": "^" + "(a|b)*" * 5000 + "$"}
    yield "pattern of a million", {"type": "string", "pattern": "^(.{1,1000}){1,1000}$"}
    yield "pattern with lookback", {"type": "string", "pattern": "(a|b)*a(a|b){500}"}
    yield "nested pattern", {"type": "string", "pattern": "(" * 5000 + "a" + ")*" * 5000}
    yield (
        "many patterns",
        {
            "type": "array",
            "prefixItems": [{"type": "string", "pattern": f".*{i}.{{100}}"} for i in range(500)],
        },
    )
    yield (
        "pattern and lengths",
        {"type": "string", "pattern": "^(ab|ba)*$", "minLength": 50000, "maxLength": 100000},
    )
    yield "long string", {"type": "string", "minLength": 1000000, "maxLength": 2000000}
    yield "longest string", {"type": "string", "minLength": 2**31, "maxLength": 2**32 - 1}
    yield "long array", {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}
    yield (
        "arrays of arrays",
        {
            "type": "array",
            "minItems": 1000,
            "maxItems": 1000,
            "items": {
                "type": "array",
                "minItems": 1000,
                "maxItems": 1000,
                "items": {"type": "array", "minItems": 1000, "maxItems": 1000},
            },
        },
    )
    yield "longest array", {"type": "array", "minItems": 2**62, "maxItems": 2**63}
    yield "array shorter than nothing", {"type": "array", "minItems": 5, "maxItems": 2}
    yield (
        "many properties needed",
        {"type": "object", "minProperties": 10**6, "additionalProperties": {"type": "string"}},
    )
    yield "multiple of little", {"type": "number", "multipleOf": 1e-300}
    yield "multiple of a prime", {"type": "integer", "multipleOf": 104729}
    yield (
        "multiples of primes",
        {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949)]},
    )
    yield (
        "thousand multiples",
        {
            "type": "array",
            "prefixItems": [{"type": "integer", "multipleOf": 9000 + i} for i in range(1000)],
        },
    )
    yield (
        "allOf of patterns",
        {"allOf": [{"type": "string", "pattern": f"^.*{i}.*$"} for i in range(1200)]},
    )
    yield (
        "1,500 refs in a chain",
        json.dumps(
            {
                "$defs": {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1500)},
                "$ref": "#/$defs/0",
            },
            separators=(",", ":"),
        ),
    )
    yield (
        "objects in 4,000 properties",
        {"type": "object", "properties": {f"a{i}": True for i in range(4000)}},
    )
    yield "wide range", {"type": "integer", "minimum": -(10**300), "maximum": 10**300}
    yield "long decimals", {"type": "number", "minimum": 0.1234567890123456789, "maximum": 1e308}
    yield "number not finite", '{"type":"number","maximum":1e999}'
    yield (
        "400 choices of objects",
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "kind": {"const": f"k{i}"},
                        "v": {"type": "string", "pattern": f"^[a-z]{{{i}}}$"},
                    },
                    "required": ["kind", "v"],
                }
                for i in range(300)
            ]
        },
    )
    yield (
        "x-guidance separators",
        {
            "x-guidance": {
                "item_separator": "(.{1,1000}){1,1000}",
                "key_separator": "(a|b)*a(a|b){300}",
            },
            "type": "object",
        },
    )
    yield (
        "x-guidance whitespace",
        {"x-guidance": {"whitespace_pattern": "(.*a.{500}){3}"}, "type": "object"},
    )
    yield (
        "formats",
        {
            "type": "array",
            "prefixItems": [
                {"type": "string", "format": f}
                for f in ("uri", "email", "hostname", "ipv6", "date-time", "duration", "uuid")
            ]
            * 60,
        },
    )
    yield "not JSON", "{"
    yield "a number", "42"
    yield "false", "false"
    yield "nothing fits", {"allOf": [{"type": "string"}, {"type": "integer"}]}
    yield "unknown type", {"type": "banana"}
    yield "unknown keyword", {"type": "object", "dependentRequired": {"a": ["b"]}}
    yield "same key twice", '{"type":"object","type":"string"}'
    yield "const of depth", {"const": json.loads("[" * 60 + "]" * 60)}
    yield "deep required sets", {"type": "object", "required": [f"r{i}" for i in range(4000)]}
    yield "lone surrogate", '{"const":"\\ud800"}'
    yield "NUL", {"const": "\0" * 5000}
    yield "emoji", {"enum": ["🙂" * i for i in range(1, 150)]}

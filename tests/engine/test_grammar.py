"""Answers under a grammar: what conforms, and what strangers' grammars cannot do to the process."""

import gc
import json
import random
import re
import resource
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from engine.grammar_bombs import bombs
from longwing.engine import grammar as grammar_module
from longwing.engine import rehearsal
from longwing.engine.grammar import GrammarCompiler, GrammarState
from longwing.engine.grammar_source import check_source
from longwing.engine.request import Grammar
from longwing.errors import GrammarError, RequestError
from longwing.tokenizer import Tokenizer
from tiny import write_tokenizer

END = 256
WORDS = ["true", "false", "null", '":', '",', '{"', '"}', "},", "[{", "e-", "\n  ", " the", " un"]
VOCAB = 257 + len(WORDS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """All bytes, an end token, and words that cross the borders of JSON's own tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["added_tokens"] += [
        {
            "id": 257 + place, "content": word, "special": False, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False,
        }
        for place, word in enumerate(WORDS)
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    with GrammarCompiler(tokenizer, VOCAB, [END]) as made:
        yield made


def schema(**keywords: object) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(keywords))


def regex(source: str) -> Grammar:
    return Grammar(kind="regex", source=source)


def written(state: GrammarState, tokenizer: Tokenizer, rng: random.Random, most: int = 600) -> str:
    """What a model of uniform logits says under a grammar; once it may end it soon does."""
    ids: list[int] = []
    while not state.finished and len(ids) < most:
        allowed = state.mask(VOCAB).nonzero()[:, 0].tolist()
        ends = END in allowed and (len(allowed) == 1 or rng.random() < 0.3)
        token_id = END if ends else rng.choice([i for i in allowed if i != END])
        state.accept(token_id)
        if token_id == END:
            break
        ids.append(token_id)
    assert state.finished, "the answer did not come to its end"
    return tokenizer.decode(ids)


SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "ä🙂"]}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "choice": {"anyOf": [{"const": {"x": [1, None]}}, {"type": "boolean"}, {"enum": [1.5, "s"]}]},
    "refs": {
        "$defs": {
            "place": {"type": "integer", "minimum": -99, "maximum": 99},
            "point": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
        },
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["to"],
        "additionalProperties": False,
    },
    "pattern": {"type": "string", "pattern": "^[a-c]{2,5}-\\d+$", "maxLength": 9},
    "date": {"type": "string", "format": "date"},
    "number": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 20},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_model_under_a_schema_writes_json_that_is_valid_under_it(
    compiler: GrammarCompiler, tokenizer: Tokenizer, name: str
) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    judge = jsonschema_rs.validator_for(SCHEMAS[name], validate_formats=True)
    rng = random.Random(name)
    for _ in range(8):
        text = written(compiler.compile(schema(**SCHEMAS[name])), tokenizer, rng)
        judge.validate(json.loads(text))


@pytest.mark.parametrize(
    "source", ["[a-z]+@[a-z]{2,4}\\.(org|net)", "(yes|no|né){1,3}", "[0-9]{4}-[0-9]{2}", "a?b?c?d"]
)
def test_random_model_under_a_regular_expression_writes_a_full_match(
    compiler: GrammarCompiler, tokenizer: Tokenizer, source: str
) -> None:
    rng = random.Random(source)
    for _ in range(8):
        assert re.fullmatch(source, written(compiler.compile(regex(source)), tokenizer, rng))


def test_json_object_is_any_object_and_nothing_else(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    rng = random.Random(2)
    state = compiler.compile(Grammar(kind="json_object"))
    assert state.fork().num_conforming(tokenizer.encode('{"a": [1, {"b": null}]}')) == 16
    for outsider in ("[", "1", '"', "t", " "):
        assert not state.mask(VOCAB)[tokenizer.encode(outsider)[0]]
    for text in ("{}", '{"":-0.5e-7,"x":[[],{}]}'):
        here = state.fork()
        for token_id in tokenizer.encode(text):
            here.accept(token_id)
        assert here.may_end
    short = schema(type="object", maxProperties=2, additionalProperties={"type": "boolean"})
    assert isinstance(json.loads(written(compiler.compile(short), tokenizer, rng)), dict)


def test_lark_grammar_may_be_recursive(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    balanced = Grammar(kind="lark", source='start: "(" start ")" | "x"')
    state = compiler.compile(balanced)
    for token_id in tokenizer.encode("((x))"):
        assert not state.may_end
        state.accept(token_id)
    assert state.may_end
    assert state.finished


def test_end_token_is_allowed_exactly_where_the_text_may_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    state = compiler.compile(regex("ab(cd)?"))
    seen = []
    for token_id in tokenizer.encode("abcd"):
        seen.append((bool(state.mask(VOCAB)[END]), state.may_end, state.finished))
        state.accept(token_id)
    assert seen == [(False, False, False)] * 2 + [(True, True, False), (False, False, False)]
    assert state.finished
    assert state.mask(VOCAB).nonzero().tolist() == [[END]]


def test_ids_beyond_the_tokenizer_are_never_allowed(tokenizer: Tokenizer) -> None:
    with GrammarCompiler(tokenizer, VOCAB + 30, [END]) as compiler:
        state = compiler.compile(regex("(.|\\n)*"))
        assert not state.mask(VOCAB + 30)[VOCAB:].any()
        assert not state.mask(VOCAB + 64)[VOCAB:].any()
        assert state.mask(VOCAB).shape == (VOCAB,)


def test_model_without_an_end_token_finishes_by_the_grammar(tokenizer: Tokenizer) -> None:
    with GrammarCompiler(tokenizer, VOCAB, []) as compiler:
        state = compiler.compile(regex("ab"))
        for token_id in tokenizer.encode("ab"):
            assert not state.finished
            state.accept(token_id)
        assert state.finished
    with pytest.raises(RequestError, match="end token 999"):
        GrammarCompiler(tokenizer, VOCAB, [999])


def test_draft_is_masked_token_by_token_and_leaves_no_trace(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    state = compiler.compile(regex("abc+d"))
    draft = tokenizer.encode("abcx")
    before = state.mask(VOCAB)
    masks = state.masks(draft, VOCAB)
    assert state.num_conforming(draft) == 3
    assert masks.shape == (4, VOCAB)
    assert torch.equal(state.mask(VOCAB), before)
    other = state.fork()
    for row, token_id in enumerate(draft[:3]):
        assert torch.equal(other.mask(VOCAB), masks[row])
        other.accept(token_id)
    assert torch.equal(state.mask(VOCAB), before)
    other.rollback(3)
    assert torch.equal(other.mask(VOCAB), before)


def test_token_that_does_not_conform_is_refused_by_name(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    with pytest.raises(GrammarError, match=r"conform|follow"):
        compiler.compile(regex("a")).accept(tokenizer.encode("b")[0])


# What strangers send


@pytest.fixture(scope="module")
def outcomes(compiler: GrammarCompiler) -> dict[str, tuple[str, float]]:
    """Every bomb's refusal ("" if it compiles) and how long it took."""
    compiler.compile(regex("warm"))
    found = {}
    for name, bomb in bombs().items():
        began = time.perf_counter()
        try:
            compiler.compile(bomb)
            reason = ""
        except GrammarError as error:
            reason = str(error)
        found[name] = (reason, time.perf_counter() - began)
    return found


@pytest.mark.slow
def test_every_bomb_is_refused_or_compiled_in_bounded_time(
    outcomes: dict[str, tuple[str, float]],
) -> None:
    assert len(outcomes) > 100
    # A second for the trial, one for the compilation itself, and a new process after a death.
    slow = {name: seconds for name, (_, seconds) in outcomes.items() if seconds > 4}
    assert not slow


@pytest.mark.slow
def test_refusal_is_one_short_line(outcomes: dict[str, tuple[str, float]]) -> None:
    for name, (reason, _) in outcomes.items():
        assert len(reason) < 300, name
        assert "\n" not in reason, name
        assert "panic" not in reason.lower(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("json_schema 5,000 objects deep", "deeper than 64"),
        ("json_schema doubling refs", "deeper than 64"),
        ("json_schema refers to itself", "circle"),
        ("json_schema circle by percent", "circle"),
        ("json_schema elsewhere", "places within it"),
        ("json_schema not JSON", "not valid JSON"),
        ("json_schema a number", "must be an object"),
        ("json_schema thousand multiples", "MiB of memory|longer than"),
        ("json_schema 1,500 refs in a chain", "deeper than 64"),
        ("json_schema emoji", "65536"),
        ("regex optional letters", "8192"),
        ("regex backreference", "regular expression cannot be used"),
        ("lark itself alone", "no text"),
    ],
)
def test_refusal_says_why(outcomes: dict[str, tuple[str, float]], name: str, word: str) -> None:
    assert re.search(word, outcomes[name][0])


@pytest.mark.slow
def test_accepted_bombs_stay_bounded_while_an_answer_is_written(
    compiler: GrammarCompiler, outcomes: dict[str, tuple[str, float]]
) -> None:
    rng = random.Random(0)
    corpus = bombs()
    written = 0
    for name in [name for name, (reason, _) in outcomes.items() if not reason]:
        try:
            state = compiler.compile(corpus[name])
        except GrammarError:
            continue  # accepted by a hair before; this machine is busier now
        written += 1
        began = time.perf_counter()
        try:
            for _ in range(5):
                allowed = state.mask(VOCAB).nonzero()[:, 0].tolist()
                state.accept(rng.choice(allowed))
                if state.finished:
                    break
        except GrammarError:
            pass  # one answer fails; the others go on
        assert time.perf_counter() - began < 3, name
    assert written
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KB on Linux


def test_source_that_overflows_the_stack_ends_the_trial_process_alone(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "check_source", lambda grammar: None)
    chain = {"$defs": {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1800)}}
    chain["$defs"]["1800"] = {"type": "string"}
    with pytest.raises(GrammarError, match="nests too deep"):
        compiler.compile(schema(**chain, items={"$ref": "#/$defs/0"}))
    assert compiler.compile(regex("still there"))


def test_time_limit_ends_the_trial(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "COMPILE_S", 0.02)
    with pytest.raises(GrammarError, match="longer than"):
        compiler.compile(schema(type="integer", multipleOf=104723))
    monkeypatch.undo()
    assert compiler.compile(regex("not seen before"))


def test_known_grammar_is_not_tried_again(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiler.compile(regex("seen before"))
    monkeypatch.setattr(rehearsal.Rehearsal, "trial", lambda *_: pytest.fail("tried again"))
    assert torch.equal(compiler.compile(regex("seen before")).mask(VOCAB), first.mask(VOCAB))


def test_cache_drops_the_least_lately_used_beyond_its_bytes(tokenizer: Tokenizer) -> None:
    with GrammarCompiler(tokenizer, VOCAB, [END], cache_bytes=3 * 2**16) as compiler:
        for source in ("a", "b", "a", "c", "d"):
            compiler.compile(regex(source))
        assert [known.source for known in compiler._cache] == ["a", "c", "d"]


def test_grammars_can_be_compiled_from_many_threads(compiler: GrammarCompiler) -> None:
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                compiler.compile(regex(f"[a-z]{{{turn},{number + turn}}}")).mask(VOCAB)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_closing_ends_the_trial_process(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, [END])
    state = compiler.compile(regex("ab"))
    process = compiler._rehearsal._process
    compiler.close()
    assert process.poll() is not None
    assert state.mask(VOCAB).any()


def test_forgotten_compiler_leaves_no_process(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, [END])
    compiler.compile(regex("ab"))
    process = compiler._rehearsal._process
    del compiler
    gc.collect()
    assert process.poll() is not None


def test_forced_text_is_in_the_models_own_tokens(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    text = "false, in the unreal"
    state = compiler.compile(regex(text))
    for token_id in tokenizer.encode(text):
        assert state.mask(VOCAB).nonzero().tolist() == [[token_id]]
        state.accept(token_id)
    assert state.finished


def test_limits_of_size_count_bytes() -> None:
    check_source(regex("a" * 8192))
    with pytest.raises(GrammarError, match="8194 bytes"):
        check_source(regex("é" * 4097))
    with pytest.raises(GrammarError, match="empty"):
        check_source(Grammar(kind="lark", source=" \n"))
    with pytest.raises(GrammarError, match="surrogate"):
        check_source(regex("\ud800"))


def test_words_that_only_look_like_references_are_data() -> None:
    check_source(schema(const={"$ref": "#/nowhere"}))
    check_source(schema(properties={"$ref": {"type": "string"}, "const": {"type": "null"}}))
    with pytest.raises(GrammarError, match="which it lacks"):
        check_source(schema(properties={"const": {"$ref": "#/nowhere"}}))

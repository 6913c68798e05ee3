"""The tokens of a chat: those of transformers, and special ones from the template alone."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import (
    CHATML,
    DATA,
    FALCON_CONTROLS,
    FALCON_VOCAB,
    LLAMA_SETTINGS,
    OPEN_ASSISTANT,
    added,
    falcon_json,
    llama_json,
    write_folder,
)
from transformers import PreTrainedTokenizerFast

from longwing.errors import RequestError, TemplateError
from longwing.tokenizer import NAMED_TEMPLATES, Tokenizer

FIXED = settings(derandomize=True, deadline=None, max_examples=80)
PROMPTER, ASSISTANT = FALCON_VOCAB, FALCON_VOCAB + 1
QUESTION = "please tell me how does pgvector help with Generative AI and give me some examples."

INST = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token ~ '[INST] ' ~ m.content | trim ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PIECES = st.lists(
    st.one_of(
        st.sampled_from([*FALCON_CONTROLS, *OPEN_ASSISTANT, *CHATML]),
        st.sampled_from(["<|", "|>", ">>", "<<", "endoftext", ">>TITLE<", "|im_end|>", " ", "\n"]),
        st.text(max_size=4),
    ),
    max_size=6,
).map("".join)


def user(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content} for content in contents]


def printable(text: str) -> str:
    """Without the bytes that Falcon has no token for."""
    return "".join(char for char in text if char.isprintable() and ord(char) < 0x50000)


def test_falconlites_short_prompt_has_its_17_published_ids(falcon: Tokenizer) -> None:
    prompt = "What are the main challenges to support a long context for LLM?"
    inner = [1562, 362, 248, 1316, 4922, 271, 1164, 241, 916, 4436, 312, 31370, 56, 42]
    expected = [PROMPTER, *inner, 11, ASSISTANT]
    assert falcon.chat(user(prompt), template="falconlite2") == expected


def test_falconlites_long_prompt_has_its_13436_published_tokens(falcon: Tokenizer) -> None:
    context = (DATA / "falconlite" / "example_long_ctx.txt").read_text("utf-8")
    assert len(falcon.encode(context)) == 13_419
    prompt = context.replace("{my_question}", QUESTION)
    assert len(falcon.encode(prompt)) == 13_433
    ids = falcon.chat(user(prompt), template="falconlite2")
    assert len(ids) == 13_436
    assert falcon.decode(ids) == prompt


OWN = {
    "inst": INST,
    "bare": BARE,
    "json": "{{ messages | tojson }}",
    "quote": " {{ messages[0] }} {{ eos_token }} ",
}


@pytest.fixture(scope="module", params=["falcon", "legacy", "first"])
def with_templates(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """A folder with several templates of its own, ours and transformers'."""
    if request.param == "falcon":
        described = falcon_json(*CHATML)
        roles = {"eos_token": "<|endoftext|>", "bos_token": ">>TITLE<<"}
    else:
        described, roles = llama_json(request.param), LLAMA_SETTINGS
    listed = [{"name": name, "template": source} for name, source in OWN.items()]
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, described, chat_template=listed, **roles)
    return Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "contents",
    [("the a b",), ("", "x"), ("  two\n\n", " three  "), ("<|", "e <0xE2> é🦙|>", "a<")],
)
def test_ids_are_those_of_transformers(
    with_templates: tuple[Tokenizer, PreTrainedTokenizerFast], name: str, contents: tuple[str, ...]
) -> None:
    ours, theirs = with_templates
    roles = ["user", "assistant", "user"]
    chat = [{"role": roles[place], "content": text} for place, text in enumerate(contents)]
    ids = theirs.apply_chat_template(chat, chat_template=name, return_dict=False)
    assert ours.chat(chat, template=name) == ids
    text = ours.render_chat(chat, template=name)
    assert text == theirs.apply_chat_template(chat, chat_template=name, tokenize=False)
    assert ours.encode(text, special_tokens=True, add_bos=False) == ids


def test_a_special_token_joined_from_two_messages_is_text(
    with_templates: tuple[Tokenizer, PreTrainedTokenizerFast],
) -> None:
    ours, theirs = with_templates
    special = theirs.bos_token
    chat = user(special[:2], special[2:])
    assert ours.id_of(special) in theirs.apply_chat_template(
        chat, chat_template="bare", return_dict=False
    )
    ids = ours.chat(chat, template="bare")
    assert ours.id_of(special) not in ids
    assert ours.decode(ids) == special


@FIXED
@given(contents=st.lists(PIECES, min_size=1, max_size=4))
@pytest.mark.parametrize("template", ["falconlite2", "chatml", "plain"])
def test_messages_never_yield_a_special_id_and_lose_nothing(
    falcon: Tokenizer, template: str, contents: list[str]
) -> None:
    chat = user(*map(printable, contents))
    neutral = user(*["x"] * len(contents))
    ids = falcon.chat(chat, template=template)
    of_template = [at for at in falcon.chat(neutral, template=template) if at in falcon.special_ids]
    assert [at for at in ids if at in falcon.special_ids] == of_template
    assert falcon.decode(ids, skip_special=False) == falcon.render_chat(chat, template=template)


@pytest.fixture(scope="module")
def handlers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Falcon with templates that do things to messages before they write them."""
    sources = {
        "trim": "{% for m in messages %}{{ m.content | trim }}<|im_end|>{% endfor %}",
        "case": "{% for m in messages %}{{ m.content.lower() | upper | lower }}{% endfor %}",
        "json": "{{ messages | tojson(ensure_ascii=True) }}{{ messages | tojson(indent=1) }}",
        "quote": "{{ messages }}{{ messages | string }}",
        "split": "{% for m in messages %}{{ m.content.split('|') | join('|') }}{% endfor %}",
        "cut": "{% for m in messages %}{{ m.content[:7] }}{{ m.content[7:] }}{% endfor %}",
        "join": "{{ messages | map(attribute='content') | join }}",
        "wrap": "{% for m in messages %}<|{{ m.content }}|>>{{ m.content }}<<{% endfor %}",
    }
    listed = [{"name": name, "template": source} for name, source in sources.items()]
    path = tmp_path_factory.mktemp("handlers")
    return Tokenizer.from_folder(
        write_folder(path, falcon_json(*CHATML), chat_template=listed, eos_token="<|endoftext|>")
    )


@FIXED
@given(contents=st.lists(st.one_of(PIECES, st.just("endoftext")), min_size=1, max_size=3))
@pytest.mark.parametrize("name", ["trim", "case", "json", "quote", "split", "cut", "join", "wrap"])
def test_whatever_a_template_does_to_messages_their_special_tokens_stay_text(
    handlers: Tokenizer, name: str, contents: list[str]
) -> None:
    ids = handlers.chat(user(*map(printable, contents)), template=name)
    written = len(contents) if name == "trim" else 0
    assert [at for at in ids if at in handlers.special_ids] == [FALCON_VOCAB + 1] * written


@FIXED
@given(content=PIECES)
def test_a_typed_special_token_has_the_ids_it_has_in_plain_text(
    falcon: Tokenizer, content: str
) -> None:
    ids = falcon.chat(user(content), template="falconlite2")
    assert ids == [PROMPTER, *falcon.encode(content), 11, ASSISTANT]


def test_a_message_cannot_swallow_the_templates_next_token(falcon: Tokenizer) -> None:
    """'>>TITLE<' before '<|endoftext|>' would read as '>>TITLE<<' and '|endoftext|>'."""
    assert falcon.encode(">>TITLE<<|endoftext|>", special_tokens=True)[0] == 0
    ids = falcon.chat(user(">>TITLE<"), template="falconlite2")
    assert ids == [PROMPTER, *falcon.encode(">>TITLE<"), 11, ASSISTANT]


def test_a_message_cannot_complete_what_the_template_began(handlers: Tokenizer) -> None:
    ids = handlers.chat(user("endoftext|> and more"), template="wrap")
    assert handlers.special_ids.isdisjoint(ids)
    assert handlers.decode(ids).startswith("<|endoftext|> and more|>>")


def test_a_message_cannot_turn_the_templates_token_into_a_longer_one(tmp_path: Path) -> None:
    described = llama_json("first")
    place = len(described["model"]["vocab"])
    described["added_tokens"].append(added(place, "<s>a"))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = write_folder(tmp_path, described, chat_template=template, **LLAMA_SETTINGS)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<s>ab", special_tokens=True, add_bos=False)[0] == place
    letters = [tokenizer.id_of("a"), tokenizer.id_of("b")]
    assert tokenizer.chat(user("ab")) == [1, *letters]


FAKES = st.lists(
    st.sampled_from(["<s>", "</s>", "<unk>", "<e>", "a", "the", " ", "  ", "<", "/", ">", "é"]),
    min_size=1,
    max_size=8,
).map("".join)


@FIXED
@given(contents=st.lists(FAKES, min_size=1, max_size=3))
@pytest.mark.parametrize("scheme", ["legacy", "first"])
@pytest.mark.parametrize(
    "template", [INST, BARE, "{% for m in messages %}{{ m.content }}<e>{% endfor %}"]
)
def test_typed_special_tokens_have_the_ids_of_text_of_the_same_form(
    made_llama: Any, scheme: str, template: str, contents: list[str]
) -> None:
    """A letter that no special token has takes the place of theirs; apart from it all ids agree."""
    tokenizer: Tokenizer = made_llama(scheme, template)
    letter = tokenizer.id_of("q")
    letters = {tokenizer.id_of(char) for char in "sunke"}
    other = [
        text.translate(str.maketrans("sunke", "qqqqq")).replace("thq", "the") for text in contents
    ]
    same = [text.replace("the", "a") for text in contents]
    other = [text.replace("the", "a") for text in other]
    ids = [letter if at in letters else at for at in tokenizer.chat(user(*same))]
    assert ids == [letter if at in letters else at for at in tokenizer.chat(user(*other))]


@pytest.fixture(scope="module")
def made_llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`made_llama(scheme, template)`: with a token <e> that swallows the white space around it."""
    made: dict[tuple[str, str], Tokenizer] = {}

    def make(scheme: str, template: str) -> Tokenizer:
        if (scheme, template) not in made:
            described = llama_json(scheme)
            place = len(described["model"]["vocab"])
            described["added_tokens"].append(added(place, "<e>", lstrip=True, rstrip=True))
            path = tmp_path_factory.mktemp("llama")
            settings_ = {**LLAMA_SETTINGS, "chat_template": template}
            made[scheme, template] = Tokenizer.from_folder(
                write_folder(path, described, **settings_)
            )
        return made[scheme, template]

    return make


def test_another_spelling_that_would_be_read_as_a_special_token_is_refused(tmp_path: Path) -> None:
    described = llama_json("first")
    described["normalizer"] = {"type": "NFKC"}
    described["added_tokens"][1]["normalized"] = True
    folder = write_folder(tmp_path, described, chat_template=BARE, **LLAMA_SETTINGS)
    tokenizer = Tokenizer.from_folder(folder)
    assert 1 in tokenizer.encode("a＜s＞", special_tokens=True, add_bos=False)
    assert 1 not in tokenizer.encode("a＜s＞", add_bos=False)
    with pytest.raises(RequestError, match="another spelling of a special token"):
        tokenizer.chat(user("a＜s＞"))


def test_messages_that_leave_no_character_to_mark_with_are_refused(falcon: Tokenizer) -> None:
    rare = "".join(map(chr, [*range(0x13000, 0x1342F), *range(0x20000, 0x2A6DF)]))
    assert falcon.chat(user(rare), template="plain") == falcon.encode(rare)
    with pytest.raises(RequestError, match="every rare character"):
        falcon.chat(user(rare + "<|endoftext|>"), template="plain")


def test_a_named_template_begins_as_a_text_does(llama: Tokenizer) -> None:
    assert llama.chat(user("the a"), template="plain") == llama.encode("the a")
    assert llama.encode("the a")[0] == llama.bos_id
    assert llama.render_chat(user("the a"), template="plain") == "the a"


def test_a_model_without_a_template_is_told_which_ones_there_are(falcon: Tokenizer) -> None:
    assert not falcon.has_chat_template
    known = "falconlite2, instruction, thebloke, chatml, plain"
    with pytest.raises(TemplateError, match=f"has no chat template; name one of: {known}"):
        falcon.chat(user("hi"))
    with pytest.raises(TemplateError, match=f"no chat template 'nothing'; known are: {known}"):
        falcon.chat(user("hi"), template="nothing")
    assert falcon.template_names == tuple(known.split(", "))


@pytest.mark.parametrize(
    ("template", "token"), [("mistrallite", "</s>"), ("falconlite2", "<|prompter|>")]
)
def test_a_named_template_whose_token_is_missing_says_which(
    request: pytest.FixtureRequest, falcon: Tokenizer, template: str, token: str, tmp_path: Path
) -> None:
    tokenizer = falcon
    if template == "falconlite2":
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path, llama_json(), **LLAMA_SETTINGS))
    assert token in NAMED_TEMPLATES[template].tokens
    with pytest.raises(TemplateError, match="needs the special token") as caught:
        tokenizer.chat(user("hi"), template=template)
    assert token in str(caught.value)


def test_a_chat_with_a_lone_surrogate_is_refused(falcon: Tokenizer) -> None:
    with pytest.raises(RequestError, match="message 1: content has a lone surrogate"):
        falcon.chat(user("a", "b\ud800"), template="plain")


def test_a_template_that_writes_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, llama_json(), chat_template="{{ '\\ud800' }}")
    with pytest.raises(RequestError, match="the rendered chat has a lone surrogate"):
        Tokenizer.from_folder(folder).chat(user("a"))

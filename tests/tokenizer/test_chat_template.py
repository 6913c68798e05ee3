"""Templates of strangers: rendered as transformers does, and held within their limits."""

import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from longwing.errors import RequestError, TemplateError
from longwing.tokenizer import NAMED_TEMPLATES, ChatTemplate
from longwing.tokenizer.chat import checked_messages
from longwing.tokenizer.meter import MAX_WEIGHT, LimitError, Meter

ROLES = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": 'é 🦙 <b> & "x"\n\n'},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes.", "name": "bot"},
        {"role": "user", "content": ""},
    ],
]
TURNS = "{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}"
TEMPLATES = [
    TURNS,
    "{{ bos_token }}" + TURNS + "{% if add_generation_prompt %}bot:{% endif %}",
    "{%- set ns = namespace(n=0, text='') -%}\n{%- for m in messages if m.role != 'system' -%}\n"
    "  {%- set ns.n = ns.n + 1 -%}{%- set ns.text = ns.text ~ m.content -%}\n{%- endfor -%}\n"
    "{{ ns.n }}{{ ns.text }}",
    "{% macro turn(m, end='') %}[{{ m.role | upper }}]{{ m.content }}{{ varargs }}{{ end }}"
    "{% endmacro %}{% for m in messages %}{{ turn(m, eos_token, loop.index) }}{% endfor %}",
    "{{ messages | tojson }}\n{{ messages[0] | tojson(indent=2) }}",
    "{{ messages | tojson(ensure_ascii=True, separators=(',', ':')) }}",
    "{{ messages | map(attribute='role') | unique | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ loop.index0 }}"
    "{{ loop.previtem.role if not loop.first }}{% endfor %}{{ messages[-1].content == '' }}",
    "{% for m in messages[1:] %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endfor %}",
    "{% if tools is none and not documents and undefined_name is not defined %}ok{% endif %}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}"
    "{{ messages[0].get('name', 'none') }}{{ dict(a=1, **{'b': 2}) }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ 7 // 2 }} {{ 2 ** 10 }} "
    "{{ 7 % 4 }} {{ [1] + [2, 3] }} {{ 'ab' * 3 }} {{ (1, 'x') }}",
    "{% macro item(x) %}<{{ caller(x) }}>{% endmacro %}"
    "{% call(y) item(3) %}{{ y * 2 }}{% endcall %}{% set t %}a{{ 1 }}{% endset %}{{ t | length }}",
    "{% for n in [1, [2, [3]]] recursive %}"
    "{% if n is iterable %}({{ loop(n) }}){% else %}{{ n }}{% endif %}{% endfor %}",
    "{% filter upper %}{{ 'x' | indent(2) }}{% endfilter %}{{ 'b-c' | title }}"
    "{{ 3.14159 | round(2) }}{% with a = 'w' %}{{ a }}{% endwith %}{{ '{%' }}{# note #}",
    "{{ messages }}{{ messages | string | length }}{{ none }}{{ true }}{{ not_there }}",
    "  {% if true %}\n  indented\n  {% endif %}\n\ntrailing\n",
]


def render(source: str, chat: list[dict[str, str]] | None = None, **settings: Any) -> str:
    template = ChatTemplate(source, timeout_s=settings.pop("timeout_s", 1.0))
    return template.render(checked_messages(chat or CHATS[0]), **settings)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_template_gives_the_text_that_transformers_gives(
    source: str, chat: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    (expected,), _ = render_jinja_template(
        [chat], chat_template=source, add_generation_prompt=add_generation_prompt, **ROLES
    )
    ours = render(source, chat, variables=ROLES, add_generation_prompt=add_generation_prompt)
    assert ours == expected


def test_the_date_is_todays() -> None:
    assert render("{{ strftime_now('%Y-%m-%d') }}") in (
        time.strftime("%Y-%m-%d"),
        time.strftime("%Y-%m-%d", time.localtime(time.time() - 60)),
    )


ROW = "{% set r = range(99999) %}"
SLOW = [
    ROW + "{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    ROW + "{% for a in r %}{% for b in r if false %}{% endfor %}{% endfor %}",
    ROW
    + "{% for a in r %}{% for b in r %}{{ '' }}{% if a == b %}{% endif %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) if range(99999) | select('in', range(99999)) | list %}{% endfor %}",
    "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "{% set x = 'a' * 9999999 %}" + "{% if 'ab' in x %}{% endif %}" * 900,
    "{% set x = 'a' * 9999999 %}" + "{% if x | upper == x | lower %}{% endif %}" * 300,
    "{% set x = range(99999) | list %}" + "{{ x | sort | length }}" * 100,
    "{% set x = 'a' * 999999 %}{{ range(99999) | map('default', x, true) | join }}",
]


@pytest.mark.parametrize("source", SLOW)
def test_a_template_without_end_is_stopped(source: str) -> None:
    template = ChatTemplate(source, timeout_s=0.1)
    with pytest.raises(TemplateError):  # compiles it, which is not counted
        template.render(CHATS[0])
    started = time.thread_time()
    with pytest.raises(TemplateError, match=r"ran longer than 0\.1 s|on the way to its output"):
        template.render(CHATS[0])
    assert time.thread_time() - started < 2


def grows(step: str, start: str = "[0]") -> str:
    """A template that repeats a step on ns.x a hundred times and prints it."""
    loop = f"{{% for i in range(100) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}{{{{ ns.x }}}}"


BIG = "{% set x = 'a' * 9999999 %}"
HUGE = [
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 9 * 'a' }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ 7 ** 7 ** 7 ** 7 ** 7 ** 7 }}",
    "{{ range(10 ** 9) }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    grows("ns.x + ns.x"),
    grows("ns.x ~ ns.x", "'a'"),
    grows("ns.x * ns.x", "9"),
    grows("[ns.x, ns.x]"),
    grows("(ns.x, ns.x)"),
    grows("{'a': ns.x, 'b': ns.x}"),
    grows("dict(a=ns.x, b=ns.x)"),
    grows("[ns.x]"),
    "{% macro f() %}{% set ns.y = varargs %}{% endmacro %}" + grows("f(ns.x, ns.x) or ns.y"),
    BIG + "{{ x ~ x }}",
    BIG + "{{ x" + " ~ x" * 2000 + " }}",
    BIG + "{{ x }}" * 2,
    BIG + "{{ [x, x] }}",
    BIG + "{{ x.replace('a', x) }}",
    BIG + "{{ x | replace('a', x) }}",
    BIG + "{{ x.join(['', '', '']) }}",
    BIG + "{{ range(99999) | join(x) }}",
    BIG + "{{ range(99999) | map(attribute='y', default=x) | join }}",
    BIG + "{{ x | list | length }}",
    BIG + "{{ x.split('a') | length }}",
    BIG + "{{ ('a ' * 4999999).split() | length }}",
    BIG + "{{ ('a\n' * 4999999) | indent(99) }}",
    BIG + "{{ [x] | tojson(indent=8) }}",
    "{{ [0] | tojson(indent=10 ** 9) }}",
    BIG + "{{ [0, 0] | tojson(separators=(x, x)) }}",
    "{{ 1.5 | round(10 ** 9, 'floor') }}",
    "{{ 1 | round(-(10 ** 9)) }}",
    "{% for i in range(9999) %}{% for j in range(9999) %}"
    + "x" * 60_000
    + "{% endfor %}{% endfor %}",
    "{% set a %}{% for i in range(9999) %}" + "x" * 60_000 + "{% endfor %}{% endset %}{{ a }}",
    "{% macro m() %}"
    + "x" * 60_000
    + "{% endmacro %}{% for i in range(9999) %}{{ m() }}{% endfor %}",
    "{{ strftime_now('%d' * 9999) }}",
    BIG + "{{ raise_exception([x, x]) }}",
]


@pytest.mark.parametrize("source", HUGE)
def test_a_template_that_wants_all_memory_is_refused_at_once(source: str) -> None:
    started = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        render(source, timeout_s=5.0)
    assert time.thread_time() - started < 2
    assert "longer than" not in str(caught.value)
    assert len(str(caught.value)) < 400


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ messages | groupby('__class__') }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ raise_exception.__self__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "{{ 'x'.center(10 ** 9) }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{:999999999}'.format('') }}",
    "{{ '%999999999d' % 1 }}",
    "{{ 'x' | center(10 ** 9) }}",
    "{{ lipsum(n=10 ** 9) }}",
    "{{ messages[0].items }}",
    "{{ messages | map('upper') }}",
    "{{ [namespace] }}",
    "{% include 'x' %}",
    "{% import 'x' as x %}",
    "{% from 'x' import y %}",
    "{% extends 'x' %}",
    "{% block x %}{% endblock %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_what_is_not_offered_is_refused(source: str) -> None:
    with pytest.raises(TemplateError, match="chat template 'default'"):
        render(source)


DEEP = [
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "1 + " * 15_000 + "1 }}",
    "{{ " + "[" * 300 + "]" * 300 + " }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{% for a in [] %}" * 25 + "{% endfor %}" * 25,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
]


@pytest.mark.parametrize("source", DEEP)
def test_nesting_without_end_is_an_error(source: str) -> None:
    with pytest.raises(TemplateError, match="chat template"):
        render(source)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("a\n\n{{ 1 // 0 }}", 3),
        ("{% foo %}", 1),
        ("\n{{ x | nofilter }}", 2),
        ("\n{{ ''.__doc__ }}", 2),
    ],
)
def test_an_error_names_the_line(source: str, line: int) -> None:
    with pytest.raises(TemplateError, match=f"chat template 'default', line {line}: "):
        render(source)


def test_a_refusal_of_the_template_is_told_in_its_own_words() -> None:
    with pytest.raises(TemplateError, match="refused the messages: no system role"):
        render("{{ raise_exception('no ' ~ 'system role') }}")


def test_a_rendering_leaves_nothing_behind_for_the_next() -> None:
    template = ChatTemplate("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}")
    assert [template.render(CHATS[0]) for _ in range(2)] == ["1", "1"]


def test_lists_are_weighed_once() -> None:
    meter = Meter(timeout_s=60)
    shared: list[Any] = ["a" * 100]
    for _ in range(15):
        shared = [shared, shared]
    assert meter.weigh(shared) == meter.weigh(shared)
    heavy = [shared] * 10
    with pytest.raises(LimitError, match=f"more than {MAX_WEIGHT} characters"):
        meter.weigh(heavy)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([], "at least one message"),
        (["hi"], "message 0 is a str, not a mapping"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"content": "hi"}], "message 0 has no role"),
        ([*CHATS[0], {"role": "user", "content": None}], "message 1: content is a NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content is a list"),
        ([{"role": "user", "content": "a\ud800"}], r"U\+D800, at character 1"),
        ([{"role": "<|im_start|>", "content": ""}], r"has the role '<\|im_start\|>'"),
        ([{"role": "", "content": ""}], "has the role ''"),
        ([{"role": "r" * 40, "content": ""}], "a role is a short word"),
        ([{"role": "user", "content": "", 5: ""}], "a field's name is a int"),
    ],
)
def test_messages_of_another_form_are_refused(chat: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        checked_messages(chat)


SYSTEM = {"role": "system", "content": "S"}
EXPECTED = {
    "falconlite2": "<|prompter|>P<|endoftext|><|assistant|>A<|endoftext|>"
    "<|prompter|>Q<|endoftext|><|assistant|>",
    "mistrallite": "<|prompter|>P</s><|assistant|>A</s><|prompter|>Q</s><|assistant|>",
    "instruction": "### Instruction: P\n### Response: A\n### Instruction: Q\n### Response:",
    "thebloke": "A helpful assistant who helps the user with any questions asked.\n"
    "User: P\nAssistant: A\nUser: Q\nAssistant:",
    "chatml": "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
}
WITH_SYSTEM = {
    "instruction": "S\n\n### Instruction: P\n### Response:",
    "thebloke": "S\nUser: P\nAssistant:",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nP<|im_end|>\n"
    "<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_named_template_writes_each_turn(name: str) -> None:
    turns = [("user", "P"), ("assistant", "A"), ("user", "Q")]
    chat = [{"role": role, "content": text} for role, text in turns]
    assert render(NAMED_TEMPLATES[name].source, chat) == EXPECTED[name]


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_named_template_places_the_system_message_or_refuses_it(name: str) -> None:
    chat = [SYSTEM, {"role": "user", "content": "P"}]
    if name in WITH_SYSTEM:
        assert render(NAMED_TEMPLATES[name].source, chat) == WITH_SYSTEM[name]
    else:
        with pytest.raises(TemplateError, match=r"refused the messages: .*system"):
            render(NAMED_TEMPLATES[name].source, chat)

